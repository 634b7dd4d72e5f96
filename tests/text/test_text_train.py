"""Training a tokenizer: the same files every time, Gemma's rules, and errors that say what to change."""

import json
import random
from pathlib import Path

import pytest
from awkward_texts import TRAINING_TEXT

from gemma2.errors import TokenizerError
from gemma2.text import Tokenizer, train_tokenizer
from gemma2.text.train import WHITESPACE_PIECES


def test_the_same_texts_give_the_same_files(trained_folder: Path, tmp_path: Path) -> None:
    train_tokenizer([TRAINING_TEXT] * 3, vocab_size=640, folder=tmp_path, character_coverage=1.0, num_threads=3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (trained_folder / name).read_bytes()


def test_pieces_follow_gemmas_rules(by_json: Tokenizer) -> None:
    learned = [by_json.id_to_piece(token_id) for token_id in range(385, by_json.vocab_size)]
    assert [by_json.id_to_piece(token_id) for token_id in range(108, 129)] == list(WHITESPACE_PIECES)
    assert [by_json.id_to_piece(token_id) for token_id in range(129, 385)] == [
        f"<0x{value:02X}>" for value in range(256)
    ]
    assert len(set(learned)) == len(learned)
    assert {chr(code) for code in range(0x21, 0x7F)} <= set(learned), "ASCII always has pieces of its own"
    for piece in learned:
        assert not set(piece) & set("\n\r\t "), "no piece reaches over a newline or a tab"
        assert "▁" not in piece[1:], "no piece reaches over a space"
        assert len(piece.lstrip("▁")) == 1 or not any(map(str.isdigit, piece)), "each digit stands alone"
    assert "▁the" in learned and "▁traveller" in learned


def test_newlines_do_not_change_the_pieces(trained_folder: Path, tmp_path: Path) -> None:
    windows = TRAINING_TEXT.replace("\r\n", "\n").replace("\n", "\r\n")
    train_tokenizer([windows] * 3, vocab_size=640, folder=tmp_path, character_coverage=1.0, num_threads=1)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained_folder / "tokenizer.json").read_bytes()


def test_long_lines_are_cut_and_not_passed_over(tmp_path: Path) -> None:
    # SentencePiece would leave out a line that is longer than its limit without a word.
    line = " ".join(["unforgettable zebras"] * 40) + "é" * 200
    train_tokenizer([line], vocab_size=510, folder=tmp_path, max_sentence_bytes=100)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.id_to_piece(tokenizer.encode(" unforgettable zebras", add_bos=False)[0]).startswith("▁un")
    assert tokenizer.piece_to_id("é") >= 385


def test_long_lines_are_cut_before_a_space(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcde", k=draw.randint(4, 9))) for _ in range(300)]
    for folder, longest in (("cut", 64), ("whole", 10_000)):
        train_tokenizer([" ".join(words)], vocab_size=600, folder=tmp_path / folder, max_sentence_bytes=longest)
    cut, whole = ((tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("cut", "whole"))
    assert cut == whole


def test_a_line_is_not_taken_to_begin_with_a_space(tmp_path: Path) -> None:
    train_tokenizer(["zebra\n" * 60], vocab_size=484, folder=tmp_path)
    assert Tokenizer.from_folder(tmp_path).piece_to_id("zebra")


def test_digits_stand_alone(tmp_path: Path) -> None:
    train_tokenizer(["in 1984 or 1985 " * 30], vocab_size=482, folder=tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    pieces = [tokenizer.id_to_piece(token_id) for token_id in tokenizer.encode("in 1984", add_bos=False)]
    assert pieces[-5:] == ["▁", "1", "9", "8", "4"]


@pytest.mark.parametrize("text", ["你好世界" * 40, "zebra" * 40, " ", "\t\x00\u2585\ud83d a"])
def test_any_text_makes_a_tokenizer_that_gives_every_text_back(tmp_path: Path, text: str) -> None:
    train_tokenizer([text], vocab_size=480 + len(set(text) & set("你好世界")), folder=tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        tokenizer = Tokenizer.from_file(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode("a  b\t你 ~é\n")) == "a  b\t你 ~é\n"


def test_rare_characters_are_left_to_bytes(tmp_path: Path) -> None:
    text = "é" * 90 + "ñ" * 9 + "ü"
    for coverage, kept in ((0.0, ""), (0.9, "é"), (0.91, "éñ"), (1.0, "éñü")):
        train_tokenizer([text], vocab_size=480 + len(kept), folder=tmp_path, character_coverage=coverage)
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert [len(tokenizer.encode(letter, add_bos=False)) == 1 for letter in "éñü"] == [c in kept for c in "éñü"]


def test_the_json_is_compact_and_complete(trained_folder: Path) -> None:
    text = (trained_folder / "tokenizer.json").read_text(encoding="utf-8")
    assert "\n" not in text[:-1] and "\\u2581" not in text
    contents = json.loads(text)
    assert [token["id"] for token in contents["added_tokens"] if token["special"]] == list(range(108))
    assert {"add_bos_token": True, "bos_token": "<bos>", "tokenizer_class": "GemmaTokenizer"}.items() <= json.loads(
        (trained_folder / "tokenizer_config.json").read_text(encoding="utf-8")
    ).items()


def test_vocabulary_sizes_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"vocab_size must be at least 480.*but it is 479"):
        train_tokenizer(["a"], vocab_size=479, folder=tmp_path)
    with pytest.raises(TokenizerError, match=r"vocab_size 5000: Vocabulary size too high \(5000\)\. Please set"):
        train_tokenizer([TRAINING_TEXT], vocab_size=5000, folder=tmp_path)
    with pytest.raises(
        TokenizerError, match=r"at least 483 for the 98 characters of this text, but it is 480; raise it"
    ):
        train_tokenizer(["äöü" * 10], vocab_size=480, folder=tmp_path, character_coverage=1.0)
    with pytest.raises(TokenizerError, match="max_sentence_bytes must be at least 64, but is 3"):
        train_tokenizer(["a"], vocab_size=480, folder=tmp_path, max_sentence_bytes=3)
    with pytest.raises(TokenizerError, match=r"character_coverage must be from 0 to 1, but is 99"):
        train_tokenizer(["a"], vocab_size=480, folder=tmp_path, character_coverage=99)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", "\n\r\n"]])
def test_no_text(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="the texts are empty"):
        train_tokenizer(texts, vocab_size=480, folder=tmp_path)


def test_transformers_reads_the_folder(trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reference = transformers.AutoTokenizer.from_pretrained(trained_folder)
    tokenizer = Tokenizer.from_folder(trained_folder)
    assert "Gemma" in type(reference).__name__
    assert len(reference) == tokenizer.vocab_size
    for text in ("The sun and  the\n\n\n\nnorth wind.\r\n\t" + " " * 40, "¿Qué? 1984 你好 🤗 ▁▁ x", ""):
        ids = reference(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert reference.decode(ids, skip_special_tokens=True) == text.replace("▁", " ")
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": " Hello "}]
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<bos><start_of_turn>user\nBe terse.\n\nHello<end_of_turn>\n")
