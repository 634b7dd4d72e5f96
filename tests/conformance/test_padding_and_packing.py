"""Padding on either side, and several documents in one row: each token must see what it would see alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import torch_model
from cases import BASE, LENGTH, WINDOW, biting_weights, reference, token_ids
from hf_reference import hf_logits

from gemma2.model import Gemma2ForCausalLM, KVCache

TOLERANCE = reference(BASE).tolerance
IDS = torch.from_numpy(token_ids(BASE).astype(np.int64))


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    """The float32 model of the base case."""
    return torch_model(BASE, biting_weights(BASE))


def alone(first: int, last: int) -> np.ndarray:
    """transformers' float64 logits of tokens `first` … `last` - 1 as a sequence of their own."""
    return hf_logits(BASE, biting_weights(BASE), IDS[first:last].numpy().astype(np.int32), torch.float64)


def rows(*spans: tuple[int, int], padding: str, to: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of spans of `IDS`, padded "left" or "right" to one length, and its attention mask."""
    ids, mask = torch.zeros(len(spans), to, dtype=torch.int64), torch.zeros(len(spans), to, dtype=torch.int64)
    for row, (first, last) in enumerate(spans):
        start = to - (last - first) if padding == "left" else 0
        ids[row, start : start + last - first] = IDS[first:last]
        mask[row, start : start + last - first] = 1
    return ids, mask


@torch.inference_mode()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_against_separate_runs_and_transformers(model: Gemma2ForCausalLM, padding: str) -> None:
    spans = ((0, 40), (5, 22), (30, 31), (10, 10 + WINDOW))
    ids, mask = rows(*spans, padding=padding, to=40)
    logits = model(ids, segment_ids=mask).numpy()
    assert np.isfinite(logits).all()
    theirs = hf_logits(BASE, biting_weights(BASE), ids.numpy().astype(np.int32), torch.float64, mask.numpy())
    for row, (first, last) in enumerate(spans):
        real = mask[row].numpy() == 1
        assert np.abs(logits[row][real] - alone(first, last)).max() <= TOLERANCE
        assert np.abs(logits[row][real] - theirs[row][real]).max() <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, WINDOW + 1, 30])
def test_cached_steps_of_a_padded_batch(model: Gemma2ForCausalLM, padding: str, prompt: int) -> None:
    """Two rows of unlike length decode side by side, past the window's edge; right padding then leaves a gap."""
    ids, mask = rows((0, prompt), (20, 20 + (prompt + 1) // 2), padding=padding, to=prompt)
    cache = KVCache(BASE)
    parts = [model(ids, segment_ids=mask, past_key_values=cache)]
    lengths = [prompt, (prompt + 1) // 2]
    for _ in range(20):
        following = torch.stack([IDS[lengths[0]], IDS[20 + lengths[1]]])[:, None]
        parts.append(model(following, past_key_values=cache))
        lengths = [length + 1 for length in lengths]
    logits = torch.cat(parts, dim=1).numpy()
    real = torch.cat([mask, torch.ones(2, 20, dtype=torch.int64)], dim=1).numpy() == 1
    assert np.abs(logits[0][real[0]] - alone(0, lengths[0])).max() <= TOLERANCE
    assert np.abs(logits[1][real[1]] - alone(20, 20 + lengths[1])).max() <= TOLERANCE


@torch.inference_mode()
def test_chunks_of_a_left_padded_batch(model: Gemma2ForCausalLM) -> None:
    """The padding of a row may span whole chunks, so that the row begins in a later pass."""
    ids, mask = rows((0, 45), (3, 20), (8, 11), padding="left", to=45)
    for size in (7, WINDOW, 2 * WINDOW + 1):
        cache = KVCache(BASE)
        pieces = [
            model(part, segment_ids=part_mask, past_key_values=cache)
            for part, part_mask in zip(torch.split(ids, size, dim=1), torch.split(mask, size, dim=1), strict=True)
        ]
        logits = torch.cat(pieces, dim=1).numpy()
        assert np.isfinite(logits).all()
        for row, (first, last) in enumerate(((0, 45), (3, 20), (8, 11))):
            assert np.abs(logits[row][45 - (last - first) :] - alone(first, last)).max() <= TOLERANCE


@torch.inference_mode()
def test_holes_in_a_mask(model: Gemma2ForCausalLM) -> None:
    """Positions count real tokens only, so the window is as long as without the holes."""
    holes = torch.tensor([3, 4, 15, 30, 31, 32])
    kept = torch.tensor([index for index in range(LENGTH) if index not in holes.tolist()])
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    mask[0, holes] = 0
    without = model(IDS[None, kept]).numpy()
    assert np.abs(model(IDS[None], segment_ids=mask)[:, kept].numpy() - without).max() <= TOLERANCE
    cache = KVCache(BASE)
    pieces = [
        model(part[None], segment_ids=part_mask, past_key_values=cache)
        for part, part_mask in zip(torch.split(IDS, 11), torch.split(mask, 11, dim=1), strict=True)
    ]
    assert np.abs(torch.cat(pieces, dim=1)[:, kept].numpy() - without).max() <= TOLERANCE


@torch.inference_mode()
def test_holes_around_the_border_of_query_blocks(model: Gemma2ForCausalLM) -> None:
    """The second block of 256 queries begins behind a hole: its window reaches further back than columns tell."""
    ids = torch.from_numpy(token_ids(BASE, 300).astype(np.int64))
    kept = torch.tensor([index for index in range(300) if not 248 <= index < 256])
    mask = torch.zeros(1, 300, dtype=torch.int64)
    mask[0, kept] = 1
    logits = model(ids[None], segment_ids=mask)[:, kept]
    assert (logits - model(ids[None, kept])).abs().max() <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 5, WINDOW + 1, LENGTH])
def test_packing_against_separate_runs(model: Gemma2ForCausalLM, size: int) -> None:
    """Documents of one row, with and without a cache; one is longer than the window, one is a single token."""
    lengths = [17, 1, 30, WINDOW, LENGTH - 18 - 30 - WINDOW]
    segments = torch.cat([torch.full((n,), 3 * index + 1) for index, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    expected = np.concatenate([alone(sum(lengths[:index]), sum(lengths[: index + 1])) for index in range(len(lengths))])
    for given in (None, positions):
        cache = KVCache(BASE) if size < LENGTH else None
        pieces = [
            model(
                IDS[None, part],
                segment_ids=segments[None, part],
                position_ids=None if given is None else given[None, part],
                past_key_values=cache,
            )
            for part in torch.split(torch.arange(LENGTH), size)
        ]
        assert np.abs(torch.cat(pieces, dim=1)[0].numpy() - expected).max() <= TOLERANCE


@torch.inference_mode()
def test_decode_goes_on_with_the_last_document_of_a_packed_row(model: Gemma2ForCausalLM) -> None:
    segments = torch.tensor([[1] * 20 + [2] * 15])
    cache = KVCache(BASE)
    model(IDS[None, :35], segment_ids=segments, past_key_values=cache)
    logits = torch.cat([model(IDS[None, index : index + 1], past_key_values=cache) for index in range(35, 60)], dim=1)
    assert np.abs(logits[0].numpy() - alone(20, 60)[15:]).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("positions", "segments"),
    [
        ([0, 1, 2, 0, 1, 2], None),
        ([0, 1, 3, 4, 5, 6], None),
        ([0, 1, 2, 0, 1, 2], [1, 1, 1, 1, 1, 1]),
        ([0, 1, 2, 0, 1, 3], [1, 1, 1, 2, 2, 2]),
    ],
)
def test_positions_that_do_not_rise_by_one_are_refused(
    model: Gemma2ForCausalLM, positions: list[int], segments: list[int] | None
) -> None:
    with pytest.raises(ValueError, match="position_ids must rise by one"):
        model(
            IDS[None, :6],
            position_ids=torch.tensor([positions]),
            segment_ids=None if segments is None else torch.tensor([segments]),
        )


@torch.inference_mode()
def test_positions_must_continue_the_cache(model: Gemma2ForCausalLM) -> None:
    cache = KVCache(BASE)
    model(IDS[None, :6], past_key_values=cache)
    model(IDS[None, 6:8], position_ids=torch.tensor([[6, 7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids must rise by one"):
        model(IDS[None, 8:9], position_ids=torch.tensor([[7]]), past_key_values=cache)
    model(IDS[None, 8:9], position_ids=torch.tensor([[8]]), past_key_values=cache)
