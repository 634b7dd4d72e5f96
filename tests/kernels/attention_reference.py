"""Attention in numpy float64, and sequences in a paged cache, for the tests of the attention kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
BLOCK = kernels.KV_BLOCK
DTYPES = ("float32", "bfloat16", "int8")


def aligned(size: int, fill: int = 0xFF) -> npt.NDArray[np.uint8]:
    """Memory at a multiple of 64 bytes, full of NaN in every float format unless said otherwise."""
    memory = np.full(size + 64, fill, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def make_cache(dtype: str, kv_heads: int, head_dim: int, num_blocks: int) -> kernels.KVCache:
    size = num_blocks * kernels.KVCache.block_bytes(dtype, kv_heads, head_dim)
    return kernels.KVCache(dtype, kv_heads, head_dim, num_blocks, aligned(size))


def to_bfloat16(x: npt.NDArray[np.float32]) -> Floats:
    """Rounded to nearest even, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def rope(positions: npt.NDArray[np.int64], head_dim: int) -> tuple[Floats, Floats]:
    """cos and sin (rows, head_dim / 2)."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """x: (rows, heads, head_dim) float32, turned as Hugging Face's rotate_half does, every operation rounded."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def visible(query: npt.NDArray[np.int64], key: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.bool_]:
    distance = query[:, None] - key[None, :]
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def attention(
    q: Doubles, k: Doubles, v: Doubles, query_positions: npt.NDArray[np.int64], window: int, cap: float
) -> tuple[Doubles, Doubles]:
    """Outputs (rows, heads, head_dim) and weights (rows, heads, keys); k, v: (keys, kv_heads, head_dim), from key 0."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("thd,shd->ths", q, k)
    if cap:
        scores = cap * np.tanh(scores / cap)
    seen = visible(query_positions, np.arange(len(k)), window)
    scores = np.where(seen[:, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("ths,shd->thd", weights, v), weights


@dataclass(eq=False)
class Text:
    """One sequence: the projections of its tokens, its blocks, and how many of its tokens are in the cache."""

    qkv: Floats
    blocks: list[int]
    length: int = 0
    first_block: int = 0
    """Entries before it are shown to the kernels as freed."""

    def table(self, width: int) -> npt.NDArray[np.int32]:
        row = np.full(width, -1, np.int32)
        row[: len(self.blocks)] = self.blocks
        row[: self.first_block] = -1
        return row


@dataclass
class Setup:
    """A cache, the shape of the heads, and how rows see."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int = 0
    cap: float = 50.0
    query_scale: float = 0.25
    num_blocks: int = 64
    cache: kernels.KVCache = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.cache = make_cache(self.dtype, self.kv_heads, self.head_dim, self.num_blocks)
        # Blocks lie in no order.
        self.free = [int(i) for i in np.random.default_rng(5).permutation(self.num_blocks)]

    def text(self, num_tokens: int, seed: int, scale: float = 1.0) -> Text:
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        qkv = np.random.default_rng(seed).standard_normal((num_tokens, width)).astype(np.float32) * np.float32(scale)
        return Text(qkv, [self.free.pop() for _ in range(-(-num_tokens // BLOCK))])

    def step(self, runtime: kernels.Runtime, parts: Sequence[tuple[Text, int]]) -> list[Floats]:
        """Runs the next n tokens of each text in one pass; returns their outputs (n, heads · head_dim)."""
        starts = np.cumsum([0, *(n for _, n in parts)]).astype(np.int32)
        positions = np.array([text.length for text, _ in parts], np.int32)
        width = max(len(text.blocks) for text, _ in parts)
        table = kernels.BatchTable(starts, positions, np.stack([text.table(width) for text, _ in parts]))
        qkv = np.concatenate([text.qkv[text.length : text.length + n] for text, n in parts])
        cos, sin = rope(np.concatenate([np.arange(n) + text.length for text, n in parts]), self.head_dim)
        queries = np.full((len(qkv), self.heads * self.head_dim), np.nan, np.float32)
        out = np.full_like(queries, np.nan)
        kernels.append_kv(runtime, qkv, cos, sin, table, self.cache, self.query_scale, queries)
        kernels.attend(runtime, queries, table, self.cache, self.window, self.cap, out)
        for text, n in parts:
            text.length += n
        return [out[starts[i] : starts[i + 1]] for i in range(len(parts))]

    def whole(self, runtime: kernels.Runtime, text: Text, chunks: Sequence[int] = ()) -> Floats:
        """All tokens of a text, in chunks of these sizes and then the rest."""
        outputs = []
        for n in chunks:
            outputs += self.step(runtime, [(text, n)])
        if text.length < len(text.qkv):
            outputs += self.step(runtime, [(text, len(text.qkv) - text.length)])
        return np.concatenate(outputs)

    def turned(self, text: Text) -> tuple[Floats, Floats, Floats]:
        """Queries (scaled), keys and values of a text in float32: (tokens, heads, head_dim)."""
        n, h, kv = len(text.qkv), self.heads, self.kv_heads
        x = text.qkv.reshape(n, h + 2 * kv, self.head_dim)
        cos, sin = rope(np.arange(n), self.head_dim)
        q = rotated(x[:, :h], cos, sin) * np.float32(self.query_scale)
        return q, rotated(x[:, h : h + kv], cos, sin), x[:, h + kv :]

    def cached(self, text: Text) -> tuple[Floats, Floats]:
        """Keys and values as the cache holds them: (tokens, kv_heads, head_dim)."""
        heads = range(self.kv_heads)
        keys = [np.stack([self.cache.keys(block, head) for head in heads], axis=1) for block in text.blocks]
        values = [np.stack([self.cache.values(block, head) for head in heads], axis=1) for block in text.blocks]
        return np.concatenate(keys)[: len(text.qkv)], np.concatenate(values)[: len(text.qkv)]
