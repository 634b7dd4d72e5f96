"""From documents to rows: encoding in slices, cutting into pieces, and packing pieces into rows of one length.

A document is its tokens followed by <eos>. It is cut into pieces, and every piece, also one from the middle of a
document, becomes a segment that begins with <bos>: at inference whatever the model reads begins with <bos>, so that
training windows must too. A piece of n tokens t1 … tn takes n places in a row:

    input_ids   <bos>  t1  t2  …  tn-1
    labels        t1   t2  t3  …   tn
    positions      0    1   2  …  n-1

Each token of a document is thus a label exactly once, the last token of a segment needs no place of its own, and a row
loses nothing at the border between two segments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

Encode = Callable[[str], list[int]]
"""Turns a text into token ids, without <bos>."""
Piece = npt.NDArray[np.int32]
"""(n,) int32, n >= 1: tokens of one document that stand together, without <bos>."""

IGNORED_LABEL: Final = -100
PADDING_SEGMENT: Final = 0
LOOKAHEAD: Final = 128
"""How many pieces the packer may choose from to fill a row."""

_SLICE_CHARACTERS: Final = 16384
_NEWLINES: Final = re.compile(r"[\r\n]+")


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows of one length, each packed with segments that must not see each other."""

    input_ids: npt.NDArray[np.int64]
    """(B, L) int64: every segment begins with <bos>; padding, only ever at a row's end, is the padding id."""
    labels: npt.NDArray[np.int64]
    """(B, L) int64: the token that follows each place, already shifted; -100 in padding."""
    positions: npt.NDArray[np.int64]
    """(B, L) int64: restart at 0 in each segment; 0 in padding."""
    segment_ids: npt.NDArray[np.int64]
    """(B, L) int64: 1, 2, … for the segments of a row; 0 in padding. Attention stays within equal ids."""

    @property
    def num_tokens(self) -> int:
        """How many places have a label."""
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))

    def rows(self, first: int, last: int) -> PackedBatch:
        """Rows `first` … `last` - 1, sharing the memory."""
        if (first, last) == (0, len(self.input_ids)):
            return self
        return PackedBatch(
            input_ids=self.input_ids[first:last],
            labels=self.labels[first:last],
            positions=self.positions[first:last],
            segment_ids=self.segment_ids[first:last],
        )


def smallest_piece(sequence_length: int) -> int:
    """The fewest tokens that a cut may leave on either side: with less context there is nothing to learn."""
    return max(1, sequence_length // 128)


def encode_slices(
    text: str, encode: Encode, *, start: int = 0, min_characters: int = _SLICE_CHARACTERS
) -> Iterator[tuple[list[int], int]]:
    """Encodes a long text in slices, so that memory and the wait for the first token stay small.

    Slices end after a run of newlines (LF, CR in any mixture), never within one, as tokenizers such as Gemma's have
    tokens for whole runs. For a tokenizer without tokens that reach across the end of such a run, the slices' ids
    together are the ids of the whole text. A text without newlines is one slice.

    Args:
        text: the text.
        encode: the tokenizer.
        start: the character to begin at: 0, or an end that was yielded before.
        min_characters: a slice ends with the first run of newlines that reaches beyond so many characters.

    Yields:
        The ids of a slice, and the character at which it ends.
    """
    while start < len(text):
        newlines = _NEWLINES.search(text, start + min_characters)
        end = newlines.end() if newlines else len(text)
        yield encode(text[start:end]), end
        start = end


def cut_length(num_tokens: int, *, sequence_length: int, last: bool) -> int:
    """Says how long the next piece of a document is.

    Pieces are `sequence_length` long except for the last one or, where that would be shorter than `smallest_piece`,
    the last two, which then share their tokens evenly.

    Args:
        num_tokens: tokens of the document that are known and in no piece yet.
        sequence_length: the most tokens in a piece.
        last: whether the document ends with them.

    Returns:
        The length, or 0 where more tokens must be known first, or none are left.
    """
    if num_tokens >= sequence_length + smallest_piece(sequence_length):
        return sequence_length
    if not last:
        return 0
    return num_tokens if num_tokens <= sequence_length else (num_tokens + 1) // 2


def pack_row(pool: list[Piece], *, sequence_length: int) -> list[Piece]:
    """Takes the pieces of one row out of `pool`: best fit, and where nothing fits a piece is split.

    The oldest piece comes first, so that none waits for ever. Then the longest piece that fits is added until none
    fits; the oldest piece that can be split then fills the row, and its rest goes to the end of the pool. While the
    pool is not empty less than 2 * smallest_piece(sequence_length) places stay unused: under 1.6 percent.

    Args:
        pool: pieces of at most `sequence_length` tokens, oldest first; changed in place.
        sequence_length: the number of places in the row.

    Returns:
        The pieces of the row, in order.
    """
    if not pool:
        return []
    smallest = smallest_piece(sequence_length)
    row = [pool.pop(0)]
    room = sequence_length - len(row[0])
    lengths = [len(piece) for piece in pool]
    while best := max((length for length in lengths if length <= room), default=0):
        index = lengths.index(best)
        del lengths[index]
        row.append(pool.pop(index))
        room -= best
    # All that is left is longer than the room, and each part of a split needs `smallest` tokens.
    for index, length in enumerate(lengths):
        cut = min(room, length - smallest)
        if cut >= smallest:
            piece = pool.pop(index)
            row.append(piece[:cut])
            pool.append(piece[cut:])
            break
    return row


def pack_rows(pieces: Iterable[Piece], *, sequence_length: int) -> Iterator[list[Piece]]:
    """Packs pieces into rows until none is left, with `LOOKAHEAD` of them to choose from at a time."""
    arriving = iter(pieces)
    pool = list(islice(arriving, LOOKAHEAD))
    while pool:
        yield pack_row(pool, sequence_length=sequence_length)
        pool += islice(arriving, LOOKAHEAD - len(pool))


def batch_rows(
    rows: Sequence[Sequence[Piece]], *, num_rows: int, sequence_length: int, bos_id: int, pad_id: int
) -> PackedBatch:
    """Lays out rows of pieces as arrays.

    Args:
        rows: the pieces of each row; at most `num_rows` rows.
        num_rows: B; rows that are missing become padding.
        sequence_length: L.
        bos_id: goes before each piece.
        pad_id: goes where no piece is.
    """
    shape = (num_rows, sequence_length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segment_ids = np.full(shape, PADDING_SEGMENT, dtype=np.int64)
    for row, pieces in enumerate(rows):
        first = 0
        for segment, piece in enumerate(pieces, start=1):
            end = first + len(piece)
            input_ids[row, first] = bos_id
            input_ids[row, first + 1 : end] = piece[:-1]
            labels[row, first:end] = piece
            positions[row, first:end] = np.arange(len(piece))
            segment_ids[row, first:end] = segment
            first = end
    return PackedBatch(input_ids=input_ids, labels=labels, positions=positions, segment_ids=segment_ids)
