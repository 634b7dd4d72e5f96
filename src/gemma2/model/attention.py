"""Grouped-query attention with a soft cap and a window: which keys a query sees, and the arithmetic.

    scores  = query_scale · q kᵀ                      (report, section 2; scale before cap before mask)
    capped  = cap · tanh(scores / cap)
    weights = softmax over the keys that the mask allows, in float32
    output  = weights v

Query i of a segment sees key j of the same segment if j <= i and, in a local layer, i - j < window: a window of 4096
tokens counts the querying token itself (Hugging Face `sliding_window_overlay`, gemma_pytorch's `sliding_window_size`).

The queries are taken in blocks, and each block meets only the keys that some of its queries can see. So the cost of a
local layer is bounded by its window, half of a global layer's square is never computed, and no tensor of
length × length exists. `AttentionPlan` works out blocks and masks once per forward pass, for all layers of a kind.

Axes: B batch, L queries, S keys, N query heads, K key/value heads, G = N / K queries per key, H head size.

No kernel that silently drops the cap (scaled_dot_product_attention, flash attention before 2.6) is used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERY_BLOCK = 256
"""Queries per block: scores of 8 heads × 256 queries × 4096 keys in float32 are 32 MiB, about a cache's size."""
KEY_CHUNK = 512
"""Keys that are widened at once: 4 heads × 512 × 256 values in float32 are 2 MiB, which second-level caches hold."""


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Queries `first_query` … `last_query` - 1 of this pass, the keys they meet, and which of them they see."""

    first_query: int
    last_query: int
    first_key: int
    last_key: int
    mask_BLS: Tensor | None
    """(B or 1, queries, keys) bool, True where a query sees a key; None if every query sees every key."""
    has_empty_rows: bool
    """Whether some query (padding) may see no key at all; its output is then zero."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """The blocks of one kind of layer (local or global) in one forward pass."""

    blocks: tuple[AttentionBlock, ...]


def plan_attention(
    *,
    position_ids_BL: Tensor,
    segment_ids_BL: Tensor | None,
    key_position_ids_BS: Tensor,
    key_segment_ids_BS: Tensor | None,
    window: int | None,
    has_gaps: bool,
    query_block: int = QUERY_BLOCK,
) -> AttentionPlan:
    """Works out which keys each block of queries meets.

    Args:
        position_ids_BL: (B, L) int64, absolute positions of the queries, which are the last L of the keys.
        segment_ids_BL: (B, L) int64, 0 for padding, else the document; None if there is one document and no padding.
        key_position_ids_BS: (B, S) int64, positions of the keys: those still in the cache, then the new ones.
        key_segment_ids_BS: (B, S) int64, likewise for the keys; None exactly if `segment_ids_BL` is.
        window: how many tokens a query sees, itself included; None for all.
        has_gaps: whether padding stands between tokens of one segment, so that a distance in the array says nothing
            about a distance in positions, and keys cannot be skipped by their index.
        query_block: how many queries a block has at most.
    """
    num_queries, num_keys = position_ids_BL.shape[1], key_position_ids_BS.shape[1]
    num_cached = num_keys - num_queries
    has_empty_rows = segment_ids_BL is not None and bool((segment_ids_BL == 0).any())
    blocks = []
    for first_query in range(0, num_queries, query_block):
        last_query = min(first_query + query_block, num_queries)
        last_key = num_cached + last_query
        first_key = 0
        if window is not None and not has_gaps:
            first_key = max(0, num_cached + first_query - window + 1)
        queries, keys = slice(first_query, last_query), slice(first_key, last_key)
        mask_BLS = None
        is_single_query = last_query - first_query == 1
        if segment_ids_BL is None:
            if not is_single_query:  # one query without padding sees every key of its range
                mask_BLS = _visible(position_ids_BL[:1, queries], key_position_ids_BS[:1, keys], window)
        else:
            assert key_segment_ids_BS is not None
            mask_BLS = _visible(position_ids_BL[:, queries], key_position_ids_BS[:, keys], window)
            segments_BL1 = segment_ids_BL[:, queries, None]
            mask_BLS = mask_BLS & (segments_BL1 == key_segment_ids_BS[:, None, keys]) & (segments_BL1 != 0)
        blocks.append(
            AttentionBlock(
                first_query=first_query,
                last_query=last_query,
                first_key=first_key,
                last_key=last_key,
                mask_BLS=mask_BLS,
                has_empty_rows=has_empty_rows,
            )
        )
    return AttentionPlan(blocks=tuple(blocks))


def _visible(position_ids_BL: Tensor, key_position_ids_BS: Tensor, window: int | None) -> Tensor:
    distance_BLS = position_ids_BL[:, :, None] - key_position_ids_BS[:, None, :]
    visible_BLS = distance_BLS >= 0
    if window is not None:
        visible_BLS = visible_BLS & (distance_BLS < window)
    return visible_BLS


def capped_attention(
    q_BKGLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, scale: float, cap: float | None, plan: AttentionPlan
) -> Tensor:
    """Attention of grouped queries with a soft cap.

    Args:
        q_BKGLH: (B, K, G, L, H), the queries, after RoPE, not yet scaled.
        k_BKSH: (B, K, S, H), the keys, after RoPE.
        v_BKSH: (B, K, S, H), the values.
        scale: what the scores are multiplied with.
        cap: the soft cap on scores, or None.
        plan: which queries meet which keys.

    Returns:
        (B, L, N, H) in the dtype of the values; rows that see nothing are zero. Differentiable once.
    """
    if not torch.is_grad_enabled():
        return _attend(q_BKGLH, k_BKSH, v_BKSH, scale, cap, plan)
    out_BLNH: Tensor = _CappedAttention.apply(  # type: ignore[no-untyped-call]
        q_BKGLH, k_BKSH, v_BKSH, scale, cap, plan
    )
    return out_BLNH


def _attend(
    q_BKGLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, cap: float | None, plan: AttentionPlan
) -> Tensor:
    outputs = [_attend_block(block, q_BKGLH, k_BKSH, v_BKSH, scale, cap) for block in plan.blocks]
    out_BKGLH = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    return out_BKGLH.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend_block(
    block: AttentionBlock, q_BKGLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, cap: float | None
) -> Tensor:
    """(B, K, G, queries, H)"""
    q, k, v = _of_block(block, q_BKGLH, k_BKSH, v_BKSH)
    weights = _softmax(_capped_scores(q, k, scale, cap), block)
    weights = weights.to(v.dtype)
    return torch.matmul(weights.flatten(2, 3), v).view(q.shape)


def _of_block(block: AttentionBlock, q_BKGLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(block.first_key, block.last_key)
    return q_BKGLH[:, :, :, block.first_query : block.last_query], k_BKSH[:, :, keys], v_BKSH[:, :, keys]


def _capped_scores(q_BKGQH: Tensor, k_BKSH: Tensor, scale: float, cap: float | None) -> Tensor:
    """(B, K, G, queries, S) in float32 (or float64), before the mask."""
    # Scores are computed and kept in float32 (or float64): in bf16 a score near the cap would move by 0.125.
    score_dtype = torch.promote_types(q_BKGQH.dtype, torch.float32)
    # The scale goes onto q: L × H products in place of L × S.
    q_BKQH = (q_BKGQH.to(score_dtype) * scale).flatten(2, 3)
    with torch.autocast(q_BKQH.device.type, enabled=False):
        scores = _scores(q_BKQH, k_BKSH)
    scores = scores.view(*q_BKGQH.shape[:4], k_BKSH.shape[2])
    # In place: fresh memory for each step would cost more than the tanh.
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _scores(q_BKQH: Tensor, k_BKSH: Tensor) -> Tensor:
    """q kᵀ in the dtype of q, for keys that may be stored in a narrower one."""
    num_keys = k_BKSH.shape[2]
    in_pieces = k_BKSH.dtype != q_BKQH.dtype and num_keys > KEY_CHUNK and k_BKSH.device.type == "cpu"
    if not in_pieces:
        return torch.matmul(q_BKQH, k_BKSH.to(q_BKQH.dtype).transpose(2, 3))
    # For one query, widening the keys costs more than the product. A piece that stays in the processor's cache between
    # the two is read from memory once, as bf16; all keys at once would be read, written and read again as float32.
    scores = q_BKQH.new_empty((*q_BKQH.shape[:3], num_keys))
    for first in range(0, num_keys, KEY_CHUNK):
        piece = slice(first, first + KEY_CHUNK)
        scores[..., piece] = torch.matmul(q_BKQH, k_BKSH[:, :, piece].to(q_BKQH.dtype).transpose(2, 3))
    return scores


def _softmax(scores: Tensor, block: AttentionBlock) -> Tensor:
    """The weights of a block's keys; overwrites the scores."""
    if block.mask_BLS is None:
        return torch.softmax(scores, dim=-1)
    mask = block.mask_BLS[:, None, None]
    # A finite filler keeps rows without any key from becoming NaN; they are set to zero after.
    weights = torch.softmax(scores.masked_fill_(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weights * mask if block.has_empty_rows else weights


class _CappedAttention(torch.autograd.Function):
    """Keeps queries, keys and values, and no scores: the backward pass computes those of each block again.

    With P the weights, O = P v, and the gradient g of O, all of one block:

        dv = Pᵀ g          dP = g vᵀ
        dS = P · (dP - Σ over keys of P · dP) · (1 - (capped score / cap)²)          (softmax, then tanh)
        dq = scale · dS k          dk = scale · dSᵀ q

    Products are in the dtype of their factors, sums over blocks in float32 (or float64).
    """

    @staticmethod
    def forward(
        ctx: Any, q_BKGLH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float, cap: float | None, plan: AttentionPlan
    ) -> Tensor:
        ctx.save_for_backward(q_BKGLH, k_BKSH, v_BKSH)
        ctx.scale, ctx.cap, ctx.plan = scale, cap, plan
        return _attend(q_BKGLH, k_BKSH, v_BKSH, scale, cap, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_BKGLH, k_BKSH, v_BKSH = ctx.saved_tensors
        num_batch, num_kv_heads, num_groups, num_length, head_dim = q_BKGLH.shape
        grad_BKGLH = (
            grad_outputs[0].view(num_batch, num_length, num_kv_heads, num_groups, head_dim).permute(0, 2, 3, 1, 4)
        )
        wide = torch.promote_types(q_BKGLH.dtype, torch.float32)
        dq_BKGLH = torch.empty_like(q_BKGLH)
        dk_BKSH, dv_BKSH = torch.zeros_like(k_BKSH, dtype=wide), torch.zeros_like(v_BKSH, dtype=wide)
        for block in ctx.plan.blocks:
            queries, keys = slice(block.first_query, block.last_query), slice(block.first_key, block.last_key)
            q, k, v = _of_block(block, q_BKGLH, k_BKSH, v_BKSH)
            grad = grad_BKGLH[:, :, :, queries].flatten(2, 3)
            scores = _capped_scores(q, k, ctx.scale, ctx.cap)
            slopes = None if ctx.cap is None else (scores / ctx.cap).square_().neg_().add_(1.0)
            weights = _softmax(scores, block)
            dv_BKSH[:, :, keys] += torch.matmul(weights.to(v.dtype).flatten(2, 3).transpose(2, 3), grad)
            d_scores = torch.matmul(grad, v.transpose(2, 3)).to(wide).view_as(weights)
            d_scores = d_scores.sub_((weights * d_scores).sum(-1, keepdim=True)).mul_(weights)
            if slopes is not None:
                d_scores.mul_(slopes)
            d_scores = d_scores.to(k.dtype).flatten(2, 3)
            dq_BKGLH[:, :, :, queries] = torch.matmul(d_scores, k).mul_(ctx.scale).view_as(q)
            dk_BKSH[:, :, keys] += torch.matmul(d_scores.transpose(2, 3), q.flatten(2, 3))
        return dq_BKGLH, dk_BKSH.mul_(ctx.scale).to(k_BKSH.dtype), dv_BKSH.to(v_BKSH.dtype), None, None, None
