"""Products with float32 and bfloat16 weights give the same bits on every instruction set, for any rows and threads.

The expected bits come from numpy: a product of two float32 is exact in float64, and so is a sum as far as rounding to
float32 can tell but for ties that random numbers do not make (chance 2⁻²⁹ an addition). So an fma is a float64 product
and sum, rounded to float32.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels

Float32 = npt.NDArray[np.float32]
FORMATS = ("float32", "bfloat16")


def aligned(size: int) -> npt.NDArray[np.uint8]:
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def packed(weights: Float32, format: str) -> _kernels.Matrix:
    data = aligned(_kernels.matrix_bytes(format, *weights.shape))
    _kernels.pack_matrix(_kernels.Runtime(1), weights, format, data)
    return _kernels.Matrix(format, *weights.shape, data)


def activations(x: Float32, format: str) -> _kernels.Activations:
    out = _kernels.Activations(format, len(x), x.shape[1])
    _kernels.write_activations(_kernels.Runtime(1), x, out)
    return out


def flushed(x: Float32) -> Float32:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def expected(x: Float32, w: Float32, format: str) -> Float32:
    """The sum over inputs in the kernels' order, each fma rounded once; bfloat16 knows no subnormals."""
    inputs = x.shape[1]
    out = np.zeros((len(x), len(w)), np.float32)
    if format == "float32":
        order, keep = list(range(inputs)), lambda values: values
    else:
        order, keep = [k ^ 1 for k in range(inputs + inputs % 2)], flushed
        x, w = flushed(x), flushed(w)
    for k in order:
        if k < inputs:
            product = x[:, k, None].astype(np.float64) * w[None, :, k].astype(np.float64)
            out = keep((product + out).astype(np.float32))
    return out


def random_product(rows: int, outputs: int, inputs: int, format: str) -> tuple[_kernels.Activations, _kernels.Matrix]:
    rng = np.random.default_rng([rows, outputs, inputs])
    x = rng.standard_normal((rows, inputs), np.float32) * np.exp(rng.standard_normal((rows, inputs), np.float32))
    w = rng.standard_normal((outputs, inputs), np.float32)
    return activations(x, format), packed(w, format)


def product(runtime: _kernels.Runtime, x: _kernels.Activations, w: _kernels.Matrix) -> Float32:
    out = np.full((x.rows, w.outputs), np.nan, np.float32)
    _kernels.float_matmul(runtime, x, w, out)
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", _kernels.available_isas())
def test_bits_for_every_size(isa: str, format: str) -> None:
    runtime = _kernels.Runtime(2, isa)
    sizes = itertools.chain(
        # Tails of outputs and inputs, up to twice a tile and a group.
        itertools.product((1, 2, 7), (1, 15, 16, 17, 31, 32, 33, 65), (1, 2, 3, 63, 64, 65, 129)),
        # Every register tile, and rows enough for several.
        itertools.product((*range(1, 14), 24, 25), (96, 144), (70,)),
        # Inputs beyond one block, one row and several, panels whose last is cut.
        [(1, 40, 1100), (3, 40, 1100), (7, 40, 1100), (20, 300, 1100)],
    )
    for rows, outputs, inputs in sizes:
        x, w = random_product(rows, outputs, inputs, format)
        weights = _kernels.unpack_matrix(runtime, w)
        np.testing.assert_array_equal(
            product(runtime, x, w), expected(x.dequantized(), weights, format), f"{rows} x {outputs} x {inputs}"
        )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", _kernels.available_isas())
def test_bits_at_the_edge_of_subnormals(isa: str, format: str) -> None:
    """Inputs, products and sums below 2^-126: kept for float32, zeros for bfloat16."""
    rng = np.random.default_rng(7)
    runtime = _kernels.Runtime(1, isa)
    for inputs, scale_x, scale_w in [(2, -63, -63), (64, -60, -64), (64, -120, -3), (64, -130, 10), (64, 10, -128)]:
        x = activations(np.ldexp(rng.standard_normal((7, inputs), np.float32), scale_x), format)
        w = packed(np.ldexp(rng.standard_normal((48, inputs), np.float32), scale_w), format)
        reference = expected(x.dequantized(), _kernels.unpack_matrix(runtime, w), format)
        np.testing.assert_array_equal(product(runtime, x, w), reference)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_threads_do_not_change_bits(format: str) -> None:
    x, w = random_product(61, 517, 1100, format)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((61, 1100), np.float32)
    x = activations(values, format)
    whole = product(_kernels.Runtime(1), x, w)
    for threads in (2, 3):
        np.testing.assert_array_equal(product(_kernels.Runtime(threads), x, w), whole)
    for start, end in [(0, 1), (5, 6), (3, 9), (10, 23), (0, 48)]:
        np.testing.assert_array_equal(
            product(_kernels.Runtime(3), activations(values[start:end], format), w), whole[start:end]
        )


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_that_of_float32(format: str) -> None:
    x, w = random_product(5, 48, 2304, format)
    weights = _kernels.unpack_matrix(_kernels.Runtime(1), w).astype(np.float64)
    values = x.dequantized().astype(np.float64)
    bound = 2304 * 2.0**-24 * (np.abs(values) @ np.abs(weights).T)
    assert np.all(np.abs(product(_kernels.Runtime(1), x, w) - values @ weights.T) <= bound)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", _kernels.available_isas())
def test_infinity_stays_in_its_row(isa: str, format: str) -> None:
    rng = np.random.default_rng(1)
    w = packed(rng.standard_normal((40, 64), np.float32), format)
    values = rng.standard_normal((7, 64), np.float32)
    before = product(_kernels.Runtime(1, isa), activations(values, format), w)
    values[3, 5] = np.inf
    after = product(_kernels.Runtime(1, isa), activations(values, format), w)
    assert np.isinf(after[3]).all()
    np.testing.assert_array_equal(np.delete(after, 3, axis=0), np.delete(before, 3, axis=0))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "q8", "q4"])
def test_matmul_takes_every_format(format: str) -> None:
    rng = np.random.default_rng(2)
    w = packed(rng.standard_normal((40, 70), np.float32), format)
    x = activations(rng.standard_normal((3, 70), np.float32), w.activation_format)
    runtime = _kernels.Runtime(1)
    out, same = np.empty((3, 40), np.float32), np.empty((3, 40), np.float32)
    _kernels.matmul(runtime, x, w, out)
    (_kernels.float_matmul if format in FORMATS else _kernels.quantized_matmul)(runtime, x, w, same)
    np.testing.assert_array_equal(out, same)
    exact = x.dequantized().astype(np.float64) @ _kernels.unpack_matrix(runtime, w).astype(np.float64).T
    np.testing.assert_allclose(out, exact, atol=1e-4)
    with pytest.raises(ValueError, match="these weights need activations in"):
        _kernels.matmul(
            runtime, activations(np.ones((3, 70), np.float32), "int8" if format in FORMATS else "float32"), w, out
        )


def test_no_rows() -> None:
    x, w = _kernels.Activations("float32", 1, 64), packed(np.ones((40, 64), np.float32), "float32")
    _kernels.matmul(_kernels.Runtime(2), x, w, np.empty((0, 40), np.float32))


def test_bad_arguments() -> None:
    runtime = _kernels.Runtime(1)
    x, w = random_product(3, 40, 64, "float32")
    other, quantized = (
        activations(np.ones((3, 64), np.float32), "bfloat16"),
        packed(np.ones((40, 64), np.float32), "q8"),
    )
    with pytest.raises(ValueError, match="need activations in float32, but they are in bfloat16"):
        _kernels.float_matmul(runtime, other, w, np.empty((3, 40), np.float32))
    with pytest.raises(ValueError, match="format must be float32 or bfloat16"):
        _kernels.float_matmul(runtime, x, quantized, np.empty((3, 40), np.float32))
    with pytest.raises(ValueError, match="width must be 64, the inputs of the weights, but is 65"):
        _kernels.float_matmul(
            runtime, activations(np.ones((3, 65), np.float32), "float32"), w, np.empty((3, 40), np.float32)
        )
    with pytest.raises(ValueError, match="out: axis 0 must be 3, but is 2"):
        _kernels.float_matmul(runtime, x, w, np.empty((2, 40), np.float32))
    with pytest.raises(ValueError, match="out: axis 1 must be 40, but is 41"):
        _kernels.float_matmul(runtime, x, w, np.empty((3, 41), np.float32))
    with pytest.raises(TypeError):
        _kernels.float_matmul(runtime, x, w, np.empty((3, 40), np.float64))
    with pytest.raises(TypeError):
        _kernels.float_matmul(runtime, x, w, np.empty((40, 3), np.float32).T)
