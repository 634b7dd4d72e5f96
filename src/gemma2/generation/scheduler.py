"""Continuous batching: which tokens of which requests go through the model next.

Every step is one `StepBatch` of at most `max_num_batched_tokens` tokens. Each running request first gets what it
needs: one token if it is decoding, the rest of its prompt if it is not. What is left of the budget admits waiting
requests, first come first served. A prompt that does not fit the rest of the budget is cut, and goes on in the next
step (chunked prefill): so no answer waits for a long prompt to be read. Words and rules are those of vLLM's scheduler.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gemma2.errors import ConfigError
from gemma2.generation.request import Request, RequestStatus
from gemma2.step import SequenceStep, StepBatch


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One step: the batch, and whose steps it holds."""

    batch: StepBatch
    requests: tuple[Request, ...]
    """In the order of `batch.steps`."""


class Scheduler:
    """Queues requests, gives them sequence ids, and fills batches.

    Args:
        max_num_seqs: the most requests that run at once, each with a cache in the backend.
        max_num_batched_tokens: the most tokens of one step; at least `max_num_seqs`, so that all can decode.
        free_sequence: forgets a sequence's cache; called once for each request that ran.

    Raises:
        ConfigError: a limit is out of range.
    """

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int, free_sequence: Callable[[int], None]) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, but is {value!r}")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens must be at least max_num_seqs, so that every running request gets its token, "
                f"but they are {max_num_batched_tokens} and {max_num_seqs}"
            )
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._free_sequence = free_sequence
        self._sequence_ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their first step."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many requests have a cache in the backend."""
        return len(self._running)

    def new_sequence_id(self) -> int:
        """Returns an id that this scheduler never gave before."""
        return next(self._sequence_ids)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue."""
        self._waiting.append(request)

    def schedule(self) -> Schedule | None:
        """Chooses the next step; None if there is nothing to do.

        The caller runs the batch and then reports to `mark_computed`.
        """
        steps: list[SequenceStep] = []
        budget = self._max_num_batched_tokens
        # Only the last admitted request can have a part of its prompt left, as only it can have met the budget's end.
        # So whoever decodes stands before whoever still reads, and every running request gets at least one token.
        for request in self._running:
            steps.append(_next_step(request, budget))
            budget -= len(steps[-1].token_ids)
        while budget and self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting.popleft()
            request.sequence_id = self.new_sequence_id()
            request.status = RequestStatus.RUNNING
            self._running.append(request)
            steps.append(_next_step(request, budget))
            budget -= len(steps[-1].token_ids)
        if not steps:
            return None
        return Schedule(batch=StepBatch(steps=tuple(steps)), requests=tuple(self._running))

    def mark_computed(self, schedule: Schedule) -> None:
        """Notes that the backend has run the step."""
        for request, step in zip(schedule.requests, schedule.batch.steps, strict=True):
            request.num_computed_tokens += len(step.token_ids)

    def remove(self, request: Request) -> None:
        """Takes a request out of the queue or out of the running ones, and frees its cache."""
        # Ctrl-C in `schedule` may have left it in neither.
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._running.remove(request)
        if request.sequence_id is not None:
            self._free_sequence(request.sequence_id)


def _next_step(request: Request, budget: int) -> SequenceStep:
    """Returns as much of the request's tokens as the budget allows, with logits if that reaches the last one."""
    assert budget > 0 and request.sequence_id is not None
    start = request.num_computed_tokens
    end = min(request.num_tokens, start + budget)
    return SequenceStep(
        sequence_id=request.sequence_id,
        token_ids=request.token_ids[start:end],
        position=start,
        num_logits=int(end == request.num_tokens),
    )
