"""The tokenizer over both of its files: the same ids, exact round trips, and control tokens that stay text."""

import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from awkward_texts import AWKWARD_TEXTS, LONG_SPACES
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.config import PRESETS
from gemma2.errors import TokenizerError
from gemma2.text import Tokenizer
from gemma2.text.layout import CONTROL_PIECES, RESERVED_PIECES
from gemma2.text.sentencepiece_model import build_model

TEXTS = AWKWARD_TEXTS | LONG_SPACES


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_both_libraries_agree_and_give_the_text_back(by_json: Tokenizer, by_model: Tokenizer, text: str) -> None:
    ids = by_json.encode(text)
    assert by_model.encode(text) == ids
    for tokenizer in (by_json, by_model):
        assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("alphabet", ["▁ \n\r\tx", "aeht n", "-=_. a", "ab", "0123 ,", "你好，a ", "<bos>/end"])
def test_both_libraries_agree_on_random_strings(by_json: Tokenizer, by_model: Tokenizer, alphabet: str) -> None:
    draw = random.Random(alphabet)
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randint(1, 50)))
        assert by_json.encode(text) == by_model.encode(text), repr(text)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(by_json: Tokenizer, by_model: Tokenizer, text: str) -> None:
    ids = by_json.encode(text)
    assert by_model.encode(text) == ids
    assert by_json.decode(ids) == by_model.decode(ids) == text.replace("▁", " ")


def test_whitespace_is_cut_into_the_longest_runs(tokenizer: Tokenizer) -> None:
    pieces = [
        tokenizer.id_to_piece(token_id) for token_id in tokenizer.encode(" " * 19 + "\n\n\n\n\r\n\tx", add_bos=False)
    ]
    assert pieces[:5] == ["▁" * 16, "▁" * 3, "\n\n\n", "\n", "\r\n"]
    assert pieces[5:] == ["\t", "x"]


def test_ids_have_gemmas_layout(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_to_piece(token_id) for token_id in range(108)] == list(CONTROL_PIECES)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (106, 107)
    assert tokenizer.stop_ids == {1, 107}
    assert tokenizer.control_ids == set(range(108))
    assert tokenizer.vocab_size == 640
    assert [tokenizer.piece_to_id(piece) for piece in ("<mask>", "\n", "▁▁", "<0x00>")] == [4, 108, 114, 129]


def test_exactly_one_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("", add_bos=False) == []
    assert tokenizer.encode("sun") == [2, *tokenizer.encode("sun", add_bos=False)]
    for text in ("sun", "<bos>sun"):
        assert tokenizer.encode_with_control(text) == tokenizer.encode("sun")
    assert tokenizer.encode_with_control("") == [2]
    assert tokenizer.encode_with_control("<bos>sun", add_bos=False) == tokenizer.encode("sun")
    assert tokenizer.encode_with_control("sun", add_bos=False) == tokenizer.encode("sun", add_bos=False)


@pytest.mark.parametrize("piece", sorted(RESERVED_PIECES))
def test_a_control_token_in_a_text_stays_text(tokenizer: Tokenizer, piece: str) -> None:
    for text in (piece, f"a{piece}b", f"{piece}{piece}\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.control_ids.isdisjoint(ids[1:])
        assert tokenizer.decode(ids) == text


def test_control_tokens_are_found_where_they_are_meant(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_with_control("<start_of_turn>user\n sun<end_of_turn>\n<eos>")
    turn = tokenizer.encode("user\n sun", add_bos=False)
    assert ids == [2, 106, *turn, 107, 108, 1]
    assert tokenizer.decode(ids) == "user\n sun\n"
    assert tokenizer.decode(ids, skip_control=False) == "<bos><start_of_turn>user\n sun<end_of_turn>\n<eos>"


def test_a_copy_in_another_process_still_keeps_control_tokens_text(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in ("<end_of_turn>", "<mask>"):
        assert copy.encode(text) == tokenizer.encode(text)
        assert copy.control_ids.isdisjoint(copy.encode(text)[1:])


def test_pieces_that_gemma_finds_in_text_can_be_of_any_type(by_model: Tokenizer) -> None:
    # In Gemma's own tokenizer.model <start_of_turn> is a user-defined piece (4), which SentencePiece finds in text.
    pieces = [by_model.id_to_piece(token_id) for token_id in range(by_model.vocab_size)]
    scores = [-float(token_id) for token_id in range(by_model.vocab_size)]
    types = [2 if index == 3 else 4 if index < 129 else 6 if index < 385 else 1 for index in range(len(pieces))]
    tokenizer = Tokenizer.from_pieces(pieces, scores, types, source="test.gguf")
    text = "<start_of_turn>user\n the sun<unused5>"
    assert tokenizer.encode(text) == by_model.encode(text)
    assert tokenizer.control_ids == by_model.control_ids


def test_from_pieces_refuses_what_does_not_fit() -> None:
    with pytest.raises(TokenizerError, match=r"x\.gguf: needs one score .* has 2 pieces, 1 scores and 2 types"):
        Tokenizer.from_pieces(["<pad>", "<eos>"], [0.0], [3, 3], source="x.gguf")
    with pytest.raises(TokenizerError, match="types of pieces are 1 to 6, but one is 9"):
        Tokenizer.from_pieces(["<pad>", "<eos>"], [0.0, 0.0], [3, 9], source="x.gguf")
    with pytest.raises(TokenizerError, match=r"x\.gguf: a Gemma tokenizer has the piece <unk>"):
        Tokenizer.from_pieces(["<pad>", "<eos>"], [0.0, 0.0], [3, 3], source="x.gguf")


def test_truncation_and_padding_left_in_the_file_are_dropped(trained_folder: Path, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(trained_folder / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_folder(tmp_path).encode("the north wind and the sun")
    assert ids == Tokenizer.from_folder(trained_folder).encode("the north wind and the sun")
    assert len(ids) > 4


def test_ids_and_pieces_out_of_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for token_id in (-1, 640, 255_999):
        with pytest.raises(TokenizerError, match=rf"token ids go from 0 to 639, but one is {token_id}"):
            tokenizer.decode([2, token_id])
    with pytest.raises(TokenizerError, match=r"no piece '<end_of_turn'\. Did you mean '<end_of_turn>'"):
        tokenizer.piece_to_id("<end_of_turn")


def test_what_is_no_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"position 3 of the text, '\\ud83d', is half a surrogate pair"):
        tokenizer.encode("abc\ud83d")
    with pytest.raises(TokenizerError, match="must be a str, but is a bytes"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]


# -- the model that it is for -----------------------------------------------------------------------------------


def test_check_fits(tokenizer: Tokenizer) -> None:
    config = PRESETS["2b"].replace(vocab_size=640)
    tokenizer.check_fits(config)
    tokenizer.check_fits(config.replace(vocab_size=768))  # rows of padding
    with pytest.raises(TokenizerError, match="640 token ids, but the model has rows for only 639"):
        tokenizer.check_fits(config.replace(vocab_size=639))
    for name, piece, ours in (("pad", "<pad>", 0), ("eos", "<eos>", 1), ("bos", "<bos>", 2)):
        with pytest.raises(TokenizerError, match=rf"{piece} is token {ours}, but the model's {name}_token_id is 7"):
            tokenizer.check_fits(config.replace(**{f"{name}_token_id": 7}))


# -- files ------------------------------------------------------------------------------------------------------


def test_a_folder_with_both_files_is_read_by_its_json(trained_folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.from_folder(trained_folder).source == str(trained_folder / "tokenizer.json")
    shutil.copy(trained_folder / "tokenizer.model", tmp_path)
    assert Tokenizer.from_folder(tmp_path).source == str(tmp_path / "tokenizer.model")
    shutil.copy(trained_folder / "tokenizer.model", tmp_path / "spiece.bin")
    assert Tokenizer.from_file(tmp_path / "spiece.bin").encode("sun") == Tokenizer.from_folder(tmp_path).encode("sun")


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_folder_whose_name_is_no_utf8(trained_folder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / os.fsdecode(b"gemma-\xff")
    folder.mkdir()
    shutil.copy(trained_folder / name, folder)
    assert Tokenizer.from_folder(folder).encode("sun") == Tokenizer.from_folder(trained_folder).encode("sun")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"needs a tokenizer\.json or a tokenizer\.model, .* has: config\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="there is no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"is a file, not a folder; .*from_file"):
        Tokenizer.from_folder(tmp_path / "config.json")
    with pytest.raises(TokenizerError, match=r"is a folder, not a file; .*from_folder"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(TokenizerError, match="there is no such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_cut_file_is_refused_by_name(trained_folder: Path, tmp_path: Path, name: str) -> None:
    data = (trained_folder / name).read_bytes()
    path = tmp_path / name
    # The last cut takes the JSON's closing brace or a byte of the model's last field (a newline ends the JSON).
    for length in (0, 1, 2, 60, 100, len(data) // 2, len(data) - 1000, len(data) - 2):
        path.write_bytes(data[:length])
        with pytest.raises(TokenizerError, match=rf"{name}: .*"):
            Tokenizer.from_folder(tmp_path)


def test_a_model_cut_between_two_pieces_is_refused(by_model: Tokenizer, tmp_path: Path) -> None:
    pieces = [by_model.id_to_piece(token_id) for token_id in range(by_model.vocab_size)]
    types = [2 if index == 3 else 3 if index < 108 else 6 if 129 <= index < 385 else 1 for index in range(len(pieces))]
    data = build_model(pieces, [0.0] * len(pieces), types)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data[: data.rindex(b"\n\x08\n\x01")])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: .* cut short"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_files_raise_nothing_but_our_error(trained_folder: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((trained_folder / name).read_bytes())
    path = tmp_path / name
    draw = random.Random(name)
    for _ in range(25):
        damaged = bytearray(data)
        for _ in range(40):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            Tokenizer.from_file(path).encode("the north wind")
        except TokenizerError as error:
            assert str(path) in str(error)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17525357\n"
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<s>": 1}, [], byte_fallback=True))
    for name, contents, message in (
        ("tokenizer.json", pointer, "git-lfs pointer"),
        ("tokenizer.model", pointer, "git-lfs pointer"),
        ("tokenizer.json", '{"a": 1}', "no tokenizer of Hugging Face's tokenizers"),
        ("tokenizer.json", "[1]", "no tokenizer of Hugging Face's tokenizers"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "cannot read this file"),
        ("tokenizer.json", other.to_str(), "byte-pair encoding with byte fallback, but this one is WordLevel"),
        ("tokenizer.json", bytewise.to_str(), "but this one is BPE without it"),
        ("tokenizer.json", foreign.to_str(), "has the piece <pad>, but this one does not"),
        ("tokenizer.model", "not a model at all", "is not a whole SentencePiece model"),
    ):
        path = tmp_path / name
        path.write_text(contents)
        with pytest.raises(TokenizerError, match=rf"{name}: .*{message}"):
            Tokenizer.from_file(path)


def test_a_tokenizer_that_changes_the_text_is_refused(trained_folder: Path, tmp_path: Path) -> None:
    contents = json.loads((trained_folder / "tokenizer.json").read_text(encoding="utf-8"))
    contents["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, contents["normalizer"]]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(TokenizerError, match="gives a text back as it was"):
        Tokenizer.from_file(path)
