"""Which query sees which key, as literal matrices: rows are queries, columns keys."""

from __future__ import annotations

import pytest
import torch

from gemma2.config import Gemma2Config
from gemma2.model.attention import AttentionPlan, capped_attention, plan_attention
from gemma2.model.kv_cache import KVCache
from gemma2.model.modeling import PassContext

CONFIG = Gemma2Config(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    query_pre_attn_scalar=4,
    vocab_size=16,
    sliding_window=3,
)


def matrix(plan: AttentionPlan, num_keys: int, row: int = 0) -> list[list[int]]:
    """The plan as zeros and ones over all keys, those that a block does not even read included."""
    lines = []
    for block in plan.blocks:
        for query in range(block.last_query - block.first_query):
            line = torch.zeros(num_keys, dtype=torch.int64)
            line[block.first_key : block.last_key] = 1
            if block.mask_BLS is not None:
                mask = block.mask_BLS[min(row, block.mask_BLS.shape[0] - 1), query]
                line[block.first_key : block.last_key] = mask.to(torch.int64)
            lines.append(line.tolist())
    return lines


def plans(segments: list[list[int]] | None, length: int, cache: KVCache | None = None) -> PassContext:
    """The plans of a pass of `length` tokens."""
    segment_ids = None if segments is None else torch.tensor(segments)
    ids = torch.zeros(1 if segments is None else len(segments), length, dtype=torch.int64)
    return PassContext.prepare(CONFIG, ids, None, segment_ids, cache)


def test_local_and_global_masks() -> None:
    context = plans(None, 6)
    assert matrix(context.full, 6) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert matrix(context.local, 6) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("query_block", [1, 2, 4, 5])
def test_blocks_of_queries_change_nothing(query_block: int) -> None:
    positions = torch.arange(6)[None]
    for window, whole in ((None, plans(None, 6).full), (3, plans(None, 6).local)):
        plan = plan_attention(
            position_ids_BL=positions,
            segment_ids_BL=None,
            key_position_ids_BS=positions,
            key_segment_ids_BS=None,
            window=window,
            has_gaps=False,
            query_block=query_block,
        )
        assert len(plan.blocks) == -(-6 // query_block)
        assert matrix(plan, 6) == matrix(whole, 6)


def test_a_local_block_reads_no_key_behind_its_window() -> None:
    positions = torch.arange(10)[None]
    plan = plan_attention(
        position_ids_BL=positions,
        segment_ids_BL=None,
        key_position_ids_BS=positions,
        key_segment_ids_BS=None,
        window=3,
        has_gaps=False,
        query_block=4,
    )
    assert [(block.first_key, block.last_key) for block in plan.blocks] == [(0, 4), (2, 8), (6, 10)]


def test_left_padding() -> None:
    context = plans([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], 6)
    assert matrix(context.local, 6) == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert matrix(context.local, 6, row=1) == matrix(plans(None, 6).local, 6)
    assert context.position_ids_BL.tolist()[0][2:] == [0, 1, 2, 3]


def test_right_padding() -> None:
    context = plans([[1, 1, 1, 1, 0, 0]], 6)
    assert matrix(context.full, 6) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_packed_documents() -> None:
    context = plans([[1, 1, 2, 2, 2, 2]], 6)
    assert matrix(context.full, 6) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    assert matrix(context.local, 6)[5] == [0, 0, 0, 1, 1, 1]
    assert context.position_ids_BL.tolist() == [[0, 1, 0, 1, 2, 3]]


def test_a_hole_does_not_shorten_the_window() -> None:
    """Token 4 is padding: the last token sees itself and the two tokens before it, across the hole."""
    context = plans([[1, 1, 1, 1, 0, 1]], 6)
    assert matrix(context.local, 6)[5] == [0, 0, 1, 1, 0, 1]


def test_a_chunk_after_a_cache() -> None:
    """Five tokens are cached, of which a local layer keeps two; a chunk of four follows, longer than the window."""
    cache = KVCache(CONFIG)
    cache.extend(torch.arange(5)[None], None)
    cache.forget_unseen()
    context = plans(None, 4, cache)
    assert context.position_ids_BL.tolist() == [[5, 6, 7, 8]]
    assert matrix(context.full, 9) == [
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert matrix(context.local, 6) == [  # columns: tokens 3 and 4 from the cache, then 5 … 8
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


@torch.inference_mode()
def test_keys_in_pieces_give_the_product_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of bf16 keys, widened in pieces of the keys, against float32 arithmetic on the same values."""
    generator = torch.Generator().manual_seed(0)
    for num_queries in (1, 3):
        q, k, v = (torch.randn(1, 2, n, 16, generator=generator).bfloat16() for n in (3 * num_queries, 1100, 1100))
        q = q.view(1, 2, 3, num_queries, 16)
        positions = torch.arange(1100)[None]
        plan = plan_attention(
            position_ids_BL=positions[:, -num_queries:],
            segment_ids_BL=None,
            key_position_ids_BS=positions,
            key_segment_ids_BS=None,
            window=None,
            has_gaps=False,
        )
        narrow = capped_attention(q, k, v, scale=0.5, cap=5.0, plan=plan)
        wide = capped_attention(q.float(), k.float(), v.float(), scale=0.5, cap=5.0, plan=plan)
        assert narrow.dtype == torch.bfloat16
        # Weights are rounded to bf16 before they meet the values, and the result after.
        assert (narrow.float() - wide).abs().max() <= 2**-7 * wide.abs().max()
        monkeypatch.setattr("gemma2.model.attention.KEY_CHUNK", 1 << 20)
        assert torch.equal(narrow, capped_attention(q, k, v, scale=0.5, cap=5.0, plan=plan))
        monkeypatch.undo()


@pytest.mark.parametrize("cap", [None, 5.0])
def test_attention_without_gradients_gives_the_same_bits(cap: float | None) -> None:
    """In place or not: inference computes what training does."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, 3, 7, 8, generator=generator)
    k, v = torch.randn(2, 2, 7, 8, generator=generator), torch.randn(2, 2, 7, 8, generator=generator)
    context = plans([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], 7)
    training = capped_attention(q.requires_grad_(), k, v, scale=2.0, cap=cap, plan=context.local)
    with torch.no_grad():
        assert torch.equal(capped_attention(q, k, v, scale=2.0, cap=cap, plan=context.local), training)
