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
    out, runtime = [aligned(kernels.matrix_bytes(weight_format, 40, 70)) for _ in range(2)], kernels.Runtime(1)
    of_bits = kernels.pack_matrix(runtime, weights.view(np.uint16), weight_format, out[0])
    assert of_bits == kernels.pack_matrix(runtime, weights.astype(np.float32), weight_format, out[1])
    np.testing.assert_array_equal(out[0], out[1])


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


def scales_and_codes(weights: Floats, weight_format: str, **options: Any) -> tuple[Floats, Floats]:
    """Packs (32, inputs) weights; returns the scale of each group, (32, groups, 1), and the rounded weights."""
    data = pack(weights, weight_format, **options)
    block_bytes = {"q8": 2112, "q4": 1088}[weight_format]
    scales = np.ascontiguousarray(data.reshape(-1, block_bytes)[:, -64:]).view(np.float16).astype(np.float32)
    return scales.T[:, :, None], unpack(data, weight_format, weights.shape)


VALUES = {"q4": np.array(kernels.Q4_CODEBOOK, np.float32), "q8": np.arange(-127, 128, dtype=np.float32)}


def rounded_to(groups: Floats, scales: Floats, weight_format: str) -> Floats:
    """The nearest that each group (..., 64) can be with a scale (..., 1)."""
    values = VALUES[weight_format]
    middles = (values[1:] + values[:-1]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scales == 0, 0, values[np.searchsorted(middles, groups / scales)] * scales)


@pytest.mark.parametrize(
    ("weight_format", "kind"),
    [
        *(("q4", kind) for kind in ("normal", "heavy tails", "one sign", "two values", "sparse")),
        *(("q8", kind) for kind in ("normal", "heavy tails", "one sign", "sparse")),
    ],
)
def test_the_scale_is_close_to_the_best_that_there_is(weight_format: str, kind: str) -> None:
    random = np.random.default_rng(3)
    weights = {
        "normal": random.normal(size=(32, 128)),
        "heavy tails": random.standard_t(4, size=(32, 128)),
        "one sign": np.abs(random.normal(size=(32, 128))),
        "two values": random.choice([-1.0, 0.3], size=(32, 128)),
        "sparse": random.normal(size=(32, 128)) * (random.random((32, 128)) < 0.1),
    }[kind].astype(np.float32) * np.float32(0.02)
    scales, restored = scales_and_codes(weights, weight_format)
    groups = weights.reshape(32, 2, 64)
    # The codes are the nearest for the scale; the search is judged by the error against a search without end.
    np.testing.assert_allclose(restored.reshape(groups.shape), rounded_to(groups, scales, weight_format), atol=1e-9)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    least = np.full((32, 2), np.inf)
    for sign in (-1, 1) if weight_format == "q4" else (1,):
        for factor in np.linspace(0.4, 1.8, 500) if weight_format == "q4" else np.linspace(0.9, 1.1, 500):
            scale = (sign * largest / (127 * factor)).astype(np.float16).astype(np.float32)
            error = groups - rounded_to(groups, scale, weight_format)
            least = np.minimum(least, np.sum(error**2, axis=2))
    # Some scales fit 64 weights to the 255 values of q8 by luck, which 16 candidates do not all find.
    ratio = np.sum((weights - restored) ** 2) / least.sum()
    assert ratio <= (1.03 if weight_format == "q4" else 1.7)


def test_q4_rounds_normal_weights_better_than_a_uniform_grid_can() -> None:
    weights = normal(32, 64 * 40)
    _, restored = scales_and_codes(weights, "q4")
    groups = weights.reshape(32, 40, 64)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    least = np.full((32, 40), np.inf)
    for sign in (-1, 1):
        for factor in np.linspace(0.7, 1.3, 60):
            scale = sign * largest / (8 * factor)
            on_grid = np.clip(np.rint(groups / scale), -8, 7) * scale
            least = np.minimum(least, np.sum((groups - on_grid) ** 2, axis=2))
    uniform = float(np.sqrt(least.sum() / np.sum(weights**2)))
    assert uniform == pytest.approx(0.090, abs=0.001)
    assert relative_error(weights, restored) == pytest.approx(0.0805, abs=0.0007)


def test_q8_is_better_than_by_the_largest_weight() -> None:
    weights = normal(32, 64 * 40)
    _, restored = scales_and_codes(weights, "q8")
    groups = weights.reshape(32, 40, 64)
    scale = np.abs(groups).max(axis=2, keepdims=True) / 127
    by_largest = relative_error(groups, np.rint(groups / scale) * scale)
    assert relative_error(weights, restored) < 0.96 * by_largest


def test_importance_lowers_the_error_where_it_says() -> None:
    weights = normal(64, 128)
    importance = np.where(np.arange(128) % 8 == 0, 100, 1).astype(np.float32)
    for weight_format in ("q8", "q4"):
        flat = unpack(pack(weights, weight_format), weight_format, weights.shape) - weights
        told = unpack(pack(weights, weight_format, importance=importance), weight_format, weights.shape) - weights
        assert np.sum(importance * told**2) < 0.9 * np.sum(importance * flat**2)


@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_weights_that_are_already_rounded_stay_as_they_are(weight_format: str) -> None:
    once = unpack(pack(normal(64, 192), weight_format), weight_format, (64, 192))
    again = unpack(pack(once, weight_format), weight_format, (64, 192))
    np.testing.assert_allclose(again, once, rtol=0, atol=np.abs(once).max() * 2**-11)


@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_the_range_of_weights(weight_format: str) -> None:
    weights = normal(32, 64) / np.float32(0.03)
    relative = relative_error(weights, unpack(pack(weights, weight_format), weight_format, (32, 64)))
    for size in (1e6, 1e-2):
        scaled = weights * np.float32(size)
        restored = unpack(pack(scaled, weight_format), weight_format, (32, 64))
        assert relative_error(scaled, restored) == pytest.approx(relative, rel=0.02)
    for size in (1e-3, 1e-5, 1e-7, 1e-12, 1e-38, 1e-44):  # scales are halves of fewer digits, down to 0
        scaled = weights * np.float32(size)
        restored = unpack(pack(scaled, weight_format), weight_format, (32, 64))
        assert np.isfinite(restored).all()
        assert np.abs(restored - scaled).max() <= {"q4": 0.5, "q8": 0.02}[weight_format] * size + 127 * 2**-25
    with pytest.raises(ValueError, match="row 0 holds NaN, infinity or a weight too large"):
        pack(np.full((1, 64), 127 * 65536.0, np.float32), weight_format)
    largest = np.full((1, 64), 100 * 65504.0, np.float32)
    np.testing.assert_allclose(unpack(pack(largest, weight_format), weight_format, (1, 64)), largest, rtol=2**-10)


def test_what_rounding_did_is_returned() -> None:
    weights = normal(70, 100)
    for weight_format in FORMATS:
        out = aligned(kernels.matrix_bytes(weight_format, 70, 100))
        error, weight = kernels.pack_matrix(kernels.Runtime(2), weights, weight_format, out)
        restored = unpack(out, weight_format, weights.shape).astype(np.float64)
        assert weight == pytest.approx(np.sum(weights.astype(np.float64) ** 2), rel=1e-5)
        assert error == pytest.approx(np.sum((weights - restored) ** 2), rel=1e-4)


# -- Feedback ---------------------------------------------------------------------------------------------------------


def alike_inputs(num_inputs: int, *, seed: int = 0) -> Floats:
    """Inputs that share a few causes: (rows, num_inputs)."""
    random = np.random.default_rng(seed)
    causes = random.normal(size=(8 * num_inputs, max(1, num_inputs // 8)))
    x = causes @ random.normal(size=(causes.shape[1], num_inputs)) / causes.shape[1] ** 0.5
    return (x + 0.3 * random.normal(size=x.shape)).astype(np.float32)


def feedback_of(x: Floats, block: int) -> tuple[Floats, Floats]:
    """Importance and factors, straight from the definition: U upper with Uᵀ·U = H⁻¹."""
    num_inputs = x.shape[1]
    importance, factors = np.ones(num_inputs, np.float32), np.zeros((num_inputs, block), np.float32)
    for first in range(0, num_inputs, block):
        part = x[:, first : first + block].astype(np.float64)
        inverse = np.linalg.inv(part.T @ part)
        upper = np.linalg.cholesky(inverse).T
        diagonal = np.diag(upper)
        importance[first : first + block] = 1 / diagonal**2
        factors[first : first + block, : part.shape[1]] = upper / diagonal[:, None]
    return importance, factors


def output_error(x: Floats, weights: Floats, rounded: Floats) -> float:
    return float(np.linalg.norm(x @ (weights - rounded).T) / np.linalg.norm(x @ weights.T))


@pytest.mark.parametrize("weight_format", ["q8", "q4"])
@pytest.mark.parametrize(("num_inputs", "block"), [(64, 64), (200, 256), (200, 64), (320, 128)])
def test_feedback_lowers_the_error_of_outputs(weight_format: str, num_inputs: int, block: int) -> None:
    weights, x = normal(40, num_inputs), alike_inputs(num_inputs)
    importance, factors = feedback_of(x, block)
    alone = unpack(pack(weights, weight_format), weight_format, weights.shape)
    out = aligned(kernels.matrix_bytes(weight_format, *weights.shape))
    kernels.pack_matrix(kernels.Runtime(1), weights, weight_format, out, importance, factors)
    together = unpack(out, weight_format, weights.shape)
    np.testing.assert_array_equal(together, unpack_by_the_book(out, weight_format, (40, num_inputs)))
    gain = 0.75 if block >= num_inputs else 0.92  # blocks know nothing of each other
    assert output_error(x, weights, together) < gain * output_error(x, weights, alone)
    assert relative_error(weights, together) > relative_error(weights, alone)


def test_feedback_is_the_algorithm_of_the_book() -> None:
    """The codes are those of the recursion in float64, given the scales that were chosen; ties may differ."""
    weights, x = normal(32, 192), alike_inputs(192)
    importance, factors = feedback_of(x, 192)
    data = aligned(kernels.matrix_bytes("q4", 32, 192))
    kernels.pack_matrix(kernels.Runtime(1), weights, "q4", data, importance, factors)
    scales = np.ascontiguousarray(data.reshape(-1, 1088)[:, -64:]).view(np.float16).astype(np.float64).T
    rest, expected = weights.astype(np.float64), np.empty((32, 192))
    for k in range(192):
        expected[:, k] = rounded_to(rest[:, k, None], scales[:, k // 64, None], "q4")[:, 0]
        rest[:, k + 1 :] -= (rest[:, k] - expected[:, k])[:, None] * factors[k, k + 1 :]
    same = np.isclose(unpack(data, "q4", (32, 192)), expected, rtol=1e-5, atol=0).all(axis=1)
    assert same.mean() > 0.9  # a row in which one code fell the other way goes another way from there


def test_feedback_gives_the_same_bits_everywhere() -> None:
    weights, x = normal(70, 200), alike_inputs(200)
    importance, factors = feedback_of(x, 128)
    runs = [("scalar", 1), *((isa, num_threads) for isa in kernels.available_isas() for num_threads in (1, 2, 3))]
    for weight_format in ("q8", "q4"):
        packed = []
        for isa, num_threads in runs:
            out = aligned(kernels.matrix_bytes(weight_format, 70, 200))
            kernels.pack_matrix(kernels.Runtime(num_threads, isa), weights, weight_format, out, importance, factors)
            packed.append(out)
        for out in packed[1:]:
            np.testing.assert_array_equal(out, packed[0])
        last = aligned(kernels.matrix_bytes(weight_format, 38, 200))
        kernels.pack_matrix(kernels.Runtime(1), weights[32:], weight_format, last, importance, factors)
        np.testing.assert_array_equal(last, packed[0][len(packed[0]) // 3 :])


def test_feedback_of_zeros_is_none() -> None:
    weights = normal(40, 200)
    for weight_format in ("q8", "q4"):
        out = aligned(kernels.matrix_bytes(weight_format, 40, 200))
        zeros = np.zeros((200, 128), np.float32)
        error = kernels.pack_matrix(kernels.Runtime(1), weights, weight_format, out, None, zeros)
        np.testing.assert_array_equal(out, pack(weights, weight_format))
        restored = unpack(out, weight_format, weights.shape).astype(np.float64)
        assert error[0] == pytest.approx(np.sum((weights - restored) ** 2), rel=1e-4)


def test_bad_feedback() -> None:
    weights, runtime, out = normal(32, 64), kernels.Runtime(1), aligned(1088)
    with pytest.raises(ValueError, match="feedback: axis 0 must be 64, but is 32"):
        kernels.pack_matrix(runtime, weights, "q4", out, None, np.zeros((32, 64), np.float32))
    with pytest.raises(ValueError, match="feedback: blocks must be multiples of 64, but are 63"):
        kernels.pack_matrix(runtime, weights, "q4", out, None, np.zeros((64, 63), np.float32))
    with pytest.raises(ValueError, match="feedback: is for q4 and q8"):
        kernels.pack_matrix(runtime, weights, "bfloat16", aligned(4096), None, np.zeros((64, 64), np.float32))
    weights[3, 4] = np.nan
    with pytest.raises(ValueError, match="row 3 holds NaN"):
        kernels.pack_matrix(runtime, weights, "q4", out, None, np.zeros((64, 64), np.float32))
