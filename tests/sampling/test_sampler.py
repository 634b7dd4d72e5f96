"""Draws: seeds, frequencies, ties, log-probabilities, and logits that cannot be drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.errors import SamplingError
from gemma2.sampling import SampledToken, Sampler, SamplingParams, TokenLogprob
from gemma2.sampling.sampler import BLOCK, _first_above, _index_at


def logits_of(*probabilities: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.log(np.array(probabilities, dtype=np.float32))


def rows(num_rows: int, vocab_size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab_size)) * 2).astype(np.float32)


def draw(params: SamplingParams, logits: np.ndarray[Any, np.dtype[np.float32]]) -> list[int]:
    sampler = Sampler(params)
    return [sampler.sample(row).token_id for row in logits]


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    sampler = Sampler(SamplingParams(temperature=0))
    assert sampler.sample(np.array([0, 5, 5, 1], dtype=np.float32)) == SampledToken(token_id=1)
    # The filters cannot change what greedy takes; the penalty can.
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=2.0, top_k=1, top_p=0.1, min_p=1.0))
    assert sampler.sample(np.array([0, 5, 4, 1], dtype=np.float32), [1]).token_id == 2


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    logits = rows(50, 1000)
    first = draw(SamplingParams(seed=7), logits)
    assert draw(SamplingParams(seed=7), logits) == first
    assert draw(SamplingParams(seed=8), logits) != first
    assert draw(SamplingParams(seed=-7), logits) != first


def test_without_a_seed_every_request_draws_afresh() -> None:
    logits = rows(50, 1000)
    assert draw(SamplingParams(), logits) != draw(SamplingParams(), logits)


GOLDEN_TOKENS = [4883, 1896, 4615, 1303, 1590, 585, 1205, 1590]


def test_seeded_tokens_are_these_in_every_version() -> None:
    # Golden: who notes a seed wants the same text after an update of this package or of numpy.
    logits = (3 * np.sin(0.7 * np.arange(8 * 5000))).reshape(8, 5000).astype(np.float32)
    assert draw(SamplingParams(seed=1234), logits) == GOLDEN_TOKENS


def test_the_nth_token_has_the_nth_draw_whatever_came_before() -> None:
    logits = rows(20, 500)
    plain = draw(SamplingParams(seed=3), logits)
    certain = logits.copy()
    certain[:10] = -np.inf
    certain[:10, 17] = 0.0  # ten rows that leave no choice
    mixed = draw(SamplingParams(seed=3), certain)
    assert mixed[:10] == [17] * 10
    assert mixed[10:] == plain[10:]


def test_interleaved_samplers_do_not_touch_each_other_or_numpys_global_state() -> None:
    logits = rows(30, 500)
    alone = draw(SamplingParams(seed=3), logits)
    mine, other = Sampler(SamplingParams(seed=3)), Sampler(SamplingParams(seed=4))
    interleaved = []
    for row in logits:
        other.sample(row)
        np.random.seed(0)
        np.random.random(3)
        interleaved.append(mine.sample(row).token_id)
        other.sample(row)
    assert interleaved == alone


# Critical values of chi-square at p = 0.001; with fixed seeds the outcome is fixed too.
@pytest.mark.parametrize(
    ("values", "expected", "critical"),
    [
        ({}, [0.4, 0.25, 0.2, 0.1, 0.05], 18.47),
        ({"top_k": 3}, [0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0, 0], 13.82),
        ({"top_p": 0.6}, [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0], 10.83),
        ({"min_p": 0.2}, [0.4 / 0.95, 0.25 / 0.95, 0.2 / 0.95, 0.1 / 0.95, 0], 16.27),
        ({"temperature": 0.5}, [0.16 / 0.275, 0.0625 / 0.275, 0.04 / 0.275, 0.01 / 0.275, 0.0025 / 0.275], 18.47),
    ],
    ids=str,
)
@pytest.mark.parametrize("one_sampler", [True, False])
def test_frequencies(values: dict[str, Any], expected: list[float], critical: float, one_sampler: bool) -> None:
    logits = logits_of(0.4, 0.25, 0.2, 0.1, 0.05)
    num_draws = 3000
    if one_sampler:
        tokens = draw(SamplingParams(seed=11, **values), np.tile(logits, (num_draws, 1)))
    else:  # the first draws of neighbouring seeds must be as random as one seed's draws
        tokens = [Sampler(SamplingParams(seed=s, **values)).sample(logits).token_id for s in range(num_draws)]
    observed = np.bincount(tokens, minlength=5)
    wanted = np.array(expected) * num_draws
    assert (observed[wanted == 0] == 0).all()
    possible = wanted > 0
    assert (((observed - wanted) ** 2)[possible] / wanted[possible]).sum() < critical


def test_frequencies_in_a_vocabulary_of_many_blocks() -> None:
    # 5000 tokens of which those divisible by 700 hold all the mass: 8 of them, spread over 5 blocks.
    logits = np.full(5000, -np.inf, dtype=np.float32)
    logits[::700] = 0.0
    tokens = draw(SamplingParams(seed=5), np.tile(logits, (2000, 1)))
    observed = np.bincount(tokens, minlength=5000)[::700]
    assert observed.sum() == 2000
    assert ((observed - 250) ** 2 / 250).sum() < 24.32


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.5, 0.99]),
    st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2.0**-53]),
)
def test_the_drawn_index_is_where_the_running_sum_passes_the_fraction(
    size: int, seed: int, share_of_zeros: float, fraction: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.random(size).astype(np.float32)
    weights[rng.random(size) < share_of_zeros] = 0
    weights[rng.integers(size)] = 1
    index = _index_at(weights, fraction)
    assert weights[index] > 0
    running = np.cumsum(weights, dtype=np.float64)
    slack = 1e-12 * running[-1]
    assert running[index] >= fraction * running[-1] - slack
    assert running[index] - weights[index] <= fraction * running[-1] + slack


def test_a_draw_rounded_to_the_very_end_still_takes_a_token_with_weight() -> None:
    assert _first_above(np.array([1.0, 2.0, 0.0]), 3.0) == (1, 1.0)


def test_logprobs_are_the_models_own_whatever_the_parameters() -> None:
    logits = rows(1, 400)[0]
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(temperature=0.3, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.8, seed=1, logprobs=4)
    sampled = Sampler(params).sample(logits, np.argsort(-logits)[:3])
    assert sampled.logprob == pytest.approx(exact[sampled.token_id], abs=1e-6)
    best = np.argsort(-exact)[:4]
    assert [token_id for token_id, _ in sampled.top_logprobs] == best.tolist()
    np.testing.assert_allclose([logprob for _, logprob in sampled.top_logprobs], exact[best], atol=1e-6)


def test_logprobs_0_reports_the_drawn_token_only_and_none_reports_nothing() -> None:
    logits = logits_of(0.5, 0.5)
    drawn = Sampler(SamplingParams(temperature=0, logprobs=0)).sample(logits)
    assert drawn.logprob == pytest.approx(np.log(0.5)) and drawn.top_logprobs == ()
    assert Sampler(SamplingParams(temperature=0)).sample(logits).logprob is None


def test_top_logprobs_of_equals_come_in_the_order_of_ids() -> None:
    sampled = Sampler(SamplingParams(temperature=0, logprobs=3)).sample(np.array([0, 2, 1, 2, 1], dtype=np.float32))
    assert [entry.token_id for entry in sampled.top_logprobs] == [1, 3, 2]
    assert isinstance(sampled.top_logprobs[0], TokenLogprob)
    sampled = Sampler(SamplingParams(temperature=0, logprobs=20)).sample(np.zeros(300, dtype=np.float32))
    assert [entry.token_id for entry in sampled.top_logprobs] == list(range(20))


def test_more_alternatives_than_words_gives_all_words() -> None:
    sampled = Sampler(SamplingParams(temperature=0, logprobs=20)).sample(logits_of(0.5, 0.3, 0.2))
    assert [entry.token_id for entry in sampled.top_logprobs] == [0, 1, 2]


def test_logprobs_of_capped_logits_do_not_overflow() -> None:
    logits = np.full(256, 3e4, dtype=np.float32)
    sampled = Sampler(SamplingParams(temperature=0, logprobs=0)).sample(logits)
    assert sampled.logprob == pytest.approx(-np.log(256), abs=1e-3)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0, np.nan, 1], "1 of 3 logits are NaN"),
        ([np.inf, 0, np.inf], "2 of 3 logits are \\+inf"),
        ([-np.inf] * 3, "all 3 logits are -inf"),
    ],
)
def test_logits_that_cannot_be_drawn_from_are_refused(temperature: float, bad: list[float], words: str) -> None:
    with pytest.raises(SamplingError, match=words):
        Sampler(SamplingParams(temperature=temperature)).sample(np.array(bad, dtype=np.float32))


def test_the_logits_are_not_changed() -> None:
    logits = rows(1, 300)[0]
    before = logits.copy()
    params = SamplingParams(temperature=0.5, top_k=20, top_p=0.5, repetition_penalty=2, logprobs=3)
    Sampler(params).sample(logits, [1, 2, 3])
    Sampler(params.replace(top_k=None)).sample(logits, [1, 2, 3])
    np.testing.assert_array_equal(logits, before)


def test_a_penalty_counts_a_token_once_however_often_it_was_seen() -> None:
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.5))
    assert sampler.sample(np.array([6, 3.9], dtype=np.float32), [0, 0, 0]).token_id == 0  # 6 / 1.5 = 4
