"""Sizes whose bytes no integer holds, and arrays that Python would have to copy: refused before any memory is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attention_reference import aligned

from gemma2 import _kernels as kernels


@pytest.mark.parametrize(
    "make",
    [
        # Each product of sizes is 0 modulo 2^64, which an empty array would fit.
        lambda: kernels.matrix_bytes("q8", 2**63 - 1, 2**63 - 1),
        lambda: kernels.Matrix("float32", 2**57, 64, aligned(0)),
        lambda: kernels.Matrix("q4", 64, 2**60, aligned(0)),
        lambda: kernels.KVCache("int8", 1, 64, 2**58, aligned(0)),
        lambda: kernels.KVCache("float32", 2**58, 64, 1, aligned(0)),
        lambda: kernels.KVCache.block_bytes("int8", 2**60, 64),
        lambda: kernels.Activations("float32", 2**56, 64),
        lambda: kernels.Activations("bfloat16", 64, 2**57),
    ],
)
def test_sizes_beyond_integers(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"at most|must be from 1 to"):
        make()


def test_the_largest_sizes_that_are_let_through_do_not_overflow() -> None:
    assert kernels.matrix_bytes("float32", 2**30, 2**30) == 2**62
    assert 0 < kernels.KVCache.block_bytes("float32", 4096, 1024) * (2**31 - 1) < 2**63
    with pytest.raises(ValueError, match="memory: axis 0 must be"):
        kernels.KVCache("float32", 4096, 1024, 2**31 - 1, aligned(0))


def test_sums_of_blocks_longer_than_any_array() -> None:
    runtime, x, sums = kernels.Runtime(1), np.ones(5, np.float32), np.empty(1)
    kernels.block_sums(runtime, x, 2**63 - 1, sums)
    assert sums == [5]
    with pytest.raises(ValueError, match="out: axis 0 must be 1, but is 0"):
        kernels.block_sums(runtime, x, 2**63 - 1, sums[:0])


@pytest.mark.parametrize(
    "data", [aligned(2 * 8192)[::2], aligned(8192).view(np.int8), aligned(4 * 8192).view(np.int32)]
)
def test_a_matrix_is_never_made_over_a_copy(data: Any) -> None:
    """Nobody would keep the copy: the matrix would read memory that was given back."""
    for _ in range(20):  # a copy may by chance lie at a multiple of 64 bytes
        with pytest.raises(TypeError, match="incompatible function arguments"):
            kernels.Matrix("float32", 1, 1, data)
