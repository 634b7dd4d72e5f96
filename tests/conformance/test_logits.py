"""Logits of whole sequences, of every architecture, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import BackendSpec, excess, run_in_chunks, torch_model
from cases import BASE, LAYOUTS, LENGTH, biting_weights, reference, token_ids

from gemma2.config import PRESETS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_sequence(spec: BackendSpec, layout: str) -> None:
    config = LAYOUTS[layout]
    backend = spec.make(config, biting_weights(config))
    logits = run_in_chunks(backend, token_ids(config), [LENGTH])
    assert excess(spec.precision, config, logits) <= 1


@pytest.mark.parametrize("seed", [1, 2])
def test_other_weights(spec: BackendSpec, seed: int) -> None:
    backend = spec.make(BASE, biting_weights(BASE, seed))
    logits = run_in_chunks(backend, token_ids(BASE, LENGTH, seed), [LENGTH])
    assert excess(spec.precision, BASE, logits, seed=seed) <= 1


def test_a_sequence_of_many_query_blocks(spec: BackendSpec) -> None:
    """600 tokens: attention takes queries in blocks of 256, and a local block's keys begin inside the sequence."""
    config = BASE.replace(max_position_embeddings=1024, sliding_window=100)
    backend = spec.make(config, biting_weights(config))
    assert excess(spec.precision, config, run_in_chunks(backend, token_ids(config, 600), [600])) <= 1


def test_a_sequence_of_one_token(spec: BackendSpec) -> None:
    logits = run_in_chunks(spec.make(BASE, biting_weights(BASE)), token_ids(BASE)[:1], [1])
    assert excess(spec.precision, BASE, logits, length=LENGTH) <= 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_two_float64_references_agree(layout: str) -> None:
    """Two codes that share nothing agree to the last bits, so neither float64 has a float32 left in it."""
    config = LAYOUTS[layout]
    model = torch_model(config, biting_weights(config), torch.float64)
    with torch.inference_mode():
        logits = model(torch.from_numpy(token_ids(config).astype(np.int64))[None])[0].numpy()
    assert logits.dtype == np.float64
    assert np.abs(logits - reference(config).logits).max() <= 1e-10


def test_the_miniatures_have_the_proportions_of_the_published_sizes() -> None:
    for name, preset in PRESETS.items():
        config = LAYOUTS[name]
        assert config.num_attention_heads == preset.num_attention_heads
        assert config.num_key_value_heads == preset.num_key_value_heads
        assert (config.query_pre_attn_scalar == config.head_dim) == (preset.query_pre_attn_scalar == preset.head_dim)
        width_per_head = config.hidden_size / config.num_attention_heads
        assert (config.query_pre_attn_scalar == width_per_head) == (
            preset.query_pre_attn_scalar == preset.hidden_size / preset.num_attention_heads
        )
