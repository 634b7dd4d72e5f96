"""Continuous batching: budgets, order, chunks, and that every cache is freed once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from generation_fakes import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.errors import ConfigError
from gemma2.generation import Request, RequestStatus, Scheduler
from gemma2.sampling import SamplingParams


def new_request(name: str, num_prompt_tokens: int, max_tokens: int = 10) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=np.full(num_prompt_tokens, 5, dtype=np.int32),
        params=SamplingParams(temperature=0, ignore_eos=True),
        tokenizer=small_tokenizer(),
        max_tokens=max_tokens,
    )


def new_scheduler(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[Scheduler, list[int]]:
    freed: list[int] = []
    scheduler = Scheduler(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, free_sequence=freed.append
    )
    return scheduler, freed


def run_step(scheduler: Scheduler) -> list[tuple[str, int, int, int]]:
    """Runs a step with a model that always says token 9; returns (request, position, tokens, logits) of each part."""
    schedule = scheduler.schedule()
    if schedule is None:
        return []
    scheduler.mark_computed(schedule)
    parts = []
    for request, step in zip(schedule.requests, schedule.batch.steps, strict=True):
        parts.append((request.request_id, step.position, len(step.token_ids), step.num_logits))
        if step.num_logits:
            request.draw(np.eye(1, small_tokenizer().vocab_size, 9, dtype=np.float32)[0])
            if request.is_finished:
                scheduler.remove(request)
    return parts


def test_decoding_goes_on_while_a_long_prompt_is_read_in_chunks() -> None:
    scheduler, freed = new_scheduler(4, 8)
    for name, length in (("a", 3), ("long", 14), ("b", 2)):
        scheduler.add(new_request(name, length, max_tokens=4))
    assert run_step(scheduler) == [("a", 0, 3, 1), ("long", 0, 5, 0)]
    assert run_step(scheduler) == [("a", 3, 1, 1), ("long", 5, 7, 0)]
    # The rest of the long prompt leaves room, so the next one in the queue is admitted.
    assert run_step(scheduler) == [("a", 4, 1, 1), ("long", 12, 2, 1), ("b", 0, 2, 1)]
    assert run_step(scheduler) == [("a", 5, 1, 1), ("long", 14, 1, 1), ("b", 2, 1, 1)]
    assert run_step(scheduler) == [("long", 15, 1, 1), ("b", 3, 1, 1)]
    assert freed == [0]
    assert run_step(scheduler) == [("long", 16, 1, 1), ("b", 4, 1, 1)]
    assert run_step(scheduler) == []
    assert sorted(freed) == [0, 1, 2]


def test_first_come_first_served_and_a_finished_one_makes_room() -> None:
    scheduler, _ = new_scheduler(2, 100)
    requests = [new_request(name, 1, max_tokens) for name, max_tokens in (("a", 2), ("b", 1), ("c", 1), ("d", 1))]
    for request in requests:
        scheduler.add(request)
    assert (scheduler.num_waiting, scheduler.num_running) == (4, 0)
    assert [part[0] for part in run_step(scheduler)] == ["a", "b"]
    assert [request.status for request in requests] == [
        RequestStatus.RUNNING,
        RequestStatus.FINISHED,
        RequestStatus.WAITING,
        RequestStatus.WAITING,
    ]
    assert (scheduler.num_waiting, scheduler.num_running) == (2, 1)
    assert [part[0] for part in run_step(scheduler)] == ["a", "c"]
    assert [part[0] for part in run_step(scheduler)] == ["d"]


def test_a_chunk_hands_out_the_right_tokens() -> None:
    scheduler, _ = new_scheduler(1, 4)
    request = Request(
        request_id="a",
        prompt_token_ids=np.arange(10, 20, dtype=np.int32),
        params=SamplingParams(),
        tokenizer=small_tokenizer(),
        max_tokens=1,
    )
    scheduler.add(request)
    chunks = []
    for _ in range(3):
        schedule = scheduler.schedule()
        assert schedule is not None
        scheduler.mark_computed(schedule)
        chunks.append(schedule.batch.steps[0].token_ids.tolist())
    assert chunks == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


def test_removing_a_waiting_request_frees_nothing() -> None:
    scheduler, freed = new_scheduler(1, 4)
    first, second = new_request("a", 2), new_request("b", 2)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    scheduler.remove(second)
    assert (freed, scheduler.num_waiting) == ([], 0)
    scheduler.remove(first)
    assert (freed, scheduler.num_running) == ([0], 0)
    assert scheduler.schedule() is None


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_load_keeps_the_budgets_and_starves_nobody(
    max_num_seqs: int, more: int, arrivals: list[tuple[int, int, int]], random: Any
) -> None:
    scheduler, freed = new_scheduler(max_num_seqs, max_num_seqs + more)
    by_name = {str(i): new_request(str(i), length, tokens) for i, (_, length, tokens) in enumerate(arrivals)}
    started: list[str] = []
    running: set[str] = set()
    for step in range(2000):
        for index, (arrival, _, _) in enumerate(arrivals):
            if arrival == step:
                scheduler.add(by_name[str(index)])
        parts = run_step(scheduler)
        assert sum(part[2] for part in parts) <= max_num_seqs + more
        assert len(parts) <= max_num_seqs
        names = [part[0] for part in parts]
        assert running <= set(names), "a running request got no token"
        started += [name for name in names if name not in started]
        running = {name for name in names if not by_name[name].is_finished}
        if running and random.random() < 0.1:
            aborted = by_name[random.choice(sorted(running))]
            aborted.abort()
            scheduler.remove(aborted)
            running.remove(aborted.request_id)
        if step > 6 and not parts:
            break
    assert all(request.is_finished for request in by_name.values())
    assert sorted(freed) == list(range(len(arrivals)))
    assert started == sorted(by_name, key=lambda name: (arrivals[int(name)][0], int(name)))


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "words"),
    [
        (0, 8, "max_num_seqs must be a whole number of at least 1, but is 0"),
        (1, 0, "max_num_batched_tokens must be a whole number"),
        (True, 8, "max_num_seqs must be"),
        (9, 8, "at least max_num_seqs.*but they are 8 and 9"),
    ],
)
def test_limits_that_cannot_work_are_refused(max_num_seqs: int, max_num_batched_tokens: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        new_scheduler(max_num_seqs, max_num_batched_tokens)
