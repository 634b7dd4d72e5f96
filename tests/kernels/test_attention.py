"""Attention equals float64 within derived bounds, and its bits depend on a row's query and keys only."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from attention_reference import BLOCK, DTYPES, Doubles, Floats, Setup, Text, attention, make_cache, to_bfloat16

from gemma2 import _kernels as kernels

ISAS = kernels.available_isas()


def runtimes() -> list[kernels.Runtime]:
    return [kernels.Runtime(2, isa) for isa in ISAS]


def bounds(setup: Setup, q: Doubles, k: Doubles, v: Doubles, weights: Doubles) -> Doubles:
    """What rounding may do to an output, (rows, heads, 1): relative errors of weights times the spread of values.

    A chain of n sums of terms t errs by a random walk: about sqrt(n) · 2^-25 · (its largest partial sum), which is at
    most sum |t|. Eight times that is taken as the bound. An error d in a score moves its weight by d, as the slope of
    the cap is at most 1; cap and exp add 2^-18 at most.
    """
    group = setup.heads // setup.kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    absolute = np.einsum("thd,shd->ths", abs(q), abs(k))
    score_error = absolute.max(axis=-1) * 8 * np.sqrt(setup.head_dim) * 2.0**-25 + 2.0**-18
    weight_error = score_error + 8 * np.sqrt(len(k)) * 2.0**-25
    if setup.dtype == "bfloat16":  # weights are rounded to 8 bits
        weight_error += 2.0**-9
    if setup.dtype == "int8":
        # Each value of a query is rounded by half of 1/16256 of the largest, each weight by half of 1/16383 of the
        # largest of its span; the errors of a sum of n add up as sqrt(n).
        largest = abs(q).max(axis=-1)[:, :, None]
        score_noise = 8 / np.sqrt(12) / 16256 * largest[..., 0] * np.sqrt((k**2).sum(axis=-1).max())
        weight_error += score_noise + 8 / np.sqrt(12) / 16383 * np.sqrt(len(k)) * weights.max(axis=-1)
    return (2 * weight_error * abs(v).max(axis=(0, 2)))[:, :, None]


def check(setup: Setup, text: Text, out: Floats, first: int = 0) -> None:
    """Compares the outputs of the tokens from `first` on."""
    q, k, v = (x.astype(np.float64) for x in (setup.turned(text)[0], *setup.cached(text)))
    q = q[first:]
    if setup.dtype == "bfloat16":
        q = to_bfloat16(q.astype(np.float32)).astype(np.float64)
    positions = np.arange(len(q)) + first
    expected, weights = attention(q, k, v, positions, setup.window, setup.cap)
    error = abs(out.reshape(expected.shape) - expected)
    bound = bounds(setup, q, k, v, weights)
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [50.0, 3.0, 0.0, 90.0])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 2), (4, 2, 8), (3, 1, 10), (8, 4, 36), (6, 6, 64)])
def test_matches_float64(heads: int, kv_heads: int, head_dim: int, cap: float, dtype: str) -> None:
    # Scores of a few times ten: the caps of 3 and 50 bite, some weights are near 1 and most near 0.
    for runtime, window in itertools.product(runtimes(), (0, 1, 5, 40)):
        setup = Setup(heads, kv_heads, head_dim, dtype, window=window, cap=cap, query_scale=12 / head_dim**0.5)
        text = setup.text(2 * BLOCK + 9, seed=head_dim)
        check(setup, text, setup.whole(runtime, text))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 70, 300])
def test_matches_float64_over_many_spans(window: int, dtype: str) -> None:
    for runtime in runtimes()[:2]:
        setup = Setup(4, 2, 64, dtype, window=window, query_scale=1.0)
        text = setup.text(700, seed=3)
        check(setup, text, setup.whole(runtime, text, chunks=[1, 300]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturated_scores(dtype: str) -> None:
    """Scores of thousands: every capped score is +50 or -50, whatever their size; without the cap one key wins."""
    for runtime, cap in itertools.product(runtimes(), (50.0, 0.0)):
        setup = Setup(2, 1, 16, dtype, cap=cap, query_scale=1000.0)
        text = setup.text(50, seed=1, scale=2.0)
        out = setup.whole(runtime, text)
        q, k, v = (x.astype(np.float64) for x in (setup.turned(text)[0], *setup.cached(text)))
        expected, _ = attention(q, k, v, np.arange(50), 0, cap)
        scores = np.einsum("thd,shd->ths", q, np.repeat(k, 2, axis=1))
        # Leave out rows where a score is near 0 or two are near each other: there a rounding decides.
        clear = (abs(scores) > 500).all(axis=-1)
        ordered = np.sort(scores, axis=-1)
        clear &= (ordered[..., -1] - ordered[..., -2] > 200) | (cap > 0)
        assert clear.sum() > 20
        assert abs(out.reshape(expected.shape) - expected)[clear].max() < 0.02
        assert np.isfinite(out).all()


# Which keys are seen, as 0/1 matrices: value j is the unit vector j, and equal scores make equal weights.
FULL = """1
11
111
1111
11111
111111"""
WINDOW_3 = """1
11
111
0111
00111
000111"""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, picture", [(0, FULL), (3, WINDOW_3), (6, FULL)])
def test_masks(window: int, picture: str, dtype: str, isa: str) -> None:
    setup = Setup(1, 1, 16, dtype, window=window)
    text = setup.text(6, seed=0)
    text.qkv[:] = 0
    text.qkv[np.arange(6), 32 + np.arange(6)] = 1  # the values
    out = setup.whole(kernels.Runtime(1, isa), text)
    seen = (out[:, :6] > 0.5 / 6).astype(int)
    expected = [[int(c) for c in line.ljust(6, "0")] for line in picture.split()]
    assert seen.tolist() == expected
    np.testing.assert_allclose(out[:, :6], seen / seen.sum(axis=1, keepdims=True), rtol=1e-2)


@pytest.mark.parametrize("window", [1, 31, 32, 33, 255, 256, 257])
def test_window_edges(window: int) -> None:
    """The oldest key that a row sees has the largest score: one token too few or too many changes everything."""
    for runtime, dtype in itertools.product(runtimes(), DTYPES):
        setup = Setup(1, 1, 2, dtype, window=window, query_scale=1.0)
        text = setup.text(600, seed=0)
        text.qkv[:] = 0
        n = np.arange(600)
        text.qkv[:, 4] = n % 100 / 50  # values; keys and queries stay 0 but for RoPE-free dims, so weights are equal
        out = setup.whole(runtime, text, chunks=[300])[:, 0]
        _, values = setup.cached(text)
        expected = [values[max(0, i - window + 1) : i + 1, 0, 0].astype(np.float64).mean() for i in n]
        np.testing.assert_allclose(out, expected, atol=2e-3 if dtype == "int8" else 1e-5)


def bits(x: Floats) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("cap", [50.0, 0.0])
def test_bits_do_not_depend_on_chunks_threads_or_instruction_set(cap: float, window: int, dtype: str) -> None:
    setup = Setup(4, 2, 40, dtype, window=window, cap=cap, query_scale=0.5, num_blocks=400)
    text = setup.text(600, seed=9)

    def run(runtime: kernels.Runtime, chunks: list[int]) -> npt.NDArray[np.uint32]:
        again = Text(text.qkv, setup.text(600, seed=0).blocks)
        return bits(setup.whole(runtime, again, chunks))

    whole = run(kernels.Runtime(1), [])
    for threads, chunks in [(2, []), (3, [1, 2, 31, 200]), (2, [255, 1, 1, 1]), (1, [64, 64, 7]), (3, [32] * 10)]:
        np.testing.assert_array_equal(run(kernels.Runtime(threads), chunks), whole)
    for isa in ISAS:
        np.testing.assert_array_equal(run(kernels.Runtime(2, isa), [400]), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_decoding_equal_those_of_a_prompt(dtype: str) -> None:
    """Tokens one by one, beside other sequences of other lengths, give the bits of one pass over the text."""
    for window in (0, 50):
        setup = Setup(4, 2, 16, dtype, window=window, num_blocks=200)
        text = setup.text(290, seed=4)
        expected = setup.whole(kernels.Runtime(1), Text(text.qkv, setup.text(290, seed=4).blocks))
        runtime = kernels.Runtime(3)
        others = [setup.text(600, seed=i) for i in (5, 6)]
        outputs = [setup.step(runtime, [(text, 250)])[0]]
        setup.step(runtime, [(others[0], 333)])
        for i in range(40):
            parts = [(others[0], 1), (text, 1), (others[1], 13)] if i % 2 else [(others[1], 1), (text, 1)]
            outputs.append(setup.step(runtime, parts)[parts.index((text, 1))])
        np.testing.assert_array_equal(bits(np.concatenate(outputs)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_neighbours(dtype: str) -> None:
    results = []
    for seed in (1, 2):
        setup = Setup(4, 2, 16, dtype, window=100, num_blocks=200)
        text = setup.text(200, seed=0)
        before, after = setup.text(100, seed=seed), setup.text(300, seed=seed + 10, scale=3.0)
        runtime = kernels.Runtime(2)
        setup.step(runtime, [(before, 40), (text, 150), (after, 200)])
        results.append(setup.step(runtime, [(before, 1), (text, 50), (after, 70)])[1])
    np.testing.assert_array_equal(bits(results[0]), bits(results[1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_sequence_is_split_and_merged(dtype: str) -> None:
    """Decoding far into a text is shared among threads by spans; the result has the bits of one thread."""
    for cap in (50.0, 0.0):
        setup = Setup(2, 1, 32, dtype, cap=cap, num_blocks=300)
        text = setup.text(4001, seed=2)
        setup.step(kernels.Runtime(1), [(text, 4000)])
        outputs = []
        for threads in (1, 2, 3, 8):
            text.length = 4000
            outputs.append(setup.step(kernels.Runtime(threads), [(text, 1)])[0])
        for out in outputs[1:]:
            np.testing.assert_array_equal(bits(out), bits(outputs[0]))
        check(setup, text, outputs[0], first=4000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_freed_blocks_are_not_read(dtype: str) -> None:
    setup = Setup(2, 1, 16, dtype, window=40)
    text = setup.text(200, seed=7)
    expected = setup.whole(kernels.Runtime(2), Text(text.qkv, setup.text(200, seed=0).blocks))
    setup.step(kernels.Runtime(2), [(text, 150)])
    text.first_block = (150 - 40 + 1) // BLOCK
    np.testing.assert_array_equal(bits(setup.step(kernels.Runtime(2), [(text, 50)])[0]), bits(expected[150:]))
    with pytest.raises(ValueError, match="their block is -1"):
        text.first_block = 5
        text.length = 170
        setup.step(kernels.Runtime(2), [(text, 1)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_gives_its_value(dtype: str, isa: str) -> None:
    setup = Setup(2, 1, 12, dtype)
    text = setup.text(1, seed=0)
    out = setup.whole(kernels.Runtime(1, isa), text)
    _, values = setup.cached(text)
    # p · v / p: exact but for the rounding of the product and of the quotient, and in int8 of the weight.
    np.testing.assert_allclose(out.reshape(2, 12), np.repeat(values[0], 2, axis=0), rtol=2.0**-21)


def test_a_bad_number_stays_in_its_row() -> None:
    for runtime, dtype, cap in itertools.product(runtimes(), DTYPES, (50.0, 0.0)):
        setup = Setup(1, 1, 16, dtype, cap=cap)
        text = setup.text(70, seed=0)
        text.qkv[40, 3] = np.nan  # of the query
        out = setup.whole(runtime, text)
        assert np.isnan(out[40]).all()
        assert np.isfinite(np.delete(out, 40, axis=0)).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [19, 35], ids=["key", "value"])
def test_a_bad_number_in_the_cache_is_seen_by_who_sees_its_token(bad: float, column: int) -> None:
    """Bytes have no NaN, so in int8 the scales must carry it: else a broken model would look like a sound one."""
    for runtime, dtype, cap in itertools.product(runtimes(), DTYPES, (50.0, 0.0)):
        if column == 19 and dtype != "int8" and np.isinf(bad):
            continue  # an infinite score has a weight: that of the cap, or 0, or 1
        setup = Setup(1, 1, 16, dtype, cap=cap)
        text = setup.text(70, seed=0)
        text.qkv[64, column] = bad  # the first token of a block, which starts a chunk of its own
        out = setup.whole(runtime, text, chunks=[64, 1])
        assert not np.isfinite(out[64:]).all(axis=1).any(), (runtime.isa, dtype, cap)
        assert np.isfinite(out[:64]).all()


def test_nothing_to_do() -> None:
    setup = Setup(2, 1, 8, "float32")
    text, other = setup.text(5, seed=0), setup.text(3, seed=1)
    outputs = setup.step(kernels.Runtime(2), [(text, 0), (other, 3), (text, 0)])
    assert [len(out) for out in outputs] == [0, 3, 0]
    check(setup, other, outputs[1])
    setup.step(kernels.Runtime(2), [(text, 0)])


def test_bad_arguments() -> None:
    runtime, cache = kernels.Runtime(1), make_cache("float32", 2, 8, 2)
    table = kernels.BatchTable(np.array([0, 3], np.int32), np.array([0], np.int32), np.zeros((1, 1), np.int32))
    q = np.zeros((3, 32), np.float32)

    def attend(queries: Floats = q, window: int = 0, cap: float = 50.0, out: Floats = q) -> None:
        kernels.attend(runtime, queries, table, cache, window, cap, out)

    with pytest.raises(ValueError, match="window must not be negative"):
        attend(window=-1)
    with pytest.raises(ValueError, match="cap must not be negative"):
        attend(cap=-1.0)
    with pytest.raises(ValueError, match="multiple of the 2 key/value heads"):
        attend(queries=np.zeros((3, 24), np.float32))
    with pytest.raises(ValueError, match="heads of 8 values"):
        attend(queries=np.zeros((3, 30), np.float32))
    with pytest.raises(ValueError, match="queries: axis 0 must be 3"):
        attend(queries=np.zeros((4, 32), np.float32))
    with pytest.raises(ValueError, match="out: axis 1 must be 32"):
        attend(out=np.zeros((3, 16), np.float32))
    with pytest.raises(TypeError):
        attend(queries=np.zeros((3, 32), np.float64))  # type: ignore[arg-type]
    bad = kernels.BatchTable(np.array([0, 3], np.int32), np.array([0], np.int32), np.full((1, 1), 2, np.int32))
    with pytest.raises(ValueError, match="their block is 2, and the cache has blocks 0 to 1"):
        kernels.attend(runtime, q, bad, cache, 0, 50.0, q)
