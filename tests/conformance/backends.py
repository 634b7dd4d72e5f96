"""The backends that the conformance suite holds to the reference. A new engine joins with one line in `BACKENDS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from cases import aligned_bytes, divergence, reference
from hf_reference import Weights

from gemma2 import _kernels as kernels
from gemma2.config import Gemma2Config
from gemma2.cpu import CpuBackend
from gemma2.model import Gemma2ForCausalLM, TorchBackend, pack_linear_layers
from gemma2.quantization import PackedModel, packed_shapes
from gemma2.step import Backend, Logits, SequenceStep, StepBatch

Precision = Literal["float32", "bfloat16", "q8", "q4"]


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


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def packed_model(config: Gemma2Config, weights: Weights, weights_format: str) -> PackedModel:
    """These weights in the kernels' layout; each matrix is packed alone, so it is rounded as `rounded_weights` does."""
    runtime = kernels.Runtime(1)
    tensors: dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.float32]] = {}
    for name, shape in packed_shapes(config).items():
        fused = next((names for key, names in FUSED.items() if key in name), None)
        if fused is None:
            value = weights[name]
        else:
            key = next(key for key in FUSED if key in name)
            value = np.concatenate([weights[name.replace(key, part)] for part in fused])
        if value.ndim == 1:
            tensors[name] = value
        else:
            tensors[name] = aligned_bytes(kernels.matrix_bytes(weights_format, *shape))
            kernels.pack_matrix(runtime, np.ascontiguousarray(value), weights_format, tensors[name])
    return PackedModel(config=config, format=weights_format, tensors=tensors)


def _cpu(weights_format: str, isa: str, kv_cache: str = "auto") -> Callable[[Gemma2Config, Weights], Backend]:
    return lambda config, weights: CpuBackend(
        packed_model(config, weights, weights_format), num_threads=2, isa=isa, kv_cache=kv_cache
    )


BACKENDS = (
    BackendSpec("torch-float32", "float32", _torch(torch.float32, "cpu")),
    BackendSpec("torch-bfloat16", "bfloat16", _torch(torch.bfloat16, "cpu")),
    BackendSpec("torch-bfloat16-packed", "bfloat16", _packed),
    BackendSpec("torch-float32-cuda", "float32", _torch(torch.float32, "cuda"), device="cuda"),
    BackendSpec("torch-bfloat16-cuda", "bfloat16", _torch(torch.bfloat16, "cuda"), device="cuda"),
    *(
        BackendSpec(f"cpu-{precision}-{isa}", precision, _cpu(precision, isa))
        for precision in get_args(Precision)
        for isa in kernels.available_isas()
    ),
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

INT8_NOISE = 16.0
"""Activations in int8 with a scale for 64 values are off by max / (127 · √12), about 0.55% of their mean square root;
bf16 is off by 0.14%. Divergence goes with the square."""


def excess(
    precision: Precision, config: Gemma2Config, logits: Logits, *, length: int | None = None, seed: int = 0
) -> float:
    """How far logits are off, as a multiple of what is allowed: at most 1 conforms.

    The logits are those of all positions of `token_ids`; or of the first ones, if the sequence of `length` tokens was
    cut off there, as later tokens change nothing.

    float32: the largest difference from transformers' float64 self, over twice transformers' own. bfloat16: the mean
    KL divergence from it, over transformers' own in bf16 and `BFLOAT16_NOISE`. q8 and q4: likewise with the weights
    that the format holds, over `INT8_NOISE`.
    """
    expected = reference(config, length or len(logits), seed, precision)
    expected_logits = expected.logits[: len(logits)]
    assert logits.shape == expected_logits.shape and logits.dtype == np.float32
    if precision == "float32":
        return float(np.abs(logits - expected_logits).max()) / expected.tolerance
    noise = BFLOAT16_NOISE if precision == "bfloat16" else INT8_NOISE
    return divergence(expected_logits, logits) / (expected.bfloat16_divergence * noise)
