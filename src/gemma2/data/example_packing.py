"""Rows of whole examples: in which order they come, which share a row, and how a row is laid out.

Nothing is split. A row begins with the example that has waited longest, and then takes the longest that fits, of the
next `LOOKAHEAD` in the order, until none fits. So every epoch has rows of its own, all of its examples come once, and
an example is never far from its place in the order.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2.data.packing import IGNORED_LABEL, PADDING_SEGMENT, PackedBatch
from gemma2.data.tokenized import TokenizedExamples

LOOKAHEAD: Final = 1024
"""How many examples the packer may choose from to fill a row."""
PAD_MULTIPLE: Final = 64
"""Rows of one example each are padded to a multiple of so many places, so that a batch has one of few widths."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """Which examples stand in which row."""

    examples: npt.NDArray[np.int64]
    """(E,) int64: the examples, row by row."""
    starts: npt.NDArray[np.int64]
    """(R + 1,) int64: where in `examples` each row begins, and where the last one ends."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.starts) - 1

    def rows(self, first: int, last: int) -> list[npt.NDArray[np.int64]]:
        """The examples of each of the rows `first` … `last` - 1, as far as there are so many."""
        last = min(last, self.num_rows)
        return [self.examples[self.starts[row] : self.starts[row + 1]] for row in range(first, last)]


def shuffled_order(num_examples: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """(E,) int64: an order of the examples that depends on the seed and the epoch alone."""
    # The bit generator and a stable sort, as numpy's own permutations may change between its versions.
    keys = np.random.Philox(key=seed | epoch << 64).random_raw(num_examples)
    return np.argsort(keys, kind="stable")


def plan_single_rows(order: npt.NDArray[np.int64]) -> RowPlan:
    """A row for each example."""
    return RowPlan(examples=order, starts=np.arange(len(order) + 1))


def plan_packed_rows(
    num_places: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    *,
    sequence_length: int,
    lookahead: int = LOOKAHEAD,
) -> RowPlan:
    """Fills rows with examples, best fit first.

    Args:
        num_places: (E,) int64: the places that each example takes; at least 1, at most `sequence_length`.
        order: (E,) int64: the order in which the examples come.
        sequence_length: places in a row.
        lookahead: how many examples there are to choose from.
    """
    total = len(order)
    places: list[int] = num_places[order].tolist()
    # The pool is sorted by places, and of equal ones the first to come stands last. One number holds both.
    pool: list[int] = []
    waiting: list[bool] = [True] * total
    arrived = oldest = 0
    rows: list[int] = []
    starts = [0]
    while len(rows) < total:
        while len(pool) < lookahead and arrived < total:
            insort(pool, places[arrived] * total + total - 1 - arrived)
            arrived += 1
        while not waiting[oldest]:
            oldest += 1
        index = bisect_right(pool, places[oldest] * total + total - 1 - oldest) - 1
        room = sequence_length
        while index >= 0:
            needed, rest = divmod(pool.pop(index), total)
            place = total - 1 - rest
            waiting[place] = False
            rows.append(place)
            room -= needed
            index = bisect_right(pool, (room + 1) * total - 1) - 1
        starts.append(len(rows))
    return RowPlan(examples=order[np.array(rows, dtype=np.int64)], starts=np.array(starts, dtype=np.int64))


def lay_out_rows(
    examples: TokenizedExamples, rows: Sequence[npt.NDArray[np.int64]], *, num_rows: int, width: int
) -> PackedBatch:
    """Lays out rows as arrays. The two sequences of a pair are neighbours, the chosen one with the odd segment id.

    Args:
        examples: of all rows.
        rows: the examples of each row; at most `num_rows` rows.
        num_rows: B; rows that are missing become padding.
        width: L.
    """
    shape = (num_rows, width)
    input_ids = np.full(shape, examples.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segment_ids = np.full(shape, PADDING_SEGMENT, dtype=np.int64)
    each = examples.sequences_per_example
    for row, members in enumerate(rows):
        sequences = [int(example) * each + side for example in members for side in range(each)]
        first = 0
        for segment, sequence in enumerate(sequences, start=1):
            read, said = examples.inputs_and_labels(sequence)
            end = first + len(read)
            input_ids[row, first:end] = read
            labels[row, first:end] = said
            positions[row, first:end] = np.arange(len(read))
            segment_ids[row, first:end] = segment
            first = end
    return PackedBatch(input_ids=input_ids, labels=labels, positions=positions, segment_ids=segment_ids)
