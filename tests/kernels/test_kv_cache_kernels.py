"""RoPE and the cache of keys and values: exact bits in float32 and bfloat16, half a step in int8."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from attention_reference import BLOCK, DTYPES, Floats, Setup, aligned, make_cache, rope, rotated, to_bfloat16

from gemma2 import _kernels as kernels

ISAS = kernels.available_isas()


def check_written(setup: Setup, keys: Floats, values: Floats, expected_keys: Floats, expected_values: Floats) -> None:
    if setup.dtype == "int8":
        for got, expected in ((keys, expected_keys), (values, expected_values)):
            step = abs(expected).max(axis=-1, keepdims=True) / 127
            # Half a step, and the rounding of the scale and of its product with the byte.
            assert (abs(got - expected) <= step * (0.5 + 127 * 2.0**-22)).all()
            # The largest value of a token and head is 127 steps.
            np.testing.assert_allclose(abs(got).max(axis=-1), abs(expected).max(axis=-1), rtol=2.0**-22)
        return
    rounded = to_bfloat16 if setup.dtype == "bfloat16" else np.asarray
    np.testing.assert_array_equal(keys, rounded(expected_keys))
    np.testing.assert_array_equal(values, rounded(expected_values))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written(dtype: str, isa: str) -> None:
    """Every size of head up to beyond two vectors; chunks that begin and end inside blocks."""
    for head_dim, (heads, kv_heads) in itertools.product((2, 4, 6, 16, 18, 30, 32, 34, 66, 130), ((1, 1), (4, 2))):
        setup = Setup(heads, kv_heads, head_dim, dtype, query_scale=0.3)
        text = setup.text(BLOCK + 5, seed=head_dim)
        runtime = kernels.Runtime(2, isa)
        queries = []
        for first, n in ((0, 1), (1, 15), (16, BLOCK - 12), (BLOCK + 4, 1)):
            table = kernels.BatchTable(
                np.array([0, n], np.int32), np.array([first], np.int32), np.array([text.blocks], np.int32)
            )
            cos, sin = rope(np.arange(first, first + n), head_dim)
            queries.append(np.full((n, heads * head_dim), np.nan, np.float32))
            rows = text.qkv[first : first + n]
            kernels.append_kv(runtime, rows, cos, sin, table, setup.cache, setup.query_scale, queries[-1])
        q, k, v = setup.turned(text)
        np.testing.assert_array_equal(np.concatenate(queries).reshape(q.shape), q)
        check_written(setup, *setup.cached(text), k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_every_instruction_set_is_the_same(dtype: str) -> None:
    contents = []
    for isa, threads in itertools.product(ISAS, (1, 3)):
        size = 3 * kernels.KVCache.block_bytes(dtype, 2, 20)
        setup = Setup(4, 2, 20, dtype, num_blocks=3)
        memory = aligned(size, fill=0)
        setup.cache = kernels.KVCache(dtype, 2, 20, 3, memory)
        text = setup.text(BLOCK * 2 + 7, seed=0)
        setup.whole(kernels.Runtime(threads, isa), text, chunks=[40])
        contents.append(memory.copy())
    for content in contents[1:]:
        np.testing.assert_array_equal(content, contents[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_token_of_a_block_zeroes_the_values_behind_it(dtype: str) -> None:
    setup = Setup(2, 1, 8, dtype)
    text = setup.text(BLOCK + 1, seed=0)
    setup.step(kernels.Runtime(1), [(text, 3)])
    if dtype != "int8":  # there the bytes are zeros, and the scales of tokens to come do not matter
        assert not setup.cache.values(text.blocks[0], 0)[3:].any()
    before = setup.cache.values(text.blocks[0], 0)[:3].copy()
    setup.step(kernels.Runtime(1), [(text, 1)])
    np.testing.assert_array_equal(setup.cache.values(text.blocks[0], 0)[:3], before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copied_block_goes_its_own_way(dtype: str) -> None:
    setup = Setup(2, 1, 8, dtype)
    runtime = kernels.Runtime(1)
    parent = setup.text(BLOCK * 2, seed=0)
    setup.step(runtime, [(parent, BLOCK + 7)])
    child = setup.text(BLOCK * 2, seed=1)
    child.qkv[: BLOCK + 7] = parent.qkv[: BLOCK + 7]
    expected = setup.whole(runtime, child)  # without sharing
    fork = setup.text(BLOCK * 2, seed=1)
    fork.qkv, fork.length = child.qkv, BLOCK + 7
    fork.blocks[0] = parent.blocks[0]
    kernels.copy_block(runtime, setup.cache, parent.blocks[1], fork.blocks[1])
    held = setup.cache.keys(parent.blocks[1], 0)[:7].copy()
    out = setup.whole(runtime, fork)
    np.testing.assert_array_equal(out, expected[BLOCK + 7 :])
    np.testing.assert_array_equal(setup.cache.keys(parent.blocks[1], 0)[:7], held)
    assert not np.array_equal(setup.cache.keys(fork.blocks[1], 0)[7:], setup.cache.keys(parent.blocks[1], 0)[7:])


def test_numbers_that_are_hard_to_scale() -> None:
    """int8: tokens of zeros, and of numbers so small that 1 / scale overflows, become zeros."""
    for isa in ISAS:
        setup = Setup(1, 1, 16, "int8")
        text = setup.text(3, seed=0)
        text.qkv[0] = 0
        text.qkv[1] = 1e-39
        out = setup.whole(kernels.Runtime(1, isa), text)
        keys, values = setup.cached(text)
        assert not keys[:2].any() and not values[:2].any()
        assert np.isfinite(out).all()


def test_rope_turns_halves() -> None:
    """At position 1 with one pair: (x, y) turns by 1 radian, in the halves of the head and not in neighbours."""
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]], np.float32)
    cos, sin = rope(np.array([1]), 4)
    c, s = np.cos(1.0), np.sin(1.0)
    np.testing.assert_allclose(rotated(x, cos, sin)[0, 0, [0, 2]], [1 * c - 3 * s, 3 * c + 1 * s], rtol=1e-6)
    setup = Setup(1, 1, 4, "float32", query_scale=2.0)
    text = setup.text(2, seed=0)
    text.qkv[1] = [1, 2, 3, 4] * 3
    table = kernels.BatchTable(np.array([0, 2], np.int32), np.array([0], np.int32), np.array([text.blocks], np.int32))
    queries = np.zeros((2, 4), np.float32)
    kernels.append_kv(kernels.Runtime(1), text.qkv, *rope(np.arange(2), 4), table, setup.cache, 2.0, queries)
    np.testing.assert_allclose(queries[1, [0, 2]], [2 * (1 * c - 3 * s), 2 * (3 * c + 1 * s)], rtol=1e-6)


def test_block_bytes() -> None:
    for head_dim in (64, 128, 256):
        assert kernels.KVCache.block_bytes("bfloat16", 4, head_dim) == BLOCK * 2 * 4 * head_dim * 2
        assert kernels.KVCache.block_bytes("float32", 4, head_dim) == BLOCK * 2 * 4 * head_dim * 4
        assert kernels.KVCache.block_bytes("int8", 4, head_dim) == BLOCK * 2 * 4 * (head_dim + 4)
    cache = make_cache("int8", 2, 8, 3)
    assert (cache.dtype, cache.kv_heads, cache.head_dim, cache.num_blocks) == ("int8", 2, 8, 3)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="float32, bfloat16 or int8, but is 'float16'"):
        kernels.KVCache.block_bytes("float16", 1, 8)
    for head_dim in (0, 7, 2000):
        with pytest.raises(ValueError, match="head_dim must be even"):
            kernels.KVCache.block_bytes("float32", 1, head_dim)
    with pytest.raises(ValueError, match="memory: axis 0 must be"):
        kernels.KVCache("float32", 1, 8, 2, aligned(5))
    with pytest.raises(ValueError, match="multiple of 64"):
        size = kernels.KVCache.block_bytes("float32", 1, 8)
        kernels.KVCache("float32", 1, 8, 1, aligned(size + 8)[8:])

    def table(starts: list[int], positions: list[int], blocks: list[list[int]]) -> kernels.BatchTable:
        return kernels.BatchTable(np.array(starts, np.int32), np.array(positions, np.int32), np.array(blocks, np.int32))

    with pytest.raises(ValueError, match="row_starts: axis 0 must be 2"):
        table([0, 1, 2], [0], [[0]])
    with pytest.raises(ValueError, match="must begin with 0"):
        table([1, 2], [0], [[0]])
    with pytest.raises(ValueError, match="must not fall"):
        table([0, 2, 1], [0, 0], [[0], [0]])
    with pytest.raises(ValueError, match="must not be negative"):
        table([0, 1], [-1], [[0]])
    with pytest.raises(ValueError, match=f"positions up to {BLOCK} need more than the 1 blocks"):
        table([0, 2], [BLOCK - 1], [[0]])

    cache, runtime = make_cache("float32", 1, 8, 2), kernels.Runtime(1)
    one = table([0, 1], [0], [[0]])
    qkv, turn, queries = np.zeros((1, 32), np.float32), np.zeros((1, 4), np.float32), np.zeros((1, 16), np.float32)
    kernels.append_kv(runtime, qkv, turn, turn, one, cache, 1.0, queries)
    with pytest.raises(ValueError, match="1 heads each of keys and values"):
        kernels.append_kv(runtime, qkv[:, :16].copy(), turn, turn, one, cache, 1.0, queries)
    with pytest.raises(ValueError, match="cos: axis 1 must be 4"):
        kernels.append_kv(runtime, qkv, np.zeros((1, 8), np.float32), turn, one, cache, 1.0, queries)
    with pytest.raises(ValueError, match="queries: axis 1 must be 16"):
        kernels.append_kv(runtime, qkv, turn, turn, one, cache, 1.0, qkv)
    with pytest.raises(ValueError, match="their block is -1"):
        kernels.append_kv(runtime, qkv, turn, turn, table([0, 1], [0], [[-1]]), cache, 1.0, queries)
    with pytest.raises(ValueError, match="block must be from 0 to 1"):
        kernels.copy_block(runtime, cache, 0, 2)
