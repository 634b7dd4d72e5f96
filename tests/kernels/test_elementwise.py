"""Norms, GeGLU, activations, the cap and the embedding against float64, and bit for bit across instruction sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels
from gemma2._kernels import Activations, Matrix, Runtime

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

ULP = 2.0**-24  # half the distance of float32 numbers from 1 on: the largest relative error of one rounding
WIDTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 256, 1000, 2304]
EPSILON = 1e-6

RUNTIMES = [Runtime(threads, isa) for isa in _kernels.available_isas() for threads in (1, 2, 3)]


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def misaligned(x: Floats) -> Floats:
    """A copy that starts 4 bytes after a multiple of 64."""
    raw = np.empty(x.size + 32, dtype=np.float32)
    start = next(i for i in range(16) if (raw.ctypes.data + 4 * i) % 64 == 4)
    copy = raw[start : start + x.size].reshape(x.shape)
    copy[...] = x
    return copy


def same_bits(call: Callable[[Runtime], Any]) -> Any:
    """The result of `call` on the first runtime; every other runtime must give the same bits."""
    first = call(RUNTIMES[0])
    for runtime in RUNTIMES[1:]:
        other = call(runtime)
        assert first.tobytes() == other.tobytes(), f"{runtime.isa}, {runtime.num_threads} threads"
    return first


def activations_of(write: Callable[[Activations], None], rows: int, width: int, format: str = "float32") -> Floats:
    out = Activations(format, rows, width)
    write(out)
    assert out.rows == rows
    return out.dequantized()


def exact_norm(x: Floats, weight: Floats) -> Doubles:
    wide = x.astype(np.float64)
    exact: Doubles = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + EPSILON) * (1.0 + weight)
    return exact


def norm_tolerance(width: int) -> float:
    """Half the error of the sum of squares, and five roundings (root, two of the mean, two products) besides 1 + w."""
    return ((width / 64 + 8) / 2 + 6) * ULP


# -- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    x, weight = misaligned(floats(3, width, scale=5)), misaligned(floats(width, seed=1))
    x[1] *= 1e-4  # here epsilon counts
    got = same_bits(
        lambda runtime: activations_of(lambda out: _kernels.rms_norm(runtime, x, weight, EPSILON, out), 3, width)
    )
    np.testing.assert_allclose(got, exact_norm(x, weight), rtol=norm_tolerance(width), atol=1e-30)


def test_rms_norm_of_zeros_is_zero_and_of_no_rows_nothing() -> None:
    weight = floats(70)
    zeros = np.zeros((2, 70), dtype=np.float32)
    assert not activations_of(lambda out: _kernels.rms_norm(RUNTIMES[0], zeros, weight, EPSILON, out), 2, 70).any()
    out = Activations("float32", 2, 70)
    _kernels.rms_norm(RUNTIMES[0], zeros[:0], weight, EPSILON, out)
    assert out.rows == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_add_rms_norm_is_the_norm_the_sum_and_the_norm(width: int, format: str) -> None:
    residual, y = floats(4, width, scale=9), misaligned(floats(4, width, seed=1, scale=3))
    post_weight, next_weight = floats(width, seed=2), floats(width, seed=3)

    def fused(runtime: Runtime) -> Floats:
        total = misaligned(residual)
        normed = activations_of(
            lambda out: _kernels.add_rms_norm(runtime, total, y, post_weight, EPSILON, next_weight, out),
            4,
            width,
            format,
        )
        return np.stack([total, normed])

    def one_by_one(runtime: Runtime) -> Floats:
        post = activations_of(lambda out: _kernels.rms_norm(runtime, y, post_weight, EPSILON, out), 4, width)
        total = residual + post
        normed = activations_of(
            lambda out: _kernels.rms_norm(runtime, total, next_weight, EPSILON, out), 4, width, format
        )
        return np.stack([total, normed])

    got = same_bits(fused)
    assert got.tobytes() == one_by_one(RUNTIMES[0]).tobytes()
    # One rounding more, of the sum; where the two cancel, the error of the norm stays.
    largest = np.abs(residual) + np.abs(exact_norm(y, post_weight))
    assert (np.abs(got[0] - (residual + exact_norm(y, post_weight))) <= largest * (norm_tolerance(width) + ULP)).all()

    alone = residual.copy()
    _kernels.add_norm(RUNTIMES[-1], alone, y, post_weight, EPSILON)
    assert alone.tobytes() == got[0].tobytes()


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_a_row_does_not_depend_on_the_other_rows(format: str) -> None:
    rows, width = 37, 1100  # enough that several threads get tasks
    x, gate_up = floats(rows, width), floats(rows, 2 * width, seed=1)
    x[3], gate_up[5] = np.nan, 1e30
    weight = floats(width, seed=2)

    def all_rows(runtime: Runtime, rows: slice) -> Floats:
        count = len(range(37)[rows])
        normed = activations_of(
            lambda out: _kernels.rms_norm(runtime, x[rows], weight, EPSILON, out), count, width, format
        )
        gated = activations_of(lambda out: _kernels.geglu(runtime, gate_up[rows], out), count, width, format)
        return np.nan_to_num(np.stack([normed, gated]), nan=7.0)

    together = same_bits(lambda runtime: all_rows(runtime, slice(None)))
    for row in range(rows):
        assert all_rows(RUNTIMES[0], slice(row, row + 1))[:, 0].tobytes() == together[:, row].tobytes()


# -- GeGLU ----------------------------------------------------------------------------------------------------------


def exact_gelu(x: Floats) -> Doubles:
    """GELU in its tanh form, as x / (1 + exp(-2u)), which does not cancel."""
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        exact: Doubles = wide / (1.0 + np.exp(-2.0 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return exact


@pytest.mark.parametrize("width", [*WIDTHS, 9216])
def test_geglu_takes_the_gate_first(width: int) -> None:
    gate_up = misaligned(floats(2, 2 * width, scale=3))
    got = same_bits(lambda runtime: activations_of(lambda out: _kernels.geglu(runtime, gate_up, out), 2, width))
    gate, up = gate_up[:, :width], gate_up[:, width:]
    # The exponent t of exp(-2u) = 2^t comes with 3.5 roundings, each of |t| · ln 2 in the result for a negative gate.
    exponent = 2.302 * np.abs(gate) * (1 + 0.044715 * gate.astype(np.float64) ** 2)
    exact = exact_gelu(gate) * up
    assert (np.abs(got - exact) <= np.abs(exact) * (8 + 2.5 * exponent) * ULP + 1e-36).all()


# -- activations ----------------------------------------------------------------------------------------------------


def written(x: Floats, format: str) -> Floats:
    rows, width = x.shape

    def write(runtime: Runtime) -> Floats:
        return activations_of(lambda out: _kernels.write_activations(runtime, x, out), rows, width, format)

    got: Floats = same_bits(write)
    return got


@pytest.mark.parametrize("width", WIDTHS)
def test_activations_in_float32_are_the_numbers_themselves(width: int) -> None:
    x = misaligned(floats(3, width))
    assert written(x, "float32").tobytes() == x.tobytes()


@pytest.mark.parametrize("width", WIDTHS)
def test_activations_in_bfloat16_are_rounded_to_nearest_even(width: int) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = misaligned(floats(3, width))
    x[0, 0] = np.float32(1 + 2.0**-8)  # a tie
    np.testing.assert_array_equal(written(x, "bfloat16"), x.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("width", WIDTHS)
def test_activations_in_int8_are_rounded_in_groups(width: int) -> None:
    x = misaligned(floats(3, width, scale=4))
    x[1, : width // 2] *= 1e-3  # groups with scales of their own
    padded = np.zeros((3, -(-width // 64) * 64), dtype=np.float32)
    padded[:, :width] = x
    groups = padded.reshape(3, -1, 64)
    scale = np.abs(groups).max(axis=2, keepdims=True) * np.float32(1 / 127)
    expected = np.rint(groups * (np.float32(1) / scale)) * scale
    np.testing.assert_array_equal(written(x, "int8"), expected.reshape(3, -1)[:, :width])
    assert (np.abs(written(x, "int8") - x) <= 0.5001 * scale.repeat(64, axis=2).reshape(3, -1)[:, :width]).all()


def test_int8_groups_of_zeros_tiny_numbers_and_what_is_no_number() -> None:
    x = np.zeros((1, 64 * 6), dtype=np.float32)
    x[0, 64:128] = 1e-40  # its scale has no float32 inverse: zeros
    x[0, 130], x[0, 200], x[0, 300] = np.nan, np.inf, -np.inf
    x[0, 320:] = np.finfo(np.float32).max
    groups = written(x, "int8").reshape(6, 64)
    assert not groups[:2].any()
    assert np.isnan(groups[2:5]).all()
    np.testing.assert_allclose(groups[5], np.finfo(np.float32).max, rtol=1e-6)


# -- cap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 5), (1, 16), (1, 31), (2, 64), (1, 40_001)])
def test_soft_cap(shape: tuple[int, int]) -> None:
    x = floats(*shape, scale=60)

    def capped(runtime: Runtime) -> Floats:
        copy = misaligned(x)
        _kernels.soft_cap(runtime, copy, 30.0)
        return copy

    got = same_bits(capped)
    # tanh within 2 ulp (4 roundings), and three roundings.
    np.testing.assert_allclose(got, 30 * np.tanh(x.astype(np.float64) / 30), rtol=7 * ULP, atol=0)
    assert (np.abs(got) <= 30).all()


def test_soft_cap_of_infinity_is_the_cap_and_of_nan_nan() -> None:
    x = np.array([[np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-42]], dtype=np.float32)
    for runtime in RUNTIMES:
        copy = x.copy()
        _kernels.soft_cap(runtime, copy, 50.0)
        assert copy[0, :2].tolist() == [50, -50] and np.isnan(copy[0, 2])
        assert copy[0, 3:5].tobytes() == x[0, 3:5].tobytes()  # with their signs


# -- embedding ------------------------------------------------------------------------------------------------------


def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    raw = np.zeros(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


@pytest.mark.parametrize("format", ["q4", "q8", "bfloat16", "float32"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (33, 63), (70, 64), (64, 65), (100, 200), (40, 2304)])
def test_embed_gives_the_matrix_rows_times_the_scale(format: str, outputs: int, inputs: int) -> None:
    data = aligned_bytes(_kernels.matrix_bytes(format, outputs, inputs))
    _kernels.pack_matrix(RUNTIMES[0], floats(outputs, inputs), format, data)
    matrix = Matrix(format, outputs, inputs, data)
    weights = _kernels.unpack_matrix(RUNTIMES[0], matrix)
    ids = np.random.default_rng(1).permutation(outputs).astype(np.int32)

    def embedded(runtime: Runtime) -> Floats:
        out = misaligned(np.full((outputs, inputs), np.nan, dtype=np.float32))
        _kernels.embed(runtime, matrix, ids, 59.75, out)
        return out

    assert same_bits(embedded).tobytes() == (weights[ids] * np.float32(59.75)).tobytes()


@pytest.mark.parametrize("bad", [-1, 40])
def test_embed_refuses_ids_that_the_matrix_does_not_have(bad: int) -> None:
    matrix = Matrix("q8", 40, 64, aligned_bytes(_kernels.matrix_bytes("q8", 40, 64)))
    ids = np.array([3, bad], dtype=np.int32)
    with pytest.raises(ValueError, match=rf"ids must be from 0 to 39, but ids\[1\] is {bad}"):
        _kernels.embed(RUNTIMES[0], matrix, ids, 1.0, np.empty((2, 64), dtype=np.float32))


# -- arguments ------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused_with_what_was_needed() -> None:
    runtime, x, weight = RUNTIMES[0], floats(2, 64), floats(64)
    with pytest.raises(ValueError, match="weight: axis 0 must be 64, but is 63"):
        _kernels.rms_norm(runtime, x, weight[:63].copy(), EPSILON, Activations("int8", 2, 64))
    with pytest.raises(ValueError, match="out: needs room for 2 rows, but has 1"):
        _kernels.rms_norm(runtime, x, weight, EPSILON, Activations("int8", 1, 64))
    with pytest.raises(ValueError, match="out: the width must be 64, but is 65"):
        _kernels.write_activations(runtime, x, Activations("int8", 2, 65))
    with pytest.raises(ValueError, match="residual: axis 0 must be 2, but is 1"):
        _kernels.add_norm(runtime, x[:1].copy(), x, weight, EPSILON)
    with pytest.raises(ValueError, match="gate_up: axis 1 must be 128, but is 64"):
        _kernels.geglu(runtime, x, Activations("int8", 2, 64))
    with pytest.raises(ValueError, match="cap must be above 0"):
        _kernels.soft_cap(runtime, x, 0.0)


def test_no_array_is_converted_or_copied_unseen() -> None:
    runtime, weight, out = RUNTIMES[0], floats(64), Activations("int8", 2, 64)
    for x in (floats(2, 64).astype(np.float64), floats(2, 128)[:, ::2], floats(128)):
        with pytest.raises(TypeError):
            _kernels.rms_norm(runtime, x, weight, EPSILON, out)  # type: ignore[arg-type]
    frozen = floats(2, 64)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        _kernels.soft_cap(runtime, frozen, 30.0)
