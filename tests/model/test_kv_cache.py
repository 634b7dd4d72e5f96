"""The cache's memory: bounded in local layers, given back after a long chunk, grown without copying at every token."""

from __future__ import annotations

import pytest
import torch

from gemma2.config import FULL, SLIDING, Gemma2Config
from gemma2.model import Gemma2ForCausalLM, KVCache, kv_cache
from gemma2.model.kv_cache import has_gaps

CONFIG = Gemma2Config(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    query_pre_attn_scalar=4,
    vocab_size=64,
    sliding_window=20,
    max_position_embeddings=8192,
)
LOCAL = CONFIG.replace(layer_types=(SLIDING,) * 4)


GROWTH = 16


@pytest.fixture(autouse=True)
def small_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are renewed often, so that short sequences show what long ones do."""
    monkeypatch.setattr(kv_cache, "GROWTH", GROWTH)


def run(config: Gemma2Config, chunks: list[int], dtype: torch.dtype = torch.float32) -> list[int]:
    """Sizes in bytes after each chunk, every one checked against what is documented."""
    model, cache = Gemma2ForCausalLM(config, dtype=dtype), KVCache(config)
    per_token = config.kv_cache_bytes(1, bytes_per_value=dtype.itemsize, bounded=False)
    sizes = []
    with torch.inference_mode():
        for chunk in chunks:
            model.model(torch.zeros(1, chunk, dtype=torch.int64), past_key_values=cache)
            held = config.kv_cache_bytes(cache.num_tokens, bytes_per_value=dtype.itemsize)
            assert cache.size_bytes <= 1.5 * held + 2 * GROWTH * per_token
            sizes.append(cache.size_bytes)
    assert cache.num_tokens == sum(chunks)
    return sizes


def test_local_layers_are_bounded_through_a_long_decode() -> None:
    sizes = run(LOCAL, [15] + [1] * 200)
    assert max(sizes) <= LOCAL.kv_cache_bytes(LOCAL.sliding_window + 2 * GROWTH, bytes_per_value=4, bounded=False)
    assert max(sizes[150:]) == max(sizes[50:150]), "after the window is full, nothing grows any more"


def test_a_long_decode_of_alternating_layers() -> None:
    run(CONFIG, [100] + [1] * 120)


def test_bfloat16_takes_half() -> None:
    chunks = [10, 30, 1]
    assert [2 * size for size in run(CONFIG, chunks, torch.bfloat16)] == run(CONFIG, chunks)


def test_memory_comes_back_after_a_chunk_much_longer_than_the_window() -> None:
    """400 tokens at once; of a local layer's, 19 can still be seen."""
    size = run(LOCAL, [400])[-1]
    assert size <= LOCAL.kv_cache_bytes(LOCAL.sliding_window + GROWTH, bytes_per_value=4, bounded=False)


def test_most_tokens_move_no_buffer() -> None:
    model, cache = Gemma2ForCausalLM(CONFIG), KVCache(CONFIG)
    moves = 0
    with torch.inference_mode():
        for _ in range(200):
            before = cache.layers[1]._k_BKSH
            model.model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache)
            moves += cache.layers[1]._k_BKSH is not before
    assert moves <= 10


def test_local_layers_of_a_padded_batch_are_bounded_too() -> None:
    model, cache = Gemma2ForCausalLM(LOCAL), KVCache(LOCAL)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :25] = 0
    with torch.inference_mode():
        model(torch.zeros(2, 30, dtype=torch.int64), segment_ids=mask, past_key_values=cache)
        assert cache.layers[0].num_tokens == 19
        for _ in range(40):
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
    assert [layer.num_tokens for layer in cache.layers] == [19] * 4


def test_a_cache_of_another_shape_is_refused() -> None:
    model, cache = Gemma2ForCausalLM(CONFIG), KVCache(CONFIG)
    model(torch.zeros(1, 3, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 1 rows, but input_ids has 2"):
        model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache was made for 2 layers, but the model has 4"):
        model(torch.zeros(1, 3, dtype=torch.int64), past_key_values=KVCache(CONFIG.replace(num_hidden_layers=2)))


def test_inputs_of_other_shapes_are_refused() -> None:
    model = Gemma2ForCausalLM(CONFIG.replace(layer_types=(FULL,) * 4))
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, length\).* but is \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"segment_ids must have the shape of input_ids, \(1, 3\), but has \(3,\)"):
        model(torch.zeros(1, 3, dtype=torch.int64), segment_ids=torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([[1, 1, 1]], False),
        ([[0, 1, 1]], False),
        ([[1, 1, 0]], False),
        ([[0, 1, 0]], False),
        ([[1, 0, 1]], True),
        ([[1, 1, 1], [0, 1, 1]], False),
        ([[1, 1, 1], [1, 0, 2]], True),
    ],
)
def test_what_a_gap_is(segments: list[list[int]], expected: bool) -> None:
    assert has_gaps(torch.tensor(segments)) is expected
