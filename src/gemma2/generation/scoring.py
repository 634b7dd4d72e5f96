"""How likely a model finds given texts: many at once, each token's log-probability, and no logits kept.

Everything that is scored is one shape, a `ScoringTask`: some context and one or more continuations of it. A window of
a long text has one continuation. The answers of a multiple-choice question are several: their context is read once, and
each answer goes on from there, from a fork of its cache.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2.sampling import check_logits, log_normalizer
from gemma2.step import Backend, Logits, SequenceStep, StepBatch, TokenIds

MAX_LOGITS_BYTES: Final = 128 * 2**20
"""Of one step of scoring. 8192 tokens over 256,000 words would be 7.8 GiB at once."""
MAX_NUM_SEQS: Final = 32
"""The most sequences in one step of scoring, each with a cache in the backend."""


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """A context, and what may follow it."""

    context: TokenIds
    """(n,) int32, n ≥ 1. It is read and not scored."""
    continuations: tuple[TokenIds, ...]
    """At least one, each (m,) int32 with m ≥ 1. Each is scored as if it alone followed the context."""


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """What the model thought of one continuation."""

    logprobs: npt.NDArray[np.float32]
    """(m,) float32, base e: of each of its tokens, given the context and the tokens before it."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one there, so that greedy decoding would have written it."""


def score_continuations(
    backend: Backend,
    tasks: Iterable[ScoringTask],
    *,
    new_sequence_id: Callable[[], int],
    vocab_size: int,
    max_num_batched_tokens: int,
) -> Generator[tuple[ContinuationScore, ...], None, None]:
    """Scores tasks, several in one step of the model where they are short.

    Tasks are taken one by one as there is room for them, so that they may be made on the way. Only rows whose logits
    are needed get any, at most `MAX_LOGITS_BYTES` in one step. Closing the iterator early frees all caches.

    Args:
        backend: the model.
        tasks: what to score.
        new_sequence_id: gives an id that the backend does not know yet.
        vocab_size: how many of the model's rows are words; more are padding.
        max_num_batched_tokens: the most tokens of one step.

    Yields:
        For each task, in order, a score for each of its continuations.

    Raises:
        SamplingError: the logits hold NaN or infinity.
    """
    pool = _Pool(backend, tasks, new_sequence_id, vocab_size)
    try:
        while steps := pool.next_steps(max_num_batched_tokens):
            pool.take(steps, backend.forward(StepBatch(steps=steps)))
            yield from pool.finished_tasks()
    finally:
        pool.free_all()


def score(
    backend: Backend,
    token_ids: TokenIds,
    *,
    sequence_id: int,
    vocab_size: int,
    max_num_batched_tokens: int,
) -> npt.NDArray[np.float32]:
    """Computes the log-probability of each token after the first, given those before it.

    Args:
        backend: the model.
        token_ids: (n,) int32, n ≥ 1, each below `vocab_size`.
        sequence_id: an id that the backend does not know yet.
        vocab_size: how many of the model's rows are words; more are padding.
        max_num_batched_tokens: the most tokens of one step.

    Returns:
        (n - 1,) float32, base e.

    Raises:
        SamplingError: the logits hold NaN or infinity.
    """
    if len(token_ids) == 1:
        return np.empty(0, dtype=np.float32)
    task = ScoringTask(context=token_ids[:1], continuations=(token_ids[1:],))
    ((scored,),) = score_continuations(
        backend,
        [task],
        new_sequence_id=lambda: sequence_id,
        vocab_size=vocab_size,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    return scored.logprobs


class _Pool:
    """The sequences that are on their way through the model, and the tasks that they belong to."""

    def __init__(
        self, backend: Backend, tasks: Iterable[ScoringTask], new_sequence_id: Callable[[], int], vocab_size: int
    ) -> None:
        self._backend = backend
        self._coming = iter(tasks)
        self._new_sequence_id = new_sequence_id
        self._vocab_size = vocab_size
        self._max_rows = max(1, MAX_LOGITS_BYTES // (4 * backend.config.vocab_size))
        # What was begun stands first, so that few caches are half full at any time.
        self._running: deque[_Run] = deque()
        self._cached: set[int] = set()
        self._unfinished: deque[list[_Score]] = deque()

    def next_steps(self, num_tokens: int) -> tuple[SequenceStep, ...]:
        """Fills a step with at most so many tokens; empty if nothing is left to do.

        Only the last sequence in it can have a part left over, as only it can have met a limit.
        """
        assert num_tokens >= 1
        steps: list[SequenceStep] = []
        num_rows = self._max_rows
        while num_tokens and num_rows and len(steps) < MAX_NUM_SEQS:
            if len(steps) == len(self._running) and not self._admit():
                break
            step = self._running[len(steps)].next_step(num_tokens, num_rows)
            steps.append(step)
            num_tokens -= len(step.token_ids)
            num_rows -= step.num_logits
        self._cached.update(step.sequence_id for step in steps)
        return tuple(steps)

    def take(self, steps: Sequence[SequenceStep], logits: Logits) -> None:
        """Hands on the logits of the steps, and forks contexts that were read."""
        rows = iter(logits)
        forks: list[_Run] = []
        for step in steps:
            run = self._running[0]
            run.take(step, itertools.islice(rows, step.num_logits), self._vocab_size)
            if not run.is_read:
                break
            for fork in run.forks(self._new_sequence_id):
                self._cached.add(fork.sequence_id)
                self._backend.fork(run.sequence_id, fork.sequence_id)
                forks.append(fork)
            self._backend.free(run.sequence_id)
            self._cached.remove(run.sequence_id)
            self._running.popleft()
        self._running.extendleft(reversed(forks))

    def finished_tasks(self) -> Iterator[tuple[ContinuationScore, ...]]:
        """Yields what is complete, in the order in which tasks came."""
        while self._unfinished and all(score.is_complete for score in self._unfinished[0]):
            yield tuple(score.result() for score in self._unfinished.popleft())

    def free_all(self) -> None:
        """Frees all caches."""
        for sequence_id in self._cached:
            self._backend.free(sequence_id)

    def _admit(self) -> bool:
        """Takes the next task; says whether there was one."""
        task = next(self._coming, None)
        if task is None:
            return False
        scores = [_Score(continuation) for continuation in task.continuations]
        self._unfinished.append(scores)
        self._running.append(_first_run(self._new_sequence_id(), task, scores))
        return True


class _Score:
    """A continuation, and what is known of it so far."""

    def __init__(self, token_ids: TokenIds) -> None:
        assert len(token_ids) > 0
        self.token_ids = token_ids
        self._logprobs = np.empty(len(token_ids), dtype=np.float32)
        self._num_known = 0
        self._is_greedy = True

    def take(self, row: Logits) -> None:
        """Takes the (V,) logits of its next token."""
        token_id = int(self.token_ids[self._num_known])
        likeliest = int(row.argmax())  # of NaN, if there is one
        if not np.isfinite(row[likeliest]):
            check_logits(row)
        self._logprobs[self._num_known] = float(row[token_id]) - log_normalizer(row)
        self._is_greedy &= token_id == likeliest
        self._num_known += 1

    @property
    def is_complete(self) -> bool:
        return self._num_known == len(self.token_ids)

    def result(self) -> ContinuationScore:
        return ContinuationScore(logprobs=self._logprobs, is_greedy=self._is_greedy)


class _Run:
    """A sequence on its way through the model.

    Args:
        sequence_id: names its cache.
        token_ids: what is to be read, from `position` on.
        position: how many tokens its cache holds already, shared with the sequence it was forked from.
        num_scored: of how many of the last tokens the logits are wanted.
        scores: to whom they belong: all logits to the one, or the one row to each of several.
    """

    def __init__(
        self, sequence_id: int, token_ids: TokenIds, *, position: int, num_scored: int, scores: list[_Score]
    ) -> None:
        assert 1 <= num_scored <= len(token_ids) and (len(scores) == 1 or num_scored == 1)
        self.sequence_id = sequence_id
        self._token_ids = token_ids
        self._position = position
        self._num_unscored = len(token_ids) - num_scored
        self._scores = scores
        self._num_read = 0

    @property
    def is_read(self) -> bool:
        """Whether all of it went through the model."""
        return self._num_read == len(self._token_ids)

    def next_step(self, num_tokens: int, num_rows: int) -> SequenceStep:
        """As much of what is left as these limits allow, neither of them 0."""
        start = self._num_read
        end = min(len(self._token_ids), start + num_tokens, max(start, self._num_unscored) + num_rows)
        return SequenceStep(
            sequence_id=self.sequence_id,
            token_ids=self._token_ids[start:end],
            position=self._position + start,
            num_logits=max(0, end - max(start, self._num_unscored)),
        )

    def take(self, step: SequenceStep, rows: Iterable[Logits], vocab_size: int) -> None:
        """Notes that the step was run, and hands on its logits."""
        self._num_read += len(step.token_ids)
        for row in rows:
            for one in self._scores:
                one.take(row[:vocab_size])

    def forks(self, new_sequence_id: Callable[[], int]) -> list[_Run]:
        """After the last step of a context: the continuations that have more than their first token."""
        length = self._position + len(self._token_ids)
        return [
            _Run(
                new_sequence_id(),
                one.token_ids[:-1],
                position=length,
                num_scored=len(one.token_ids) - 1,
                scores=[one],
            )
            for one in self._scores
            if not one.is_complete
        ]


def _first_run(sequence_id: int, task: ScoringTask, scores: list[_Score]) -> _Run:
    """A context with its only continuation, or the context of several. The last token of a text is never read."""
    assert len(task.context) > 0 and scores
    if len(scores) > 1:
        return _Run(sequence_id, task.context, position=0, num_scored=1, scores=scores)
    (continuation,) = task.continuations
    token_ids = np.concatenate([task.context, continuation[:-1]]).astype(np.int32)
    return _Run(sequence_id, token_ids, position=0, num_scored=len(continuation), scores=scores)
