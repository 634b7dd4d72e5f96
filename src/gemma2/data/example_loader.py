"""`ExampleLoader`: tokenized examples as batches, epoch after epoch, stopped and resumed at any batch.

All processes plan the same rows and take their share of each batch, so that the rows of a step, and which rows come
when, do not depend on how many processes there are. What comes next depends on the examples and the settings alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2.data.example_packing import (
    PAD_MULTIPLE,
    RowPlan,
    lay_out_rows,
    plan_packed_rows,
    plan_single_rows,
    shuffled_order,
)
from gemma2.data.fingerprint import check_same_fingerprint
from gemma2.data.packing import PackedBatch
from gemma2.data.shuffling import State
from gemma2.data.tokenized import TokenizedExamples
from gemma2.errors import DataError

_STATE_VERSION: Final = 1


class ExampleLoader(Iterator[PackedBatch]):
    """Batches of whole examples, for fine-tuning.

    Every example comes once in each epoch, and no batch has examples of two epochs: the last one of an epoch is filled
    up with rows of padding. Batch g of the run is rows g * W * B to (g + 1) * W * B - 1 of its epoch, of which each of
    W processes takes B that stand together.

    Args:
        examples: from `tokenize_examples`; pairs come as two neighbouring segments of a row, 2k - 1 and 2k.
        batch_size: B, rows of this process in a batch.
        packing: whether examples share rows of `examples.sequence_length` places. If not, each has a row, as wide as
            the longest of all processes needs, rounded up to a multiple of 64 but no more than `sequence_length`.
        shuffle: whether each epoch has an order of its own; if not, all have that of the files.
        seed: from 0 to 2**64 - 1; sets the orders.
        num_epochs: how often the examples come; None is without end.
        rank: this process among `world_size`.
        world_size: W, how many processes share each batch. All have the same number of batches, of one shape.

    Raises:
        DataError: a setting is out of range.
    """

    def __init__(
        self,
        examples: TokenizedExamples,
        *,
        batch_size: int,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        num_epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in {"batch_size": batch_size, "num_epochs": num_epochs, "world_size": world_size}.items():
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, but is {value}")
        if not 0 <= seed < 1 << 64:
            raise DataError(f"seed must be from 0 to 2**64 - 1, but is {seed}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, but is {rank}")
        self.examples = examples
        self.num_epochs = num_epochs
        self._batch_size = batch_size
        self._packing = packing
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._fingerprint = json.dumps(
            {"packing": packing, "shuffle": shuffle, "seed": seed, **examples.fingerprint}, ensure_ascii=False
        )
        self._plans: dict[int, RowPlan] = {}
        """The plan of one epoch."""
        self._num_rows: dict[int, int] = {}
        self._epoch = 0
        self._row = 0
        """Rows of the epoch that were returned, of all processes."""

    @property
    def epoch(self) -> int:
        """The epoch of the last batch, from 0."""
        return self._epoch

    @property
    def examples_seen(self) -> int:
        """Examples in the batches that were returned, those of all processes, in all epochs."""
        return self._epoch * len(self.examples) + len(self._seen())

    @property
    def tokens_seen(self) -> int:
        """Labels in the batches that were returned, those of all processes, in all epochs."""
        by_example = self.examples.num_trained
        return self._epoch * int(by_example.sum()) + int(by_example[self._seen()].sum())

    @property
    def total_batches(self) -> int | None:
        """Batches of all epochs; None if they are without end."""
        if self.num_epochs is None:
            return None
        return sum(self.num_batches(epoch) for epoch in range(self.num_epochs))

    @property
    def batches_left(self) -> int | None:
        """Batches that are still to come; None if they are without end."""
        if self.num_epochs is None:
            return None
        if self._epoch >= self.num_epochs:
            return 0
        later = sum(self.num_batches(epoch) for epoch in range(self._epoch + 1, self.num_epochs))
        return later + self._count_batches(self.num_rows(self._epoch) - self._row)

    def num_rows(self, epoch: int) -> int:
        """The rows of an epoch, of all processes, without those of padding."""
        if not self._packing:
            return len(self.examples)
        if epoch not in self._num_rows:
            self._num_rows[epoch] = self._plan(epoch).num_rows
        return self._num_rows[epoch]

    def num_batches(self, epoch: int) -> int:
        """The batches of an epoch, the same for all processes."""
        return self._count_batches(self.num_rows(epoch))

    def __next__(self) -> PackedBatch:
        epoch, row = self._epoch, self._row
        if row >= self.num_rows(epoch):
            epoch, row = epoch + 1, 0
        if self.num_epochs is not None and epoch >= self.num_epochs:
            raise StopIteration
        plan = self._plan(epoch)
        rows_per_step = self._batch_size * self._world_size
        own = row + self._rank * self._batch_size
        batch = lay_out_rows(
            self.examples,
            plan.rows(own, own + self._batch_size),
            num_rows=self._batch_size,
            width=self._width(plan.rows(row, row + rows_per_step)),
        )
        self._epoch, self._row = epoch, min(row + rows_per_step, plan.num_rows)
        return batch

    def state_dict(self) -> State:
        """The state after the last batch that was returned: the same few numbers and one string in all processes."""
        return {
            "version": _STATE_VERSION,
            "fingerprint": self._fingerprint,
            "epoch": self._epoch,
            "row": self._row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch at which `state_dict` was taken, in any process.

        `batch_size`, `world_size` and `num_epochs` may have changed: the rows that follow are the same. Files may lie
        in another folder.

        Args:
            state: from `state_dict`, also after a round trip through JSON or npz.

        Raises:
            DataError: the state is damaged, or belongs to other settings, files or another tokenizer.
        """
        try:
            version = int(state["version"])
            if version != _STATE_VERSION:
                raise DataError(f"the loader's state has version {version}, but only {_STATE_VERSION} can be read")
            check_same_fingerprint(str(state["fingerprint"]), self._fingerprint)
            epoch, row = int(state["epoch"]), int(state["row"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"this is no state of an ExampleLoader, or a damaged one: {error!r}") from None
        if epoch < 0 or not 0 <= row <= self.num_rows(epoch):
            raise DataError(f"the loader's state is damaged: there is no row {row} in epoch {epoch}")
        self._epoch, self._row = epoch, row

    def _count_batches(self, num_rows: int) -> int:
        return -(-num_rows // (self._batch_size * self._world_size))

    def _seen(self) -> npt.NDArray[np.int64]:
        """The examples of this epoch in the batches that were returned."""
        plan = self._plan(self._epoch)
        return plan.examples[: plan.starts[self._row]]

    def _width(self, rows: list[npt.NDArray[np.int64]]) -> int:
        length = self.examples.sequence_length
        if self._packing:
            return length
        longest = max(int(self.examples.num_places[members].sum()) for members in rows)
        return min(length, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)

    def _plan(self, epoch: int) -> RowPlan:
        if epoch not in self._plans:
            total = len(self.examples)
            order = shuffled_order(total, seed=self._seed, epoch=epoch) if self._shuffle else np.arange(total)
            if self._packing:
                plan = plan_packed_rows(self.examples.num_places, order, sequence_length=self.examples.sequence_length)
            else:
                plan = plan_single_rows(order)
            self._plans = {epoch: plan}
            self._num_rows[epoch] = plan.num_rows
        return self._plans[epoch]
