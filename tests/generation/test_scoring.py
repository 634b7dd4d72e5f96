"""Scores of many texts at once: exact, in order, with shared contexts read once and no logits beyond the limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from generation_fakes import FakeBackend, small_tokenizer

from gemma2.api import BUNDLED_FOLDER, load
from gemma2.errors import SamplingError
from gemma2.generation import ContinuationScore, ScoringTask, score_continuations, scoring
from gemma2.step import TokenIds

VOCAB_SIZE = small_tokenizer().vocab_size


def ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def random_ids(length: int, seed: int) -> TokenIds:
    return np.random.default_rng(seed).integers(3, 300, length).astype(np.int32)


def scores_of(backend: Any, tasks: Any, max_num_batched_tokens: int = 16) -> list[tuple[ContinuationScore, ...]]:
    return list(
        score_continuations(
            backend,
            tasks,
            new_sequence_id=itertools.count().__next__,
            vocab_size=VOCAB_SIZE,
            max_num_batched_tokens=max_num_batched_tokens,
        )
    )


def one_by_one(backend: FakeBackend, context: TokenIds, continuation: TokenIds) -> tuple[list[float], bool]:
    """What the model says of each token of a continuation, from its logits of every beginning."""
    history, logprobs, is_greedy = context.tolist(), [], True
    for token_id in continuation.tolist():
        logits = backend.logits_after(history).astype(np.float64)
        logprobs.append(logits[token_id] - np.log(np.exp(logits).sum()))
        is_greedy &= token_id == int(logits.argmax())
        history.append(token_id)
    return logprobs, is_greedy


TASKS = [
    ScoringTask(context=ids(2), continuations=(random_ids(40, 1),)),
    ScoringTask(context=random_ids(20, 2), continuations=(ids(5), ids(7, 8, 9), ids(5, 300), random_ids(30, 3))),
    ScoringTask(context=random_ids(1, 4), continuations=(ids(9), ids(9))),
    *(ScoringTask(context=random_ids(3, seed), continuations=(random_ids(2, seed + 1),)) for seed in range(10, 50, 2)),
    ScoringTask(context=random_ids(33, 6), continuations=tuple(random_ids(3, seed) for seed in range(60, 100))),
]


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 16, 1000])
@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_every_continuation_is_scored_as_if_alone(
    max_num_batched_tokens: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend(max_position_embeddings=64)
    monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", rows_at_once * 4 * backend.config.vocab_size)
    found = scores_of(backend, TASKS, max_num_batched_tokens)
    assert len(found) == len(TASKS)
    for task, scores in zip(TASKS, found, strict=True):
        assert len(scores) == len(task.continuations)
        for continuation, score in zip(task.continuations, scores, strict=True):
            logprobs, is_greedy = one_by_one(backend, task.context, continuation)
            np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-5)
            assert score.is_greedy == is_greedy
    assert backend.most_rows <= rows_at_once
    assert all(sum(n for _, n in batch) <= max_num_batched_tokens for batch in backend.batches)
    assert all(len(batch) <= scoring.MAX_NUM_SEQS for batch in backend.batches)
    assert backend.caches == {}


def test_a_shared_context_is_read_once_and_the_last_token_never() -> None:
    backend = FakeBackend()
    task = ScoringTask(context=random_ids(10, 0), continuations=(ids(5), ids(6, 7, 8), ids(9, 10)))
    scores_of(backend, [task])
    assert backend.batches == [[(0, 10)], [(1, 2), (2, 1)]]


def test_short_texts_share_steps() -> None:
    backend = FakeBackend()
    scores_of(backend, [ScoringTask(context=ids(2), continuations=(ids(5, 6, 7),))] * 8)
    assert [sum(n for _, n in batch) for batch in backend.batches] == [16, 8]


def test_greedy_is_what_greedy_decoding_writes() -> None:
    backend = FakeBackend()
    history = [2]
    for _ in range(4):
        history.append(int(backend.logits_after(history).argmax()))
    other = [*history[1:4], 5 if history[4] != 5 else 6]
    ((greedy, not_greedy),) = scores_of(
        backend, [ScoringTask(context=ids(2), continuations=(ids(*history[1:]), ids(*other)))]
    )
    assert greedy.is_greedy and not not_greedy.is_greedy


def test_tasks_are_taken_as_there_is_room_and_results_come_as_they_are_known() -> None:
    taken = []

    def tasks() -> Iterator[ScoringTask]:
        for number in itertools.count():
            taken.append(number)
            yield ScoringTask(context=ids(2), continuations=(random_ids(8, number),))

    backend = FakeBackend()
    scores = score_continuations(
        backend,
        tasks(),
        new_sequence_id=itertools.count().__next__,
        vocab_size=VOCAB_SIZE,
        max_num_batched_tokens=16,
    )
    next(scores)
    assert taken == [0, 1]
    next(scores), next(scores)
    assert taken == [0, 1, 2, 3]
    scores.close()
    assert backend.caches == {}


@pytest.mark.parametrize("fail_at", range(4))
def test_an_error_frees_all_caches(fail_at: int) -> None:
    backend = FakeBackend()
    backend.fail_at = fail_at
    with pytest.raises(MemoryError):
        scores_of(backend, TASKS[1:])
    assert backend.caches == {}


def test_logits_that_are_no_numbers_are_an_error() -> None:
    class Broken(FakeBackend):
        def logits_after(self, history: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
            return np.full(VOCAB_SIZE, np.nan if len(history) > 12 else 1.0, dtype=np.float32)

    backend = Broken()
    with pytest.raises(SamplingError, match="logits are NaN"):
        scores_of(backend, TASKS[1:])
    assert backend.caches == {}


def _torch_llm() -> Any:
    return load(BUNDLED_FOLDER, backend="torch")


def _cpu_llm() -> Any:
    return load(BUNDLED_FOLDER, backend="cpu", num_threads=1)


@pytest.mark.parametrize(("make", "tolerance"), [(_cpu_llm, 0.0), (_torch_llm, 2e-5)], ids=["cpu", "torch"])
def test_forks_of_real_models_are_as_good_as_reading_all_again(make: Callable[[], Any], tolerance: float) -> None:
    """The context ends within a block, beyond the local layers' window; the answers are long enough to slide."""
    torch.set_num_threads(1)
    engine = make().engine
    random = np.random.default_rng(0)
    context = np.concatenate([[2], random.integers(200, 8000, 149)]).astype(np.int32)
    answers = tuple(random.integers(200, 8000, length).astype(np.int32) for length in (1, 3, 40))
    (together,) = engine.score_continuations([ScoringTask(context=context, continuations=answers)])
    apart = engine.score_continuations([ScoringTask(context=context, continuations=(answer,)) for answer in answers])
    for ours, (theirs,) in zip(together, apart, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=tolerance)
    (wrong,) = engine.score_continuations([ScoringTask(context=context[:-1], continuations=answers)])
    assert abs(wrong[2].logprobs - together[2].logprobs).max() > 1e-2
