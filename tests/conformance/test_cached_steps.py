"""Prefill in chunks, decode, and mixed batches: the cache must give what one pass over the whole sequence gives."""

from __future__ import annotations

import numpy as np
import pytest
from backends import BackendSpec, excess, run_in_chunks, step
from cases import BASE, LAYOUTS, LENGTH, WINDOW, biting_weights, reference, token_ids

from gemma2.step import StepBatch

CHUNKS = {
    "decode": [1],
    "window_minus_1": [WINDOW - 1],
    "window": [WINDOW],
    "window_plus_1": [WINDOW + 1],
    "prime_below_window": [7],
    "prime_above_window": [29],
    "twice_the_window_and_more": [2 * WINDOW + 3],
    "all_but_one": [LENGTH - 1],
    "growing": [1, 2, 3, 5, 8, 13, 21],
    "shrinking": [41, 13, 5, 1],
    "long_after_short": [3, 1, WINDOW * 4],
}
EDGES = [WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW - 1, 2 * WINDOW, 2 * WINDOW + 1]


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_prefill_in_chunks(spec: BackendSpec, chunks: list[int]) -> None:
    logits = run_in_chunks(spec.make(BASE, biting_weights(BASE)), token_ids(BASE), chunks)
    assert excess(spec.precision, BASE, logits) <= 1


@pytest.mark.parametrize("layout", ["9b", "27b", "all_local", "window_of_one", "other_layer_types"])
def test_decode_of_other_layouts(spec: BackendSpec, layout: str) -> None:
    config = LAYOUTS[layout]
    logits = run_in_chunks(spec.make(config, biting_weights(config)), token_ids(config), [WINDOW + 5, 1])
    assert excess(spec.precision, config, logits) <= 1


@pytest.mark.parametrize("prompt", EDGES)
def test_decode_from_around_the_windows_edge(spec: BackendSpec, prompt: int) -> None:
    logits = run_in_chunks(spec.make(BASE, biting_weights(BASE)), token_ids(BASE), [prompt, 1])
    assert excess(spec.precision, BASE, logits) <= 1


def test_random_chunks(spec: BackendSpec) -> None:
    backend = spec.make(BASE, biting_weights(BASE))
    generator = np.random.default_rng(5)
    for sequence_id in range(6):
        chunks = generator.integers(1, 3 * WINDOW, LENGTH).tolist()
        logits = run_in_chunks(backend, token_ids(BASE), chunks, sequence_id=sequence_id)
        assert excess(spec.precision, BASE, logits) <= 1, chunks


def test_a_long_text_in_long_chunks_and_steps(spec: BackendSpec) -> None:
    """Buffers of the cache are renewed, shrunk and grown several times over 900 tokens."""
    config = BASE.replace(max_position_embeddings=1024, sliding_window=60)
    backend = spec.make(config, biting_weights(config))
    chunks = [500, 1, 1, 70, *[1] * 100, 59, 60, 61, 1]
    assert excess(spec.precision, config, run_in_chunks(backend, token_ids(config, 900), chunks)) <= 1


def test_several_sequences_in_one_batch(spec: BackendSpec) -> None:
    """Three sequences, each at its own place: one prefills while another decodes, logits for some rows only."""
    backend = spec.make(BASE, biting_weights(BASE))
    texts = {number: token_ids(BASE)[: LENGTH - number] for number in (3, 5, 9)}
    rows: dict[int, list[np.ndarray]] = {number: [] for number in texts}
    seen = dict.fromkeys(texts, 0)
    generator = np.random.default_rng(0)
    while any(seen[number] < len(ids) for number, ids in texts.items()):
        steps = []
        for number in generator.permutation(list(texts)).tolist():
            size = int(generator.choice([1, 2, WINDOW + 1]))
            part = texts[number][seen[number] : seen[number] + size]
            if len(part):
                steps.append(step(number, part, seen[number], len(part)))
                seen[number] += len(part)
        logits = backend.forward(StepBatch(steps=tuple(steps)))
        assert logits.shape == (sum(done.num_logits for done in steps), BASE.vocab_size)
        for done in steps:
            rows[done.sequence_id].append(logits[: done.num_logits])
            logits = logits[done.num_logits :]
    for number in texts:
        assert excess(spec.precision, BASE, np.concatenate(rows[number]), length=LENGTH) <= 1


def test_only_the_rows_that_were_asked_for(spec: BackendSpec) -> None:
    backend = spec.make(BASE, biting_weights(BASE))
    ids = token_ids(BASE)
    whole = run_in_chunks(backend, ids, [LENGTH])
    logits = backend.forward(
        StepBatch(steps=(step(1, ids[:30], 0, 0), step(2, ids[:20], 0, 1), step(3, ids[:40], 0, 7)))
    )
    assert logits.shape == (8, BASE.vocab_size)
    tolerance = 2 * reference(BASE).tolerance if spec.precision == "float32" else 1.0
    assert np.abs(logits - np.concatenate([whole[19:20], whole[33:40]])).max() <= tolerance
    nothing = backend.forward(StepBatch(steps=(step(1, ids[30:31], 30, 0),)))
    assert nothing.shape == (0, BASE.vocab_size) and nothing.dtype == np.float32


def test_a_freed_id_starts_anew(spec: BackendSpec) -> None:
    backend = spec.make(BASE, biting_weights(BASE))
    ids = token_ids(BASE)
    first = backend.forward(StepBatch(steps=(step(4, ids[:9], 0, 1),)))
    backend.free(4)
    backend.free(4)
    assert np.array_equal(backend.forward(StepBatch(steps=(step(4, ids[:9], 0, 1),))), first)


@pytest.mark.parametrize(("position", "cached"), [(1, 0), (8, 9), (10, 9), (0, 9)])
def test_a_position_that_does_not_continue_is_refused(spec: BackendSpec, position: int, cached: int) -> None:
    backend = spec.make(BASE, biting_weights(BASE))
    ids = token_ids(BASE)
    if cached:
        backend.forward(StepBatch(steps=(step(0, ids[:cached], 0, 0),)))
    with pytest.raises(ValueError, match=f"position must be {cached}.* but is {position}"):
        backend.forward(StepBatch(steps=(step(1, ids[:5], 0, 0), step(0, ids[:1], position, 1))))
    # Nothing ran: the neighbour's cache is still empty.
    backend.forward(StepBatch(steps=(step(1, ids[:5], 0, 0),)))


@pytest.mark.parametrize("token_id", [-1, BASE.vocab_size])
def test_a_token_outside_the_vocabulary_is_refused(spec: BackendSpec, token_id: int) -> None:
    backend = spec.make(BASE, biting_weights(BASE))
    with pytest.raises(ValueError, match=f"token ids must be from 0 to 159, but one is {token_id}"):
        backend.forward(StepBatch(steps=(step(0, [2, token_id], 0, 1),)))
    backend.forward(StepBatch(steps=(step(0, [2, 3], 0, 1),)))
