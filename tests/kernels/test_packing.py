"""Packing: the layouts of kernels/matrix.h, written out in numpy, and how well weights are rounded."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels as kernels

FORMATS = ("float32", "bfloat16", "q8", "q4")
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def aligned(num_bytes: int) -> Bytes:
    memory = np.full(num_bytes + 64, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def pack(
    weights: npt.NDArray[Any],
    weight_format: str,
    *,
    isa: str = "auto",
    num_threads: int = 1,
    importance: Floats | None = None,
) -> Bytes:
    out = aligned(kernels.matrix_bytes(weight_format, *weights.shape))
    kernels.pack_matrix(kernels.Runtime(num_threads, isa), weights, weight_format, out, importance)
    return out


def unpack(data: Bytes, weight_format: str, shape: tuple[int, ...], *, isa: str = "auto") -> Floats:
    matrix = kernels.Matrix(weight_format, *shape, data)
    return kernels.unpack_matrix(kernels.Runtime(1, isa), matrix)


def unpack_by_the_book(data: Bytes, weight_format: str, shape: tuple[int, int]) -> Floats:
    """The layout of kernels/matrix.h, read with numpy."""
    num_tiles, num_groups = -(-shape[0] // 32), -(-shape[1] // 64)
    if weight_format == "float32":
        full = data.view(np.float32).reshape(num_tiles, num_groups * 64, 32).transpose(0, 2, 1)
    elif weight_format == "bfloat16":
        pairs = data.view(ml_dtypes.bfloat16).reshape(num_tiles, num_groups * 32, 2, 16, 2)
        full = pairs.transpose(0, 2, 3, 1, 4).astype(np.float32)
    else:
        block_bytes = {"q8": 2112, "q4": 1088}[weight_format]
        blocks = data.reshape(num_tiles, num_groups, block_bytes)
        scales = np.ascontiguousarray(blocks[:, :, -64:]).view(np.float16).astype(np.float32)
        if weight_format == "q8":
            stored = np.ascontiguousarray(blocks[:, :, :-64]).view(np.int8).astype(np.float32)
            values = stored.reshape(num_tiles, num_groups, 2, 16, 16, 4)  # half, j, i, b
            values = values.transpose(0, 1, 2, 4, 3, 5)
        else:
            nibbles = blocks[:, :, :-64].reshape(num_tiles, num_groups, 2, 8, 16, 4)  # half, j, i, b
            codes = np.stack([nibbles & 15, nibbles >> 4], axis=5)  # half, j, i, low or high, b
            values = np.array(kernels.Q4_CODEBOOK, np.float32)[codes].transpose(0, 1, 2, 4, 3, 5, 6)
        full = values.reshape(num_tiles, num_groups, 32, 64) * scales[..., None]
        full = full.transpose(0, 2, 1, 3)
    full = full.reshape(num_tiles * 32, num_groups * 64)
    return np.ascontiguousarray(full[: shape[0], : shape[1]])


def normal(*shape: int, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).normal(size=shape) * 0.03).astype(np.float32)


def relative_error(weights: Floats, rounded: Floats) -> float:
    return float(np.sqrt(np.sum((weights - rounded) ** 2) / np.sum(weights**2)))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 63), (32, 64), (33, 65), (16, 128), (97, 200)])
def test_the_layout_is_that_of_the_book(weight_format: str, shape: tuple[int, int]) -> None:
    weights = normal(*shape)
    data = pack(weights, weight_format)
    by_the_book = unpack_by_the_book(data, weight_format, shape)
    np.testing.assert_array_equal(unpack(data, weight_format, shape), by_the_book)
    # A weight in a wrong place would be off by about its own size.
    tolerance = {"float32": 0, "bfloat16": 2**-8, "q8": 0.01, "q4": 0.2}[weight_format] * np.abs(weights).max()
    np.testing.assert_allclose(by_the_book, weights, rtol=0, atol=tolerance)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(weight_format: str) -> None:
    weights = normal(130, 200)
    importance = np.random.default_rng(1).uniform(0.1, 2, 200).astype(np.float32)
    reference = pack(weights, weight_format, isa="scalar", importance=importance)
    restored = unpack(reference, weight_format, weights.shape, isa="scalar")
    for isa in kernels.available_isas():
        for num_threads in (1, 2, 3):
            data = pack(weights, weight_format, isa=isa, num_threads=num_threads, importance=importance)
            np.testing.assert_array_equal(data, reference)
        np.testing.assert_array_equal(unpack(data, weight_format, weights.shape, isa=isa), restored)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_bfloat16_bits_are_packed_like_the_floats_that_they_are(weight_format: str) -> None:
    weights = normal(40, 70).astype(ml_dtypes.bfloat16)
    as_bits = pack(weights.view(np.uint16), weight_format)
    np.testing.assert_array_equal(as_bits, pack(weights.astype(np.float32), weight_format))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_ranges_of_rows_can_be_packed_one_by_one(weight_format: str) -> None:
    weights = normal(96, 100)
    whole = pack(weights, weight_format)
    parts = [pack(weights[start : start + 32], weight_format) for start in (0, 32, 64)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", kernels.available_isas())
def test_what_is_not_finite_is_refused_with_its_row(weight_format: str, value: float, isa: str) -> None:
    weights = normal(70, 70)
    weights[66, 69] = value
    with pytest.raises(ValueError, match="row 66 holds NaN"):
        pack(weights, weight_format, isa=isa)


def test_zeros_stay_zeros() -> None:
    weights = np.zeros((32, 128), np.float32)
    weights[3, 64:] = normal(1, 64)
    for weight_format in FORMATS:
        data = pack(weights, weight_format)
        restored = unpack(data, weight_format, weights.shape)
        assert not restored[:, :64].any()
        assert not np.delete(restored, 3, axis=0).any()


def test_bad_arguments() -> None:
    weights, runtime = normal(32, 64), kernels.Runtime(1)
    with pytest.raises(ValueError, match="must be q4, q8, bfloat16 or float32"):
        kernels.pack_matrix(runtime, weights, "q5", aligned(1088))
    with pytest.raises(ValueError, match="out: axis 0 must be 1088, but is 1024"):
        kernels.pack_matrix(runtime, weights, "q4", aligned(1024))
    with pytest.raises(ValueError, match="multiple of 64"):
        kernels.pack_matrix(runtime, weights, "q4", aligned(1089)[1:])
    with pytest.raises(ValueError, match="at least one row"):
        kernels.pack_matrix(runtime, weights[:0], "q4", aligned(0))
    with pytest.raises(ValueError, match="importance: axis 0 must be 64, but is 32"):
        kernels.pack_matrix(runtime, weights, "q4", aligned(1088), np.ones(32, np.float32))
    with pytest.raises(ValueError, match="importance: must be 0 or more and finite, but input 5"):
        kernels.pack_matrix(
            runtime, weights, "q4", aligned(1088), np.where(np.arange(64) == 5, -1, 1).astype(np.float32)
        )
    with pytest.raises(TypeError):
        kernels.pack_matrix(runtime, weights.astype(np.float64), "q4", aligned(1088))
