"""Every byte that is counted is a label once, so that bits per byte are right."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from corpus import EOS, assert_same, decode, encode, random_texts, segments, write_jsonl

from gemma2.data import ValidationSet, tokenize_for_validation
from gemma2.errors import DataError

TEXTS = [text + "é\r\n" for text in random_texts(seed=9, count=12, longest=500)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "x.jsonl", TEXTS)


def labels(found: ValidationSet) -> list[int]:
    return sorted(token for segment in segments(found.batches) for token in segment)


def test_all_text_is_there_once(file: Path) -> None:
    found = tokenize_for_validation(file, encode, sequence_length=64, batch_size=4)
    assert found.num_documents == len(TEXTS)
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.num_tokens == found.num_bytes + len(TEXTS) == sum(batch.num_tokens for batch in found.batches)
    assert labels(found) == sorted(token for text in TEXTS for token in [*encode(text), EOS])
    assert {batch.input_ids.shape for batch in found.batches} == {(4, 64)}


def test_a_model_that_guesses_bytes_evenly_needs_eight_bits(file: Path) -> None:
    found = tokenize_for_validation(file, encode, sequence_length=64, batch_size=4)
    nats = sum(math.log(256) for label in labels(found) if label != EOS)
    assert nats / math.log(2) / found.num_bytes == pytest.approx(8)


def test_it_is_the_same_each_time(file: Path) -> None:
    first, second = (tokenize_for_validation(file, encode, sequence_length=50, batch_size=3) for _ in range(2))
    for left, right in zip(first.batches, second.batches, strict=True):
        assert_same(left, right)


def test_newlines_change_the_bytes(file: Path) -> None:
    found = tokenize_for_validation(file, encode, sequence_length=64, batch_size=4, newlines="lf")
    texts = [re.sub("\r\n?", "\n", text) for text in TEXTS]
    assert found.num_bytes == sum(len(text.encode()) for text in texts)
    assert labels(found) == sorted(token for text in texts for token in [*encode(text), EOS])


def test_max_documents(file: Path) -> None:
    found = tokenize_for_validation(file, encode, sequence_length=64, batch_size=4, max_documents=3)
    assert found.num_documents == 3
    assert labels(found) == sorted(token for text in TEXTS[:3] for token in [*encode(text), EOS])


def words(text: str) -> list[int]:
    """Four ids for a run of newlines, one for a word of any length."""
    return [
        i for word in re.findall(r"\s+|\S+", text) for i in ([7] * 4 if "\n" in word else [len(word.encode()) + 99])
    ]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 50, 300, 301, 1000, 10**9])
def test_max_tokens_counts_only_the_bytes_that_are_covered(file: Path, max_tokens: int) -> None:
    found = tokenize_for_validation(file, encode, sequence_length=64, batch_size=4, max_tokens=max_tokens)
    all_tokens = [token for text in TEXTS for token in [*encode(text), EOS]]
    assert min(max_tokens, len(all_tokens)) - 2 <= found.num_tokens <= max_tokens
    assert labels(found) == sorted(all_tokens[: found.num_tokens])
    assert found.num_bytes == sum(token != EOS for token in all_tokens[: found.num_tokens])
    # Nothing is cut within a character.
    decode(token for token in all_tokens[: found.num_tokens] if token != EOS)


@pytest.mark.parametrize("max_tokens", range(1, 60, 3))
def test_max_tokens_with_tokens_of_many_bytes(tmp_path: Path, max_tokens: int) -> None:
    text = "ein Wort\nund noch éines\r\n\r\nganzlangeswortohneende " * 3
    file = write_jsonl(tmp_path / "x.jsonl", [text])
    found = tokenize_for_validation(file, words, sequence_length=16, batch_size=1, max_tokens=max_tokens)
    assert found.num_tokens <= max_tokens
    covered = text.encode()[: found.num_bytes].decode()
    whole = covered == text
    assert labels(found) == sorted(words(covered) + [EOS] * whole)
    assert whole or found.num_tokens > max_tokens - 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, but is 0"),
        ({"max_documents": 0}, "max_documents must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_limits_are_checked(file: Path, setting: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_for_validation(file, encode, **{"sequence_length": 64, "batch_size": 4, **setting})  # type: ignore[arg-type]


def test_too_few_tokens_for_one_character(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", ["é"])
    with pytest.raises(DataError, match="max_tokens = 1 has no room for the first character"):
        tokenize_for_validation(file, encode, sequence_length=64, batch_size=4, max_tokens=1)


def test_the_end_of_a_document_counts_as_a_token_too(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", ["abc"])
    for max_tokens, expected in ((3, encode("ab")), (4, [*encode("abc"), EOS])):
        found = tokenize_for_validation(file, encode, sequence_length=64, batch_size=1, max_tokens=max_tokens)
        assert labels(found) == sorted(expected)
