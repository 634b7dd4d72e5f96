"""The filtered distribution against brute force in float64 and against transformers' own processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemma2._kernels import available_isas
from gemma2.errors import ConfigError
from gemma2.sampling import SamplingParams
from gemma2.sampling.filters import candidates, largest, nucleus, one_thread, penalize_repetition

Floats = npt.NDArray[np.float32]


def probabilities(logits: Floats, params: SamplingParams, seen: list[int] | None = None) -> npt.NDArray[np.float64]:
    """The whole filtered distribution, (V,), as this package computes it."""
    if params.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen or [], params.repetition_penalty)
    token_ids, weights = candidates(logits, params)
    whole = np.zeros(len(logits))
    whole[slice(None) if token_ids is None else token_ids] = weights / weights.sum(dtype=np.float64)
    return whole


def brute_force(logits: Floats, params: SamplingParams) -> tuple[dict[int, float], float]:
    """The same by sorting everything, and how near (relative) any token comes to the edge of top-p or min-p."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    if params.top_k is not None:
        order = order[: params.top_k]
    highest = float(logits.max())
    weight = {i: float(np.exp((float(logits[i]) - highest) / params.temperature)) for i in order}
    margin = 1.0
    total, before, kept = sum(weight.values()), 0.0, []
    for i in order:
        if params.top_p < 1:
            margin = min(margin, abs(before / (params.top_p * total) - 1))
        if params.top_p == 1 or before < params.top_p * total:
            kept.append(i)
        before += weight[i]
    if params.min_p > 0:
        margin = min([margin] + [abs(weight[i] / params.min_p - 1) for i in kept])
        kept = [i for i in kept if weight[i] >= params.min_p]
    total = sum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}, margin


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.none() | st.integers(1, 70),
    st.just(1.0) | st.floats(0.01, 0.999),
    st.just(0.0) | st.floats(0.001, 0.999),
)
def test_any_mix_of_filters_is_what_sorting_everything_gives(
    quarters: list[int], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    logits = (np.array(quarters) / 4).astype(np.float32)  # quarters, so that ties are common
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, margin = brute_force(logits, params)
    assume(margin > 1e-5)  # on the very edge, float32 and float64 may differ
    got = probabilities(logits, params)
    assert set(np.flatnonzero(got > 0)) == {i for i, p in expected.items() if p > 0}
    np.testing.assert_allclose([got[i] for i in expected], list(expected.values()), rtol=1e-5)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.99999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
def test_nucleus_of_a_large_vocabulary_is_what_sorting_gives(top_p: float, spread: float) -> None:
    rng = np.random.default_rng(5)
    weights = np.exp(-spread * rng.exponential(size=20_000)).astype(np.float32)
    order = np.argsort(-weights, kind="stable")
    running = np.cumsum(weights[order], dtype=np.float64)
    num_kept = int(np.searchsorted(running, top_p * running[-1])) + 1
    np.testing.assert_array_equal(nucleus(weights, top_p), np.sort(order[:num_kept]))


@pytest.mark.parametrize(
    ("weights", "top_p", "kept"),
    [
        ([1, 1, 1, 1], 0.5, [0, 1]),  # equal weights: the lowest indices, and not one more than needed
        ([1, 1, 1, 1], 0.51, [0, 1, 2]),
        ([1, 1, 1, 1], 1e-9, [0]),
        ([0.25, 1, 0.25, 0.5], 0.5, [1]),
        ([0.25, 1, 0.25, 0.5], 0.76, [0, 1, 3]),
        ([0, 1, 0], 0.9999999, [1]),
        ([1e-30, 1, 1e-38], 0.9999999, [1]),
        ([1], 0.3, [0]),
    ],
)
def test_nucleus_small_truths(weights: list[float], top_p: float, kept: list[int]) -> None:
    assert nucleus(np.array(weights, dtype=np.float32), top_p).tolist() == kept


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3000), st.data(), st.sampled_from([1, 3, 1000]), st.integers(0, 2**32 - 1), st.sampled_from([0, 9])
)
def test_largest_is_the_head_of_a_stable_sort(
    size: int, data: st.DataObject, num_distinct: int, seed: int, num_forbidden: int
) -> None:
    values = np.random.default_rng(seed).integers(0, num_distinct, size).astype(np.float32)
    values[:num_forbidden] = -np.inf
    k = data.draw(st.integers(1, min(size, 40)) | st.integers(1, size))
    expected = np.sort(np.argsort(-values, kind="stable")[:k])
    np.testing.assert_array_equal(largest(values, k), expected)


def test_top_k_with_ties_keeps_exactly_k_and_the_lowest_ids() -> None:
    got = probabilities(np.array([1, 3, 1, 3, 1], dtype=np.float32), SamplingParams(top_k=3))
    assert np.flatnonzero(got).tolist() == [0, 1, 3]


def test_top_p_measures_what_top_k_left() -> None:
    logits = np.log(np.array([0.3, 0.25, 0.2, 0.15, 0.1], dtype=np.float32))
    # Of all, 0.3 + 0.25 is below 0.6 and three are kept; of the two that top-k leaves, the first alone is 0.545.
    assert np.flatnonzero(probabilities(logits, SamplingParams(top_p=0.54))).tolist() == [0, 1]
    assert np.flatnonzero(probabilities(logits, SamplingParams(top_p=0.54, top_k=2))).tolist() == [0]


def test_min_p_comes_after_top_p() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    # min-p first would leave 0.4 and 0.3, of which 0.4 alone is 0.571, and top-p 0.57 would then keep one.
    assert np.flatnonzero(probabilities(logits, SamplingParams(top_p=0.57, min_p=0.6))).tolist() == [0, 1]


def test_a_forbidden_token_is_never_kept_with_weight() -> None:
    logits = np.array([-np.inf, 1, -np.inf, 0], dtype=np.float32)
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.99), SamplingParams(min_p=0.01)):
        assert np.flatnonzero(probabilities(logits, params)).tolist() == [1, 3]
    penalized = penalize_repetition(logits, [0, 1], 1.5)
    np.testing.assert_allclose(penalized, [-np.inf, 1 / 1.5, -np.inf, 0], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 1e-20, 1e20, 1e300])
def test_extreme_temperatures_neither_overflow_nor_warn(temperature: float) -> None:
    logits = np.array([-np.inf, 3e38, -3e38, 3e38], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        got = probabilities(logits, SamplingParams(temperature=temperature))
    assert got[0] == 0 and got[1] == got[3] and abs(got.sum() - 1) < 1e-6


@pytest.mark.parametrize("penalty", [1e-300, 1e-10, 1e10, 1e300])
def test_extreme_penalties_leave_logits_finite(penalty: float) -> None:
    got = penalize_repetition(np.array([-1, 2, 0, 5], dtype=np.float32), [0, 1, 2], penalty)
    assert np.isfinite(got).all()
    assert got[3] == 5


# -- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 64},
        {"top_p": 0.95},
        {"top_p": 0.2},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.7, "top_k": 500, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 2.0, "top_p": 0.97, "min_p": 0.01, "repetition_penalty": 1.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_distribution_is_that_of_transformers(values: dict[str, Any], seed: int) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(3000) * 3).astype(np.float32)
    seen = rng.integers(0, 3000, 200).tolist() + [int(logits.argmax()), int(logits.argmin())] * 2
    params = SamplingParams(**values)

    # Built by transformers' own `generate` machinery's order: penalty, temperature, top-k, top-p, min-p.
    processors = hf.LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())
    expected = torch.softmax(scores[0].double(), dim=-1).numpy()

    got = probabilities(logits, params, seen)
    np.testing.assert_array_equal(np.flatnonzero(got), np.flatnonzero(expected))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-9)


def test_an_instruction_set_that_there_is_not_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA2_ISA", "sse9")
    one_thread.cache_clear()
    with pytest.raises(ConfigError, match=r"GEMMA2_ISA must be an instruction set of this .*, but is 'sse9'"):
        one_thread()
    for name in ("Scalar", "SCALAR", " scalar ", "Auto", ""):
        monkeypatch.setenv("GEMMA2_ISA", name)
        one_thread.cache_clear()
        assert one_thread().isa == ("scalar" if "c" in name.lower() else available_isas()[0])
    monkeypatch.undo()
    assert one_thread().num_threads == 1
