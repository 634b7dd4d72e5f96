"""The streaming detokenizer: nothing too early, nothing too late, and in all what the whole sequence decodes to."""

from pathlib import Path

import pytest
import sentencepiece
from awkward_texts import AWKWARD_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.errors import TokenizerError
from gemma2.text import StreamDetokenizer, Tokenizer

FIRST_BYTE = 129  # the id of <0x00> in the trained tokenizer


@pytest.fixture(scope="session")
def reference(trained_folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(trained_folder / "tokenizer.model"))


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE + value for value in data]


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_control: bool = True) -> list[str]:
    detokenizer = StreamDetokenizer(tokenizer, skip_control=skip_control)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def test_text_comes_at_once_and_characters_whole(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.piece_to_id("▁"), *byte_ids("é🤗".encode()), tokenizer.piece_to_id("a"), 107]
    assert stream(tokenizer, ids) == [" ", "", "é", "", "", "", "🤗", "a", "", ""]


def test_bytes_that_are_no_character_become_one_sign_each(tokenizer: Tokenizer) -> None:
    a = tokenizer.piece_to_id("a")
    assert stream(tokenizer, byte_ids(b"\xff")) == ["\ufffd", ""]
    assert stream(tokenizer, byte_ids(b"\xf0\x9f\xa4")) == ["", "", "", "\ufffd" * 3]
    assert stream(tokenizer, [*byte_ids(b"\xf0\x9f"), a]) == ["", "", "\ufffd\ufffda", ""]
    assert stream(tokenizer, byte_ids(b"\xf0\x9fA\xc3\xa9")) == ["", "", "\ufffd\ufffdA", "", "é", ""]
    assert stream(tokenizer, byte_ids(b"\xe4\xbd\xc3\xa9")) == ["", "", "\ufffd\ufffd", "é", ""]
    assert stream(tokenizer, byte_ids(b"\xed\xa0\x80")) == ["", "\ufffd\ufffd", "\ufffd", ""]  # a surrogate
    assert stream(tokenizer, byte_ids(b"\xc0\x80")) == ["\ufffd", "\ufffd", ""]  # an overlong form


def test_a_control_token_ends_a_character(tokenizer: Tokenizer) -> None:
    ids = [*byte_ids(b"\xc3"), tokenizer.end_of_turn_id, *byte_ids(b"\xa9")]
    assert stream(tokenizer, ids) == ["", "\ufffd", "\ufffd", ""]
    assert stream(tokenizer, ids, skip_control=False) == ["", "\ufffd<end_of_turn>", "\ufffd", ""]


def test_it_can_go_on_after_finish_and_after_an_unknown_id(tokenizer: Tokenizer) -> None:
    detokenizer = StreamDetokenizer(tokenizer)
    first, second = byte_ids("é".encode())
    assert detokenizer.push(first) == ""
    with pytest.raises(TokenizerError, match="one is 9999"):
        detokenizer.push(9999)
    assert detokenizer.push(second) == "é"
    assert detokenizer.finish() == ""
    assert detokenizer.push(tokenizer.piece_to_id("a")) == "a"


@pytest.mark.parametrize("name", AWKWARD_TEXTS)
def test_awkward_texts_come_back(tokenizer: Tokenizer, name: str) -> None:
    text = AWKWARD_TEXTS[name]
    assert "".join(stream(tokenizer, tokenizer.encode(text))) == text.replace("▁", " ")


# Bytes and control tokens are few among all ids, so that they are drawn more often than their share.
TOKEN_IDS = st.lists(st.one_of(st.integers(0, 639), st.integers(0, 107), st.integers(129, 384)), max_size=40)


@settings(deadline=None, max_examples=300)
@given(ids=TOKEN_IDS, skip_control=st.booleans())
def test_all_parts_joined_are_the_whole(
    by_json: Tokenizer, by_model: Tokenizer, ids: list[int], skip_control: bool
) -> None:
    for tokenizer in (by_json, by_model):
        parts = stream(tokenizer, ids, skip_control=skip_control)
        assert "".join(parts) == tokenizer.decode(ids, skip_control=skip_control)
        assert by_json.decode(ids, skip_control=skip_control) == by_model.decode(ids, skip_control=skip_control)


@settings(deadline=None, max_examples=300)
@given(ids=TOKEN_IDS)
def test_decoding_is_sentencepieces(
    by_json: Tokenizer, reference: sentencepiece.SentencePieceProcessor, ids: list[int]
) -> None:
    # SentencePiece writes " ⁇ " for the unknown token; here it is a control token like any other.
    ids = [token_id for token_id in ids if token_id != by_json.unk_id]
    assert by_json.decode(ids) == reference.decode(ids)


@settings(deadline=None)
@given(ids=TOKEN_IDS)
def test_nothing_is_held_back_but_unfinished_characters(by_json: Tokenizer, ids: list[int]) -> None:
    detokenizer = StreamDetokenizer(by_json)
    given_out = ""
    for count, token_id in enumerate(ids, start=1):
        given_out += detokenizer.push(token_id)
        whole = by_json.decode(ids[:count])
        assert whole.startswith(given_out)
        held_back = whole[len(given_out) :]
        assert held_back in ("", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd")
