"""A small random model for tests of the CPU engine, and helpers that run it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.config import Gemma2Config
from gemma2.cpu import CpuBackend
from gemma2.quantization import PackedModel, packed_shapes
from gemma2.step import Logits, SequenceStep, StepBatch

CONFIG = Gemma2Config(
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    vocab_size=300,
    sliding_window=80,
    max_position_embeddings=1024,
)
"""The window is more than two blocks of the cache; the widths are no multiples of what the kernels like."""


@functools.cache
def random_model(weights: str, config: Gemma2Config = CONFIG) -> PackedModel:
    """Random weights, packed; norms' weights are not 0."""
    generator, runtime = np.random.default_rng(1), kernels.Runtime(1)
    tensors: dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.float32]] = {}
    for name, shape in packed_shapes(config).items():
        deviation = 0.3 if len(shape) == 1 else 2.0 * shape[1] ** -0.5
        value = generator.normal(0.0, deviation, shape).astype(np.float32)
        if len(shape) == 1:
            tensors[name] = value
        else:
            size = kernels.matrix_bytes(weights, *shape)
            whole = np.zeros(size + 64, dtype=np.uint8)
            packed = whole[-whole.ctypes.data % 64 :][:size]
            kernels.pack_matrix(runtime, value, weights, packed)
            tensors[name] = packed
    return PackedModel(config=config, format=weights, tensors=tensors)


def make_backend(weights: str = "q4", config: Gemma2Config = CONFIG, **options: Any) -> CpuBackend:
    """A backend over random weights of this format, always the same."""
    return CpuBackend(random_model(weights, config), **{"num_threads": 2, **options})


def ids(length: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).astype(np.int32)


def run(backend: CpuBackend, *parts: tuple[int, npt.NDArray[np.int32], int], num_logits: int | None = None) -> Logits:
    """Runs one step of several (sequence id, token ids, position); logits of all tokens unless told otherwise."""
    steps = [
        SequenceStep(
            sequence_id=sequence_id,
            token_ids=token_ids,
            position=position,
            num_logits=len(token_ids) if num_logits is None else num_logits,
        )
        for sequence_id, token_ids, position in parts
    ]
    return backend.forward(StepBatch(steps=tuple(steps)))


def run_in_chunks(
    backend: CpuBackend, token_ids: npt.NDArray[np.int32], sizes: Sequence[int], sequence_id: int = 0
) -> Logits:
    """Logits of all tokens of a sequence that goes through in chunks of these sizes; the last one repeats."""
    rows, position, index = [], 0, 0
    while position < len(token_ids):
        part = token_ids[position : position + sizes[min(index, len(sizes) - 1)]]
        rows.append(run(backend, (sequence_id, part, position)))
        position += len(part)
        index += 1
    return np.concatenate(rows)
