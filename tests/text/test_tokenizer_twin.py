"""A twin against the `tokenizer.json` that it stands for: the same in all that a tokenizer does, kept, and refused.

With a reduced copy of Gemma's file, its ids closed up, and, where it is at hand, with the file itself.
"""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from awkward_texts import AWKWARD_TEXTS, LONG_SPACES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_golden import GOLDEN, GOLDEN_FOLDER

from gemma2.cache_folder import cache_folder
from gemma2.errors import TokenizerError
from gemma2.text import StreamDetokenizer, Tokenizer, encode_chat, twin
from gemma2.text.layout import CONTROL_PIECES, RESERVED_PIECES
from gemma2.text.libraries import TokenizersLibrary
from gemma2.text.twin import TwinLibrary, open_json
from gemma2.text.twin_builder import UnlikeGemmaError, build_twin


@pytest.fixture(scope="session")
def reduced_contents() -> dict[str, Any]:
    """The reduced copy of Gemma's file, with ids that follow each other: SentencePiece knows no others."""
    contents: dict[str, Any] = json.loads((GOLDEN_FOLDER / "gemma_reduced_tokenizer.json").read_text(encoding="utf-8"))
    vocab = contents["model"]["vocab"]
    closed_up = {piece: index for index, piece in enumerate(sorted(vocab, key=vocab.__getitem__))}
    contents["model"]["vocab"] = closed_up
    for token in contents["added_tokens"]:
        token["id"] = closed_up[token["content"]]
    return contents


@pytest.fixture(scope="session")
def reduced_path(reduced_contents: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("reduced"), reduced_contents)


@pytest.fixture(scope="session", params=["reduced", "Gemma's own"])
def path(request: pytest.FixtureRequest) -> Path:
    """A file that has a twin."""
    if request.param == "reduced":
        return Path(request.getfixturevalue("reduced_path"))
    return Path(request.getfixturevalue("gemma_folder")) / "tokenizer.json"


@pytest.fixture(scope="session")
def by_twin(path: Path) -> Tokenizer:
    library = open_json(path, 0)
    assert isinstance(library, TwinLibrary)
    return Tokenizer(library)


@pytest.fixture(scope="session")
def by_json(path: Path) -> Tokenizer:
    return Tokenizer(TokenizersLibrary(path))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; returns the folder of its twins."""
    monkeypatch.setenv("GEMMA2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def write_json(folder: Path, contents: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    return path


# -- the same tokenizer -----------------------------------------------------------------------------------------


def test_awkward_texts_and_golden_ones(by_twin: Tokenizer, by_json: Tokenizer) -> None:
    golden = {name: entry["text"] for name, entry in GOLDEN.items()}
    for name, text in (AWKWARD_TEXTS | LONG_SPACES | golden).items():
        for variant in (text, f"{text}\n{text}", text.replace(" ", "▁"), f"{text} ▁▁ {text}", f"▁{text}▁▁"):
            ids = by_json.encode(variant)
            assert by_twin.encode(variant) == ids, name
            assert by_twin.decode(ids) == by_json.decode(ids), name
            assert by_twin.encode_with_control(variant) == by_json.encode_with_control(variant), name


def test_runs_of_the_sign_for_a_space(by_twin: Tokenizer, by_json: Tokenizer) -> None:
    # Where SentencePiece by itself differs from tokenizers.
    assert [by_twin.id_to_piece(token_id) for token_id in by_twin.encode("▁▁ a", add_bos=False)] == ["▁▁", "▁a"]
    assert [by_twin.id_to_piece(token_id) for token_id in by_twin.encode("▁ a", add_bos=False)] == ["▁▁", "a"]
    for count in (1, 2, 3, 30, 31, 32, 33, 34, 61, 62, 63, 64, 65, 100):
        for text in ("▁" * count, f"a{'▁' * count}a", f" {'▁' * count} a", f"{'▁' * count}\n{' ' * count}▁"):
            assert by_twin.encode(text) == by_json.encode(text), repr(text)


def test_random_texts(by_twin: Tokenizer, by_json: Tokenizer) -> None:
    draw = random.Random(0)
    pieces = [by_json.id_to_piece(token_id) for token_id in range(by_json.vocab_size)]
    texts = [piece.replace("▁", " ") for piece in pieces]
    added = [piece for piece in pieces if piece[0] in "<[\n\t" or piece.startswith("▁▁")]
    characters = [text for text in texts if len(text) == 1]
    kinds: list[Callable[[], str]] = [
        lambda: "".join(draw.choices(texts, k=draw.randint(1, 15))),
        lambda: "".join(draw.choices(characters, k=draw.randint(1, 60))),
        lambda: "".join(chr(draw.randrange(0xD800)) for _ in range(draw.randint(1, 30))),
        lambda: "".join(draw.choices([*" \n\t\r\0x▁", "▁▁", "\r\n", "\u00a0", "\u2585"], k=draw.randint(1, 90))),
        # Pieces that are text and pieces that are not, whole, cut, and one inside of the other.
        lambda: "".join(piece[draw.randrange(len(piece)) :] for piece in draw.choices(added, k=draw.randint(1, 6))),
        lambda: "".join(piece[: draw.randint(1, len(piece))] for piece in draw.choices(added, k=draw.randint(1, 6))),
        lambda: f"<{draw.choice(added)}{draw.choice(added)[:3]}{draw.choice(added)}>",
        # Few different characters: many ways to halve the same piece.
        lambda: "".join(draw.choices(draw.choices(characters, k=draw.randint(1, 4)), k=draw.randint(1, 120))),
        lambda: "".join(draw.choices(draw.choice(("ab", "aan ", "etaoin", "-=", "haH", "0 1.")), k=80)),
        lambda: draw.choice(texts) * draw.randint(1, 40) + draw.choice(texts),
    ]
    for _ in range(60):
        for kind in kinds:
            text = kind()
            assert by_twin.encode(text, add_bos=False) == by_json.encode(text, add_bos=False), repr(text)


@settings(deadline=None, max_examples=50)
@given(text=st.text() | st.text("▁ \n\ta<>/be"))
def test_any_text(by_twin: Tokenizer, by_json: Tokenizer, text: str) -> None:
    assert by_twin.encode(text) == by_json.encode(text)


def test_pieces_and_ids(by_twin: Tokenizer, by_json: Tokenizer) -> None:
    assert by_twin.vocab_size == by_json.vocab_size
    assert by_twin.control_ids == by_json.control_ids
    assert by_twin.stop_ids == by_json.stop_ids
    for token_id in range(by_json.vocab_size):
        piece = by_json.id_to_piece(token_id)
        assert by_twin.id_to_piece(token_id) == piece
        assert by_twin.piece_to_id(piece) == token_id
        assert by_twin.token_text(token_id) == by_json.token_text(token_id)
    assert [by_twin.id_to_piece(token_id) for token_id in range(108)] == list(CONTROL_PIECES)
    tab = by_twin.encode("a\tb", add_bos=False)[1]
    assert by_twin.id_to_piece(tab) == "\t"
    # SentencePiece's name for it, and names that nothing has.
    for piece in ("<0x09>", "", "no such piece", "a\0b"):
        with pytest.raises(TokenizerError) as by_json_says:
            by_json.piece_to_id(piece)
        with pytest.raises(TokenizerError) as by_twin_says:
            by_twin.piece_to_id(piece)
        assert str(by_twin_says.value) == str(by_json_says.value)


@pytest.mark.parametrize("piece", sorted(RESERVED_PIECES))
def test_a_control_token_in_a_text_stays_text(by_twin: Tokenizer, by_json: Tokenizer, piece: str) -> None:
    for text in (piece, f"a{piece}b", f"{piece}<b>{piece[1:]}\n<{piece}"):
        assert by_twin.encode(text, add_bos=False) == by_json.encode(text, add_bos=False)
        assert by_twin.control_ids.isdisjoint(by_twin.encode(text, add_bos=False))


def test_chats_and_streams(by_twin: Tokenizer, by_json: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Why is the sky blue?  <end_of_turn>\t🤗𐍈"}]
    ids = encode_chat(by_json, messages)
    assert encode_chat(by_twin, messages) == ids
    for skip_control in (True, False):
        streams = [StreamDetokenizer(tokenizer, skip_control=skip_control) for tokenizer in (by_twin, by_json)]
        for token_id in ids:
            assert streams[0].push(token_id) == streams[1].push(token_id)


def test_errors_name_the_json(by_twin: Tokenizer, path: Path) -> None:
    assert by_twin.source == str(path)
    assert repr(by_twin).startswith(f"Tokenizer({str(path)!r}, ")
    with pytest.raises(TokenizerError, match=r"token ids go from 0 to .* but one is 256000") as error:
        by_twin.decode([256_000])
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(TokenizerError, match=r"position 3 of the text, '\\ud83d', is half a surrogate pair"):
        by_twin.encode("a▁▁\ud83d")
    with pytest.raises(TokenizerError, match="must be a str, but is a bytes"):
        by_twin.encode(b"abc")  # type: ignore[arg-type]


def test_a_copy_in_another_process(by_twin: Tokenizer) -> None:
    copied = pickle.loads(pickle.dumps(by_twin))
    assert type(copied._library) is TwinLibrary
    for text in ("<end_of_turn>", "▁▁ a\t🤗"):
        assert copied.encode(text) == by_twin.encode(text)


# -- which files, and what is kept ------------------------------------------------------------------------------


def test_gemmas_own_file_is_large_enough(gemma_folder: Path) -> None:
    assert type(Tokenizer.from_folder(gemma_folder)._library) is TwinLibrary


def test_a_small_file_has_no_twin(reduced_path: Path, own_cache: Path) -> None:
    assert type(Tokenizer.from_file(reduced_path)._library) is TokenizersLibrary
    assert not own_cache.exists()


def test_a_twin_is_made_once(reduced_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(open_json(reduced_path, 0)) is TwinLibrary
    assert [entry.suffix for entry in own_cache.iterdir()] == [".twin"]
    monkeypatch.setattr(twin, "build_twin", None)
    monkeypatch.setattr(twin, "TokenizersLibrary", None)
    assert open_json(reduced_path, 0).encode("the sky") == TokenizersLibrary(reduced_path).encode("the sky")


def test_a_changed_file_gets_another_twin(
    reduced_path: Path, reduced_contents: dict[str, Any], own_cache: Path, tmp_path: Path
) -> None:
    open_json(reduced_path, 0)
    contents = copy.deepcopy(reduced_contents)
    contents["added_tokens"][4]["special"] = True
    changed = write_json(tmp_path, contents)
    assert open_json(changed, 0).control_names == TokenizersLibrary(changed).control_names
    assert len(list(own_cache.iterdir())) == 2


def test_a_damaged_twin_is_made_anew(reduced_path: Path, own_cache: Path) -> None:
    open_json(reduced_path, 0)
    (kept,) = own_cache.iterdir()
    good = kept.read_bytes()
    draw = random.Random(0)
    damaged = [b"", b"x", good[:30], good[:-1], good[:1000], good + b"x"]
    for _ in range(4):
        other = bytearray(good)
        other[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(other))
    for data in damaged:
        kept.write_bytes(data)
        assert type(open_json(reduced_path, 0)) is TwinLibrary
        assert kept.read_bytes() == good
    kept.unlink()
    kept.mkdir()  # neither read nor replaced
    assert type(open_json(reduced_path, 0)) is TwinLibrary
    assert list(own_cache.iterdir()) == [kept]


def test_without_a_cache_it_is_read_by_tokenizers(
    reduced_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.parent.write_text("a file")
    assert type(open_json(reduced_path, 0)) is TokenizersLibrary
    own_cache.parent.unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert type(open_json(reduced_path, 0)) is TokenizersLibrary


def test_damaged_files_are_refused_by_name(reduced_path: Path, own_cache: Path, tmp_path: Path) -> None:
    data = reduced_path.read_bytes()
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read: No such file"):
        open_json(path, 0)
    for length in (1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: is not valid JSON"):
            open_json(path, 0)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variables, folder in (
        ({}, tmp_path / ".cache" / "gemma2"),
        ({"XDG_CACHE_HOME": "relative"}, tmp_path / ".cache" / "gemma2"),
        ({"XDG_CACHE_HOME": "/var/mine"}, Path("/var/mine/gemma2")),
        ({"XDG_CACHE_HOME": "/var/mine", "GEMMA2_CACHE": "~/own"}, tmp_path / "own"),
    ):
        for name in ("XDG_CACHE_HOME", "GEMMA2_CACHE"):
            monkeypatch.setenv(name, variables.get(name, ""))
        assert cache_folder() == folder
    monkeypatch.setenv("GEMMA2_CACHE", "~nobody-of-this-name/own")
    with pytest.raises(OSError, match="GEMMA2_CACHE can name one"):
        cache_folder()


# -- files that get none ----------------------------------------------------------------------------------------


def _swap(items: list[Any], first: int, second: int) -> None:
    items[first], items[second] = items[second], items[first]


def _add_token(contents: dict[str, Any], content: str, **settings: bool) -> None:
    vocab = contents["model"]["vocab"]
    index = vocab.setdefault(content, len(vocab))
    contents["added_tokens"].append({**contents["added_tokens"][-1], "id": index, "content": content, **settings})


def _add_piece(contents: dict[str, Any], left: str, right: str) -> None:
    contents["model"]["vocab"][left + right] = len(contents["model"]["vocab"])
    contents["model"]["merges"].append(f"{left} {right}")


def _without(contents: dict[str, Any], name: str) -> None:
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] != name]


def _rename(contents: dict[str, Any], piece: str, name: str) -> None:
    vocab = contents["model"]["vocab"]
    contents["model"]["vocab"] = {name if key == piece else key: index for key, index in vocab.items()}


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "normalizer": (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer"),
    "no normalizer": (lambda c: c.update(normalizer=None), "normalizer"),
    "pre-tokenizer": (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
    "post-processor": (lambda c: c.update(post_processor={"type": "ByteLevel"}), "post-processor"),
    "text twice": (lambda c: c["post_processor"]["single"].append({"Sequence": {"id": "A"}}), "changes the text's"),
    "new part": (lambda c: c.update(further={}), "parts that Gemma's has not"),
    "whole words": (lambda c: c["model"].update(ignore_merges=True), "other settings"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "other settings"),
    "no bytes": (lambda c: c["model"].update(byte_fallback=False), "other settings"),
    "gap": (lambda c: c["model"]["vocab"].update({"zzzz": 10**6}), "gaps"),
    "NUL": (lambda c: c["model"]["vocab"].update({"\0": len(c["model"]["vocab"])}), "NUL"),
    "no byte piece": (lambda c: _rename(c, "<0xE2>", "<0xe2>"), "a byte has no piece"),
    "two tabs": (lambda c: c["model"]["vocab"].update({"<0x09>": len(c["model"]["vocab"])}), "two ids"),
    "tab joined": (lambda c: _add_piece(c, "\t", "a"), "single characters"),
    "tab before tab": (lambda c: c["model"]["merges"].append("\t \n"), "joins tabs"),
    "newline joined": (lambda c: _add_piece(c, "a", "\n"), "single characters"),
    "stripping": (lambda c: c["added_tokens"][5].update(lstrip=True), "other settings"),
    "normalized": (lambda c: c["added_tokens"][200].update(normalized=True), "other settings"),
    "another id": (lambda c: c["added_tokens"][5].update(id=6), "two ids"),
    "no <unk>": (lambda c: _without(c, "<unk>"), "<unk> is no added token"),
    "run missing": (lambda c: _without(c, "▁▁▁"), "runs of spaces are others"),
    "space in a token": (lambda c: _add_token(c, "▁<i>"), "runs of spaces are others"),
    "overlap": (lambda c: _add_token(c, "unused1"), "overlap"),
    "overlapping end": (lambda c: _add_token(c, "></"), "overlap"),
    "short control token": (lambda c: _add_token(c, "q", special=True), "single character"),
    "byte as token": (lambda c: _add_token(c, "<0x41>"), "byte is an added token"),
    "merge missing": (lambda c: c["model"]["merges"].pop(), "merges for .* are others"),
    "merge missing amid": (lambda c: c["model"]["merges"].pop(2000), "merges for .* are others"),
    "merges swapped": (lambda c: _swap(c["model"]["merges"], 1500, 1600), "merges for .* are others"),
    "run later": (lambda c: _swap(c["model"]["merges"], 1393, 1500), "runs of spaces first"),
    "merge twice": (lambda c: c["model"]["merges"].append(c["model"]["merges"][-1]), "more merges"),
    "no merges": (lambda c: c["model"].update(merges=None), "TypeError"),
    "no vocabulary": (lambda c: c["model"].pop("vocab"), "KeyError"),
    "half a character": (lambda c: c["model"]["vocab"].update({"\ud800": len(c["model"]["vocab"])}), "Unicode"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_unlike_gemma_is_refused(reduced_contents: dict[str, Any], name: str) -> None:
    change, reason = CHANGES[name]
    contents = copy.deepcopy(reduced_contents)
    change(contents)
    with pytest.raises(UnlikeGemmaError, match=reason):
        build_twin(json.dumps(contents).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b'{"model": 3}', b"\xff", b"[" * 100_000])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(UnlikeGemmaError):
        build_twin(data)


def test_the_newer_spelling_of_merges_makes_the_same_twin(reduced_contents: dict[str, Any]) -> None:
    contents = copy.deepcopy(reduced_contents)
    contents["model"]["merges"] = [merge.split(" ") for merge in contents["model"]["merges"]]
    contents["pre_tokenizer"] = None
    del contents["model"]["ignore_merges"]
    assert build_twin(json.dumps(contents).encode()) == build_twin(json.dumps(reduced_contents).encode())


def test_a_refused_file_is_read_by_tokenizers_and_not_tried_again(
    reduced_contents: dict[str, Any], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = copy.deepcopy(reduced_contents)
    _swap(contents["model"]["merges"], 1500, 1600)
    path = write_json(tmp_path, contents)
    assert type(open_json(path, 0)) is TokenizersLibrary
    monkeypatch.setattr(twin, "build_twin", None)
    assert type(open_json(path, 0)) is TokenizersLibrary
    assert len(list(own_cache.iterdir())) == 1


def test_tokenizers_that_are_trained_here_get_none(trained_folder: Path) -> None:
    # Their added tokens are found in normalized text, and they are small.
    with pytest.raises(UnlikeGemmaError, match=r"the added token .* has other settings"):
        build_twin((trained_folder / "tokenizer.json").read_bytes())


# -- what is imported -------------------------------------------------------------------------------------------


def test_only_the_library_that_reads_the_file_is_imported(reduced_path: Path) -> None:
    program = """if True:
        import sys
        from pathlib import Path
        from gemma2.text import Tokenizer
        from gemma2.text.twin import open_json
        def imported(): return [name for name in ("sentencepiece", "tokenizers") if name in sys.modules]
        print(imported())
        Tokenizer(open_json(Path(sys.argv[1]), 0)).encode("the ▁▁ sky")
        print(imported())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(reduced_path)]
    Tokenizer(open_json(reduced_path, 0))
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.splitlines() == ["[]", "['sentencepiece']"]
