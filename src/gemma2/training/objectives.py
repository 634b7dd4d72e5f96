"""Objectives: functions of a model and a batch that give a loss to minimize. The loop knows nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma2.data import PackedBatch
from gemma2.model.modeling import Gemma2ForCausalLM
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
"""Returns the summed loss of a batch's labels, in nats; the loop divides by their number over the whole step."""


def next_token_objective(*, compute_dtype: torch.dtype, compiled: bool) -> Objective:
    """Cross-entropy of the next token under the final cap.

    Args:
        compute_dtype: dtype of matrix products, float32 or bfloat16.
        compiled: whether the passes over the vocabulary are fused by torch.compile.
    """

    def objective(model: Gemma2ForCausalLM, batch: Batch) -> Tensor:
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
            hidden_BLD = model.model(batch.input_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids)
        return linear_cross_entropy(
            hidden_BLD.flatten(0, 1),
            model.lm_head.weight,
            batch.labels.flatten(),
            cap=model.config.final_logit_softcapping,
            compute_dtype=compute_dtype,
            compiled=compiled,
        )

    return objective
