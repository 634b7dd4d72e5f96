"""The backends that the conformance suite holds to the reference. A new engine joins with one line in `BACKENDS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from cases import divergence, reference
from hf_reference import Weights

from gemma2.config import Gemma2Config
from gemma2.model import Gemma2ForCausalLM, TorchBackend, pack_linear_layers
from gemma2.step import Backend, Logits, SequenceStep, StepBatch

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BackendSpec:
    """How to make a backend, and how exact it must be."""

    name: str
    precision: Precision
    make: Callable[[Gemma2Config, Weights], Backend]
    device: str = "cpu"


def torch_model(
    config: Gemma2Config, weights: Weights, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Gemma2ForCausalLM:
    """Our model with these weights."""
    model = Gemma2ForCausalLM(config, dtype=dtype, device=device)
    with torch.no_grad():
        for name, value in weights.items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    return model


def _torch(dtype: torch.dtype, device: str) -> Callable[[Gemma2Config, Weights], Backend]:
    return lambda config, weights: TorchBackend(torch_model(config, weights, dtype, device))


def _packed(config: Gemma2Config, weights: Weights) -> Backend:
    """As `gemma2.load` makes it on a CPU."""
    model = torch_model(config, weights, torch.bfloat16)
    pack_linear_layers(model)
    return TorchBackend(model)


BACKENDS = (
    BackendSpec("torch-float32", "float32", _torch(torch.float32, "cpu")),
    BackendSpec("torch-bfloat16", "bfloat16", _torch(torch.bfloat16, "cpu")),
    BackendSpec("torch-bfloat16-packed", "bfloat16", _packed),
    BackendSpec("torch-float32-cuda", "float32", _torch(torch.float32, "cuda"), device="cuda"),
    BackendSpec("torch-bfloat16-cuda", "bfloat16", _torch(torch.bfloat16, "cuda"), device="cuda"),
)


def step(sequence_id: int, ids: Sequence[int] | npt.NDArray[np.int32], position: int, num_logits: int) -> SequenceStep:
    """One sequence's part of a batch."""
    return SequenceStep(
        sequence_id=sequence_id, token_ids=np.asarray(ids, dtype=np.int32), position=position, num_logits=num_logits
    )


def run_in_chunks(
    backend: Backend, ids: npt.NDArray[np.int32], chunks: Sequence[int], *, sequence_id: int = 0
) -> Logits:
    """Logits of all positions, with the sequence going through in chunks of these sizes; the last one repeats."""
    rows, position = [], 0
    for index in range(len(ids)):
        size = chunks[min(index, len(chunks) - 1)]
        part = ids[position : position + size]
        if not len(part):
            break
        rows.append(backend.forward(StepBatch(steps=(step(sequence_id, part, position, len(part)),))))
        position += len(part)
    backend.free(sequence_id)
    return np.concatenate(rows)


BFLOAT16_NOISE = 1.1
"""bf16 rounds thousands of times, at random; our divergence may be this multiple of transformers' for chance."""


def excess(
    precision: Precision, config: Gemma2Config, logits: Logits, *, length: int | None = None, seed: int = 0
) -> float:
    """How far logits are off, as a multiple of what is allowed: at most 1 conforms.

    The logits are those of all positions of `token_ids`; or of the first ones, if the sequence of `length` tokens was
    cut off there, as later tokens change nothing.

    float32: the largest difference from transformers' float64 self, over twice transformers' own. bfloat16: the mean
    KL divergence from it, over transformers' own in bf16 and `BFLOAT16_NOISE`.
    """
    expected = reference(config, length or len(logits), seed)
    expected_logits = expected.logits[: len(logits)]
    assert logits.shape == expected_logits.shape and logits.dtype == np.float32
    if precision == "float32":
        return float(np.abs(logits - expected_logits).max()) / expected.tolerance
    return divergence(expected_logits, logits) / (expected.bfloat16_divergence * BFLOAT16_NOISE)
