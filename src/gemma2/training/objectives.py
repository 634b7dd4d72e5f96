"""Objectives: functions of a model and a batch that give a loss to minimize. The loop knows nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.data import PackedBatch
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.tensor_parallel import own_rows
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.head_loss import head_of
from gemma2.training.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A packed batch on the model's device; see `gemma2.data.PackedBatch`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor

    @classmethod
    def on_device(cls, packed: PackedBatch, device: torch.device) -> Batch:
        """Copies the four (B, L) int64 arrays to the device."""
        arrays = (packed.input_ids, packed.labels, packed.positions, packed.segment_ids)
        input_ids, labels, position_ids, segment_ids = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(input_ids=input_ids, labels=labels, position_ids=position_ids, segment_ids=segment_ids)

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` - 1."""
        return Batch(
            input_ids=self.input_ids[first:last],
            labels=self.labels[first:last],
            position_ids=self.position_ids[first:last],
            segment_ids=self.segment_ids[first:last],
        )


Objective = Callable[[Gemma2ForCausalLM, Batch], Tensor]
"""Returns the summed loss of a batch, in nats; the loop divides by the number of units over the whole step, which a
`CountUnits` counts: labels in most objectives, pairs for preferences."""

CountUnits = Callable[[PackedBatch], int]
"""How many units a batch's loss is the sum of."""


def count_labels(packed: PackedBatch) -> int:
    """The tokens that are trained on: the units of next-token prediction and of distillation."""
    return packed.num_tokens


class MetricSums:
    """What an objective reports beside its loss: sums since they were last taken, and what to divide them by.

    An objective that has something to report is given one when it is made. Whoever writes the log takes the means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Adds values, one for each unit, without waiting for the device."""
        total, count = self._sums.get(name, (torch.zeros((), dtype=torch.float64, device=values.device), 0))
        self._sums[name] = (total + values.detach().sum(dtype=torch.float64), count + values.numel())

    def take(self, ranks: Ranks = ONE_PROCESS) -> dict[str, float]:
        """The mean of each over the units since the last time, of all processes; nothing of those that had none."""
        totals: dict[str, tuple[float, int]] = {}
        for sums in ranks.gather({name: (float(total), count) for name, (total, count) in self._sums.items()}):
            for name, (total, count) in sums.items():
                before = totals.get(name, (0.0, 0))
                totals[name] = (before[0] + total, before[1] + count)
        self._sums.clear()
        return {name: total / count for name, (total, count) in totals.items() if count}


def last_hidden_states(model: Gemma2ForCausalLM, batch: Batch, compute_dtype: torch.dtype) -> Tensor:
    """(B, L, D) hidden states after the last norm.

    Args:
        model: with weights of any dtype.
        batch: the tokens.
        compute_dtype: dtype of matrix products, float32 or bfloat16.
    """
    is_mixed = compute_dtype == torch.bfloat16 and model.model.embed_tokens.weight.dtype == torch.float32
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=is_mixed):
        hidden_BLD: Tensor = model.model(
            batch.input_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids
        )
    return hidden_BLD


def next_token_objective(*, compute_dtype: torch.dtype, compiled: bool) -> Objective:
    """Cross-entropy of the next token under the final cap.

    Args:
        compute_dtype: dtype of matrix products, float32 or bfloat16.
        compiled: whether the passes over the vocabulary are fused by torch.compile.
    """

    def objective(model: Gemma2ForCausalLM, batch: Batch) -> Tensor:
        head = head_of(model)
        rows_VD, part = own_rows(model.lm_head.weight) if head is None else (head, None)
        return linear_cross_entropy(
            last_hidden_states(model, batch, compute_dtype).flatten(0, 1),
            rows_VD,
            batch.labels.flatten(),
            cap=model.config.final_logit_softcapping,
            compute_dtype=compute_dtype,
            compiled=compiled,
            part=part,
        )

    return objective
