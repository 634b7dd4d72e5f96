"""Kernels on rows of logits against numpy in float64, and bit for bit across instruction sets and threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels
from gemma2._kernels import Runtime

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

RUNTIMES = [Runtime(threads, isa) for isa in _kernels.available_isas() for threads in (1, 2, 3)]
WIDTHS = [1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 1000, 5003]


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def same_bits(call: Callable[[Runtime], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The result of `call` on the first runtime; every other runtime must give the same bits."""
    first = call(RUNTIMES[0])
    for runtime in RUNTIMES[1:]:
        assert first.tobytes() == call(runtime).tobytes(), f"{runtime.isa}, {runtime.num_threads} threads"
    return first


# -- top_k ----------------------------------------------------------------------------------------------------------


def top_k(x: Floats, k: int, runtime: Runtime) -> tuple[npt.NDArray[np.int32], Floats]:
    ids, values = np.empty((len(x), k), dtype=np.int32), np.empty((len(x), k), dtype=np.float32)
    _kernels.top_k(runtime, x, k, ids, values)
    return ids, values


def check_top_k(x: Floats, k: int) -> None:
    """Against a stable sort; NaN behind -inf."""
    expected = np.array([np.lexsort((-np.nan_to_num(row, nan=-np.inf), np.isnan(row)))[:k] for row in x])
    for runtime in RUNTIMES:
        ids, values = top_k(x, k, runtime)
        np.testing.assert_array_equal(ids, expected, err_msg=f"{runtime.isa}, k {k}")
        assert values.tobytes() == np.take_along_axis(x, expected, axis=1).tobytes()


@pytest.mark.parametrize("width", WIDTHS)
def test_top_k_is_the_head_of_a_stable_sort(width: int) -> None:
    x = normal(3, width)
    x[1] = np.round(x[1])  # many equals
    for k in sorted({1, min(2, width), min(40, width), width}):
        check_top_k(x, k)


@pytest.mark.parametrize("k", [1, 64, 1024])
def test_top_k_of_a_large_vocabulary_in_any_order(k: int) -> None:
    x = np.sort(normal(4, 30_000), axis=1)  # rising: every value beats those before it
    x[1] = x[1, ::-1]
    x[2] = np.random.default_rng(1).permutation(x[2])
    x[3] = np.random.default_rng(1).integers(0, 2, 30_000)  # half of all ties for the first place
    check_top_k(x, k)


def test_top_k_of_infinities_zeros_with_signs_and_nan() -> None:
    x = np.array([[-np.inf, 0.0, np.nan, -0.0, np.inf, np.nan, -np.inf, 1e-42, -1e-42]], dtype=np.float32)
    for k in range(1, x.shape[1] + 1):
        check_top_k(x, k)
    ids, values = top_k(x, 9, RUNTIMES[0])
    assert ids[0].tolist() == [4, 7, 1, 3, 8, 0, 6, 2, 5]
    assert np.isnan(values[0, 7:]).all()
    check_top_k(np.full((2, 100), np.nan, dtype=np.float32), 3)
    check_top_k(np.zeros((2, 9000), dtype=np.float32), 20)


def test_rows_may_be_wider_than_what_is_used_of_them() -> None:
    padded = normal(3, 130)
    padded[:, 100:] = 1e9
    used = padded[:, :100]
    assert top_k(used, 5, RUNTIMES[0])[0].tolist() == top_k(used.copy(), 5, RUNTIMES[0])[0].tolist()
    assert log_normalizers(used, RUNTIMES[0]).tolist() == log_normalizers(used.copy(), RUNTIMES[0]).tolist()
    with pytest.raises(ValueError, match="the values of a row must be neighbours"):
        top_k(padded[:, ::2], 5, RUNTIMES[0])


# -- softmax --------------------------------------------------------------------------------------------------------


def softmax_weights(x: Floats, temperature: float, runtime: Runtime) -> Floats:
    out = np.full(x.shape, np.nan, dtype=np.float32)
    _kernels.softmax_weights(runtime, x, temperature, out)
    return out


def softmax(x: Floats, temperature: float, runtime: Runtime) -> Floats:
    out = np.full(x.shape, np.nan, dtype=np.float32)
    _kernels.softmax(runtime, x, temperature, out)
    return out


def log_normalizers(x: Floats, runtime: Runtime) -> Doubles:
    out = np.empty(len(x))
    _kernels.log_normalizers(runtime, x, out)
    return out


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_softmax_and_its_weights(width: int, temperature: float) -> None:
    x = normal(3, width, scale=8)
    # As the kernel has it, rounded: the difference, then the quotient.
    scaled = ((x - x.max(axis=1, keepdims=True)) / np.float32(temperature)).astype(np.float64)
    exact = np.where(scaled < -87.3365, 0.0, np.exp(scaled))
    weights = same_bits(lambda runtime: softmax_weights(x, temperature, runtime))
    np.testing.assert_allclose(weights, exact, rtol=1.1 * 2.0**-23, atol=0)
    assert weights.max(axis=1).tolist() == [1, 1, 1]
    got = same_bits(lambda runtime: softmax(x, temperature, runtime))
    np.testing.assert_allclose(got, exact / exact.sum(axis=1, keepdims=True), rtol=(1.1 + 1.1 + 1) * 2.0**-23, atol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_log_normalizers(width: int) -> None:
    x = normal(3, width, scale=5)
    wide = x.astype(np.float64)
    exact = np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)) + wide.max(axis=1)
    got = same_bits(lambda runtime: log_normalizers(x, runtime))
    # Each difference is rounded (at most 40 · 2^-24), each power within 1.1 ulp.
    np.testing.assert_allclose(got, exact, rtol=0, atol=40 * 2.0**-24 + 1.1 * 2.0**-23)


def test_a_forbidden_word_has_no_weight_and_what_is_no_number_shows() -> None:
    x = normal(5, 100)
    x[0, 7] = -np.inf
    x[1, 50], x[2, 50], x[3] = np.nan, np.inf, -np.inf
    for runtime in RUNTIMES:
        assert softmax_weights(x, 1.0, runtime)[0, 7] == 0 and softmax(x, 0.5, runtime)[0, 7] == 0
        assert np.isfinite(log_normalizers(x, runtime)).tolist() == [True, False, False, False, True]
        assert np.isfinite(softmax(x, 1.0, runtime).sum(axis=1)).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_temperatures_are_greedy_or_uniform(temperature: float) -> None:
    x = np.array([[-np.inf, 1, 5, 5, -7]], dtype=np.float32)
    expected = [0, 0, 0.5, 0.5, 0] if temperature < 1 else [0, 0.25, 0.25, 0.25, 0.25]
    assert softmax(x, temperature, RUNTIMES[0])[0].tolist() == expected


# -- sums and the nucleus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("block", [1, 16, 50, 64, 1000])
def test_block_sums_are_exact_to_float64(size: int, block: int) -> None:
    x = normal(size)
    num_blocks = -(-size // block)

    def sums(runtime: Runtime) -> Doubles:
        out = np.empty(num_blocks)
        _kernels.block_sums(runtime, x, block, out)
        return out

    exact = [x[i * block : (i + 1) * block].astype(np.float64).sum() for i in range(num_blocks)]
    np.testing.assert_allclose(same_bits(sums), exact, rtol=0, atol=200 * 10 * 2.0**-53)


@pytest.mark.parametrize("size", [1, 5, 255, 257, 3000, 20_000])
@pytest.mark.parametrize("fraction", [1e-9, 0.3, 0.95, 0.99999, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0, 30.0])
def test_nucleus_is_the_head_of_a_sort_by_mass(size: int, fraction: float, spread: float) -> None:
    # Multiples of 2^-12: their sums are exact in any order, so the edge is exact as well.
    weights = np.ceil(np.exp(-spread * np.random.default_rng(2).random(size)) * 4096).astype(np.float32) / 4096
    order = np.argsort(-weights, kind="stable")
    running = np.cumsum(weights[order], dtype=np.float64)
    num_kept = int(np.searchsorted(running, fraction * running[-1])) + 1

    def kept(runtime: Runtime) -> npt.NDArray[np.int32]:
        ids = np.empty(size, dtype=np.int32)
        return ids[: _kernels.nucleus(runtime, weights, fraction, ids)]

    np.testing.assert_array_equal(same_bits(kept), np.sort(order[:num_kept]))


# -- arguments ------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_with_what_was_needed() -> None:
    x, runtime = normal(2, 10), RUNTIMES[0]
    for k in (0, 11):
        with pytest.raises(ValueError, match=f"k must be from 1 to 10, but is {k}"):
            top_k(x, k, runtime)
    with pytest.raises(ValueError, match="ids: axis 1 must be 3, but is 4"):
        _kernels.top_k(runtime, x, 3, np.empty((2, 4), dtype=np.int32), np.empty((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        softmax(x, 0.0, runtime)
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1"):
        _kernels.nucleus(runtime, x[0], 1.5, np.empty(10, dtype=np.int32))
    with pytest.raises(ValueError, match="the rows must not be empty"):
        log_normalizers(x[:, :0], runtime)
