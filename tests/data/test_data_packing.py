"""Slices never change the tokens; pieces hold each token once; rows waste next to nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pytest
from corpus import BOS, PAD, random_text, segments

from gemma2.data.packing import Piece, batch_rows, cut_length, encode_slices, pack_rows, smallest_piece


def runs(text: str) -> list[int]:
    """A tokenizer with one token for every run of newlines, and for every word with the spaces before it."""
    return [hash(word) for word in re.findall(r"[\r\n]+| *[^ \r\n]+| +", text)]


@pytest.mark.parametrize("min_characters", [0, 1, 2, 7, 100, 10_000])
def test_slices_encode_as_the_whole(min_characters: int) -> None:
    generator = random.Random(min_characters)
    for _ in range(50):
        text = random_text(generator, 400)
        slices = list(encode_slices(text, runs, min_characters=min_characters))
        assert [token for ids, _ in slices for token in ids] == runs(text)
        assert slices[-1][1] == len(text)
        for number, (_, end) in enumerate(slices):
            rest = list(encode_slices(text, runs, start=end, min_characters=min_characters))
            assert rest == slices[number + 1 :]


def test_slices_are_short_but_never_cut_a_run_of_newlines() -> None:
    text = "one\r\n\r\ntwo\n\n\nthree\r\rfour"
    ends = [end for _, end in encode_slices(text, runs, min_characters=0)]
    assert [text[start:end] for start, end in zip([0, *ends], ends, strict=False)] == [
        "one\r\n\r\n",
        "two\n\n\n",
        "three\r\r",
        "four",
    ]
    # The wanted length falls into the middle of the first run.
    assert next(encode_slices(text, runs, min_characters=4))[1] == 7


def test_a_newline_at_the_end_belongs_to_the_last_slice() -> None:
    assert [end for _, end in encode_slices("a\nb\n\n", runs, min_characters=0)] == [2, 5]


def cut(num_tokens: int, sequence_length: int, generator: random.Random | None = None) -> list[int]:
    """Lengths of the pieces; with `generator` the tokens become known little by little."""
    lengths, known, cut_so_far = [], num_tokens if generator is None else 0, 0
    while True:
        last = known == num_tokens
        while length := cut_length(known - cut_so_far, sequence_length=sequence_length, last=last):
            lengths.append(length)
            cut_so_far += length
        if last:
            return lengths
        assert generator is not None
        known = min(num_tokens, known + generator.randint(1, 3 * sequence_length))


def test_pieces_are_full_but_for_the_end() -> None:
    assert cut(1, 512) == [1]
    assert cut(512, 512) == [512]
    assert cut(1500, 512) == [512, 512, 476]
    # One token alone would follow <bos> without any context.
    assert cut(513, 512) == [257, 256]
    assert cut(1025, 512) == [512, 257, 256]
    assert cut(3, 1) == [1, 1, 1]


@pytest.mark.parametrize("sequence_length", [1, 2, 16, 300])
def test_pieces_do_not_depend_on_when_tokens_become_known(sequence_length: int) -> None:
    generator = random.Random(sequence_length)
    for num_tokens in range(1, 4 * sequence_length + 9):
        lengths = cut(num_tokens, sequence_length)
        assert sum(lengths) == num_tokens
        assert max(lengths) <= sequence_length
        assert min(lengths) >= min(num_tokens, smallest_piece(sequence_length))
        assert cut(num_tokens, sequence_length, generator) == lengths


def numbered(lengths: list[int]) -> list[Piece]:
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for length, end in zip(lengths, ends, strict=True)]


def row_lengths(lengths: list[int], sequence_length: int) -> list[list[int]]:
    return [[len(piece) for piece in row] for row in pack_rows(numbered(lengths), sequence_length=sequence_length)]


def test_the_oldest_piece_comes_first_and_then_the_best_fit() -> None:
    assert row_lengths([6, 8, 3, 4, 7, 2, 10], 10) == [[6, 4], [8, 2], [3, 7], [10]]


def test_where_nothing_fits_a_piece_is_split_and_its_rest_comes_later() -> None:
    rows = list(pack_rows(numbered([7, 8, 9]), sequence_length=10))
    assert [[piece.tolist() for piece in row] for row in rows] == [
        [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9]],
        [[15, 16, 17, 18, 19, 20, 21, 22, 23], [10]],
        [[11, 12, 13, 14]],
    ]


LENGTHS: dict[str, Callable[[random.Random], list[int]]] = {
    "long documents": lambda g: cut(g.randint(5_000, 100_000), 512),
    "short documents": lambda g: [g.randint(1, 200)],
    "just over half a row": lambda g: [257],
    "three fifths of a row": lambda g: [308],
    "just under a row": lambda g: [510],
    "tiny ones": lambda g: [12],
    "all sizes": lambda g: cut(int(2 ** g.uniform(0, 14)), 512),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_rows_are_full_and_hold_each_token_once(kind: str) -> None:
    generator = random.Random(3)
    lengths: list[int] = []
    num_tokens = 0
    while num_tokens < 300_000:
        lengths += (more := LENGTHS[kind](generator))
        num_tokens += sum(more)
    rows = list(pack_rows(numbered(lengths), sequence_length=512))
    assert all(sum(len(piece) for piece in row) <= 512 for row in rows)
    tokens = np.concatenate([piece for row in rows for piece in row])
    assert np.array_equal(np.sort(tokens), np.arange(num_tokens))
    # The last row ends for want of pieces.
    filled = sum(len(piece) for row in rows[:-1] for piece in row) / (512 * (len(rows) - 1))
    assert filled > 0.98
    if "long" in kind:
        assert filled > 0.999
        assert sum(len(row) for row in rows) < 1.1 * len(lengths), "few pieces are split"


def test_arrays_of_a_batch() -> None:
    rows = [[np.array([5, 6, 7], dtype=np.int32), np.array([8], dtype=np.int32)], [np.array([9, 1], dtype=np.int32)]]
    batch = batch_rows(rows, num_rows=3, sequence_length=5, bos_id=BOS, pad_id=PAD)
    assert batch.input_ids.tolist() == [[2, 5, 6, 2, 0], [2, 9, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[5, 6, 7, 8, -100], [9, 1, -100, -100, -100], [-100] * 5]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.num_tokens == 6
    assert {array.dtype for array in vars(batch).values()} == {np.dtype(np.int64)}
    assert segments([batch]) == [[5, 6, 7], [8], [9, 1]]
