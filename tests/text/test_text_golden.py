"""Gemma's own vocabulary: ids of real sentences as Hugging Face's library makes them, and the two libraries compared.

The golden ids are checked with a reduced copy of Gemma's file (see `golden/make_golden.py`) and, where it is at hand,
with the file itself.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from awkward_texts import AWKWARD_TEXTS, LONG_SPACES

from gemma2.text import Tokenizer
from gemma2.text.layout import BYTE_PIECES, CONTROL_PIECES, RESERVED_PIECES
from gemma2.text.libraries import TokenizersLibrary
from gemma2.text.sentencepiece_model import PieceType

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN: dict[str, dict[str, Any]] = json.loads((GOLDEN_FOLDER / "gemma_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def reduced() -> Tokenizer:
    return Tokenizer.from_file(GOLDEN_FOLDER / "gemma_reduced_tokenizer.json")


@pytest.fixture(scope="session")
def gemma(gemma_folder: Path) -> Tokenizer:
    """Gemma's own file, by Hugging Face's library; `test_tokenizer_twin` holds what users get to the same ids."""
    return Tokenizer(TokenizersLibrary(gemma_folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def gemma_by_model(gemma_folder: Path) -> Tokenizer:
    """Gemma's vocabulary as a SentencePiece model, with the types of Gemma's own tokenizer.model."""
    contents = json.loads((gemma_folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {token["content"] for token in contents["added_tokens"]}
    pieces = sorted(contents["model"]["vocab"], key=contents["model"]["vocab"].__getitem__)
    pieces[226] = "<0x09>"  # the JSON calls this byte "\t"
    types = []
    for index, piece in enumerate(pieces):
        if index < 4:
            types.append(PieceType.UNKNOWN if index == 3 else PieceType.CONTROL)
        elif piece in BYTE_PIECES:
            types.append(PieceType.BYTE)
        else:
            types.append(PieceType.USER_DEFINED if piece in added else PieceType.NORMAL)
    return Tokenizer.from_pieces(pieces, [-float(index) for index in range(len(pieces))], types, source="built")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(reduced: Tokenizer, name: str) -> None:
    text, ids = GOLDEN[name]["text"], GOLDEN[name]["ids"]
    assert reduced.encode(text, add_bos=False) == ids
    assert reduced.decode(ids) == text.replace("▁", " ")


def test_some_golden_ids_are_spelled_out(reduced: Tokenizer) -> None:
    pangram = [2, 651, 4320, 8426, 25341, 36271, 1163, 573, 27894, 5929, 235265]
    assert reduced.encode("The quick brown fox jumps over the lazy dog.") == pangram
    assert reduced.encode("<end_of_turn>", add_bos=False) == [235322, 615, 235298, 559, 235298, 15508, 235313]
    assert reduced.encode("   three\n\n\n\t\t", add_bos=False) == [140, 16183, 110, 255969]


def test_reserved_pieces(reduced: Tokenizer) -> None:
    assert [reduced.id_to_piece(token_id) for token_id in range(108)] == list(CONTROL_PIECES)
    assert reduced.control_ids == {*range(108), 255968, 255999}
    assert reduced.vocab_size == 256_000
    assert reduced.stop_ids == {1, 107}
    text = "".join(sorted(RESERVED_PIECES))
    assert reduced.control_ids.isdisjoint(reduced.encode(text, add_bos=False))
    # HTML tags stand beside the control tokens in Gemma's file, but they are text.
    tags = reduced.encode("<table></table><h1><b>", add_bos=False)
    assert tags == [169, 177, 185, 201]
    assert reduced.decode(tags) == "<table></table><h1><b>"


def test_golden_ids_with_gemmas_own_file(gemma: Tokenizer) -> None:
    for entry in GOLDEN.values():
        assert gemma.encode(entry["text"], add_bos=False) == entry["ids"]
        assert gemma.decode(entry["ids"]) == entry["text"].replace("▁", " ")


def test_both_libraries_agree_on_gemmas_vocabulary(gemma: Tokenizer, gemma_by_model: Tokenizer) -> None:
    assert gemma.control_ids == gemma_by_model.control_ids
    draw = random.Random(0)
    texts = list((AWKWARD_TEXTS | LONG_SPACES).values())
    for alphabet in (" \n\r\tx", "aeht n", "-=_. a", "0123 ,", "你好世界 a", "<table></h1>", "▁a"):
        texts += ["".join(draw.choices(alphabet, k=draw.randint(1, 90))) for _ in range(300)]
    for text in texts:
        assert gemma.encode(text) == gemma_by_model.encode(text), repr(text)


def test_the_known_difference_of_the_two_libraries(gemma: Tokenizer, gemma_by_model: Tokenizer) -> None:
    by_json, by_model = gemma.encode("▁▁ a", add_bos=False), gemma_by_model.encode("▁▁ a", add_bos=False)
    assert [gemma.id_to_piece(token_id) for token_id in by_json] == ["▁▁", "▁a"]
    assert [gemma.id_to_piece(token_id) for token_id in by_model] == ["▁▁▁", "a"]
    assert gemma.decode(by_json) == gemma_by_model.decode(by_model) == "   a"


def test_ids_are_those_of_transformers(gemma: Tokenizer, gemma_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reference = transformers.AutoTokenizer.from_pretrained(gemma_folder)
    for name, text in (AWKWARD_TEXTS | LONG_SPACES).items():
        ids = reference(text, add_special_tokens=False)["input_ids"]
        # transformers looks for control tokens in any text, and so does `encode_with_control`. (With a <bos> of its
        # own it would put a second one before the one in the text.)
        assert gemma.encode_with_control(text, add_bos=False) == ids, name
        if "tokens" not in name:
            assert gemma.encode(text) == reference(text)["input_ids"] == [2, *ids], name
            assert gemma.decode(ids) == reference.decode(ids), name
