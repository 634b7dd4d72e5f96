"""The product with q4 and q8 weights gives the exact bits of its formula, on every instruction set, whatever the shape,
the threads and the other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels as kernels

GROUP, TILE = kernels.GROUP, kernels.TILE
FORMATS = ["q4", "q8"]
F32 = npt.NDArray[np.float32]


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """`size` zero bytes that start at a multiple of 64."""
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


class Weights:
    """A packed matrix of `values` (outputs, inputs), integers in units of the scales (outputs, groups)."""

    def __init__(self, format: str, codes: npt.NDArray[np.integer], scales: npt.NDArray[np.float16]) -> None:
        outputs, inputs = codes.shape
        tiles, groups = -(-outputs // TILE), -(-inputs // GROUP)
        self.scales = scales.astype(np.float32)
        self.values = np.asarray(kernels.Q4_CODEBOOK)[codes] if format == "q4" else codes
        padded = np.zeros((tiles * TILE, groups * GROUP), codes.dtype)
        padded[:outputs, :inputs] = codes
        padded_scales = np.zeros((tiles * TILE, groups), np.float16)
        padded_scales[:outputs] = scales
        block_bytes = (TILE * GROUP // 2 if format == "q4" else TILE * GROUP) + TILE * 2
        data = aligned(tiles * groups * block_bytes)
        blocks = data.reshape(tiles, groups, block_bytes)
        # [tile, half, output, group, step, four, input] -> [tile, group, half, step, four, output, input]
        sorted_codes = padded.reshape(tiles, 2, 16, groups, 8, 2, 4).transpose(0, 3, 1, 4, 5, 2, 6)
        if format == "q4":
            nibbles = sorted_codes[:, :, :, :, 0] | sorted_codes[:, :, :, :, 1] << 4
            blocks[..., :-64] = nibbles.astype(np.uint8).reshape(tiles, groups, -1)
        else:
            blocks[..., :-64] = (
                np.ascontiguousarray(sorted_codes).astype(np.int8).view(np.uint8).reshape(tiles, groups, -1)
            )
        by_tile = np.ascontiguousarray(padded_scales.reshape(tiles, TILE, groups).transpose(0, 2, 1))
        blocks[..., -64:] = by_tile.view(np.uint8).reshape(tiles, groups, 64)
        self.matrix = kernels.Matrix(format, outputs, inputs, data)


def random_weights(format: str, outputs: int, inputs: int, seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)
    low, high = (0, 16) if format == "q4" else (-127, 128)
    codes = random.integers(low, high, (outputs, inputs))
    return Weights(format, codes, random.uniform(1e-4, 2e-3, (outputs, -(-inputs // GROUP))).astype(np.float16))


class Rows:
    """Activations of random rows, with the int8 values and scales that they should hold."""

    def __init__(self, rows: int, width: int, seed: int = 1) -> None:
        random = np.random.default_rng(seed)
        x = random.standard_normal((rows, width)).astype(np.float32)
        self.activations, exact = activations_of(x, "int8"), activations_of(x, "float32")
        groups = -(-width // GROUP)
        padded = np.zeros((rows, groups * GROUP), np.float32)
        padded[:, :width] = exact.dequantized()
        grouped = padded.reshape(rows, groups, GROUP)
        self.scales = np.abs(grouped).max(-1, initial=0) * np.float32(1 / 127)
        self.values = np.rint(grouped * (np.float32(1) / self.scales)[..., None]).reshape(rows, groups * GROUP)[
            :, :width
        ]
        assert np.array_equal(
            self.activations.dequantized(), self.values.astype(np.float32) * self.scales.repeat(GROUP, 1)[:, :width]
        )


def activations_of(x: F32, format: str) -> kernels.Activations:
    rows, width = x.shape
    activations = kernels.Activations(format, max(rows, 1), width)
    kernels.rms_norm(kernels.Runtime(1), x, np.zeros(width, np.float32), 1e-6, activations)
    return activations


def fused_multiply_add(a: npt.NDArray[np.float64], b: F32, c: F32) -> F32:
    """a · b + c rounded once to float32. a · b must be exact in float64: a of 20 bits, b of 24."""
    product, addend = a * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    # What the sum lost (TwoSum). Rounding it to odd keeps a trace of the loss, so that rounding again is exact.
    part = total - product
    lost = (product - (total - part)) + (addend - part)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.where((lost != 0) & is_even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return odd.astype(np.float32)


def reference(x: Rows, w: Weights) -> F32:
    """The formula of isa/quantized_matmul.cpp."""
    y = np.zeros((x.values.shape[0], w.values.shape[0]), np.float32)
    for group in range(w.scales.shape[1]):
        inputs = slice(group * GROUP, (group + 1) * GROUP)
        dot = x.values[:, inputs].astype(np.float64) @ w.values[:, inputs].T.astype(np.float64)
        y = fused_multiply_add(dot, x.scales[:, group, None] * w.scales[None, :, group], y)
    return y


def multiply(x: Any, w: Any, isa: str, threads: int = 1) -> F32:
    out = np.full((x.rows, w.outputs), np.nan, np.float32)
    kernels.quantized_matmul(kernels.Runtime(threads, isa), x, w, out)
    return out


def assert_same_bits(actual: F32, expected: F32) -> None:
    assert actual.shape == expected.shape
    different = np.argwhere(actual.view(np.uint32) != expected.view(np.uint32))
    assert len(different) == 0, f"{len(different)} of {actual.size} differ, first at {different[0]}"


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        (1, 1),
        (15, 63),
        (16, 64),
        (17, 65),
        (32, 128),
        (33, 127),
        (63, 200),
        (96, 320),
        (97, 256),
        (160, 64),
        (224, 700),
    ],
)
def test_formula_for_every_shape(isa: str, format: str, outputs: int, inputs: int) -> None:
    w = random_weights(format, outputs, inputs)
    for rows in (0, 1, 2, 3, 5, 8, 13):
        x = Rows(rows, inputs)
        assert_same_bits(multiply(x.activations, w.matrix, isa), reference(x, w))


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("format", FORMATS)
def test_formula_for_every_number_of_rows(isa: str, format: str) -> None:
    w = random_weights(format, 200, 192)
    x = Rows(70, 192)
    expected = reference(x, w)
    for rows in range(1, 71):
        part = Rows(rows, 192)
        assert np.array_equal(part.values, x.values[:rows])
        assert_same_bits(multiply(part.activations, w.matrix, isa), expected[:rows])


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("format", FORMATS)
def test_formula_for_many_rows(isa: str, format: str) -> None:
    w = random_weights(format, 81, 130)
    x = Rows(1026, 130)
    expected = reference(x, w)
    for rows in (127, 128, 129, 512, 513, 1026):
        assert_same_bits(multiply(Rows(rows, 130).activations, w.matrix, isa, threads=2), expected[:rows])


@pytest.mark.parametrize("format", FORMATS)
def test_threads_change_nothing(format: str) -> None:
    w = random_weights(format, 1000, 640)
    for rows in (1, 4, 50, 150):
        x = Rows(rows, 640)
        expected = multiply(x.activations, w.matrix, "scalar")
        for isa in kernels.available_isas():
            for threads in (1, 2, 3):
                assert_same_bits(multiply(x.activations, w.matrix, isa, threads), expected)


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("format", FORMATS)
def test_largest_products_do_not_saturate(isa: str, format: str) -> None:
    """Every weight and every activation at its largest, in all four combinations of signs."""
    inputs = 128
    x = Rows(6, inputs)
    signs = np.ones((6, inputs), np.float32)
    signs[1] = -1
    signs[2, ::2] = -1
    signs[3, 1::2] = -1
    signs[4, ::3] = -1
    signs[5, 2:90] = -1
    x.activations = activations_of(signs, "int8")
    x.values = signs * 127.0
    x.scales = np.abs(activations_of(signs, "float32").dequantized())[:, ::GROUP] * np.float32(1 / 127)
    largest, smallest = (0, 15) if format == "q4" else (-127, 127)
    codes = np.full((70, inputs), largest)
    codes[1::3] = smallest
    codes[2::3, ::2] = smallest
    w = Weights(format, codes, np.full((70, 2), 0.001, np.float16))
    assert_same_bits(multiply(x.activations, w.matrix, isa), reference(x, w))


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("format", FORMATS)
def test_only_the_output_is_written(isa: str, format: str) -> None:
    """The output may start at any float; nothing before or behind it changes."""
    for rows, outputs in ((1, 33), (3, 47), (9, 65), (40, 97)):
        w = random_weights(format, outputs, 64)
        x = Rows(rows, 64)
        memory = np.full(1 + rows * outputs + 64, 7, np.float32)
        out = memory[1 : 1 + rows * outputs].reshape(rows, outputs)
        kernels.quantized_matmul(kernels.Runtime(1, isa), x.activations, w.matrix, out)
        assert_same_bits(out, reference(x, w))
        assert memory[0] == 7
        assert (memory[1 + rows * outputs :] == 7).all()


def test_bad_arguments() -> None:
    runtime = kernels.Runtime(1)
    w = random_weights("q4", 40, 64).matrix
    x = Rows(2, 64).activations
    out = np.zeros((2, 40), np.float32)
    with pytest.raises(ValueError, match="the width must be 64 as the weights' inputs, but is 65"):
        kernels.quantized_matmul(runtime, Rows(2, 65).activations, w, out)
    with pytest.raises(ValueError, match="int8"):
        kernels.quantized_matmul(runtime, activations_of(np.ones((2, 64), np.float32), "float32"), w, out)
    with pytest.raises(ValueError, match="q4 or q8"):
        data = aligned(kernels.matrix_bytes("float32", 40, 64))
        kernels.quantized_matmul(runtime, x, kernels.Matrix("float32", 40, 64, data), out)
    with pytest.raises(ValueError, match="out: axis 0 must be 2, but is 3"):
        kernels.quantized_matmul(runtime, x, w, np.zeros((3, 40), np.float32))
    with pytest.raises(ValueError, match="out: axis 1 must be 40, but is 64"):
        kernels.quantized_matmul(runtime, x, w, np.zeros((2, 64), np.float32))
    with pytest.raises(TypeError):
        kernels.quantized_matmul(runtime, x, w, np.zeros((2, 40), np.float64))
    with pytest.raises(TypeError):
        kernels.quantized_matmul(runtime, x, w, np.zeros((2, 80), np.float32)[:, ::2])
