"""The CPU engine: a sequence's bits depend on nothing but itself, and its cache holds no more than it must."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_cpu_model import CONFIG, ids, make_backend, random_model, run, run_in_chunks

from gemma2 import _kernels as kernels
from gemma2.cpu import CpuBackend
from gemma2.cpu.backend import KV_CACHE_DTYPES
from gemma2.cpu.threads import default_num_threads
from gemma2.errors import ConfigError, KVCacheFullError
from gemma2.quantization import PACKED_FORMATS, SECOND_PLANE
from gemma2.step import Logits

FORMATS = pytest.mark.parametrize("weights", PACKED_FORMATS)
CACHES = pytest.mark.parametrize("kv_cache", KV_CACHE_DTYPES[1:])


@FORMATS
@pytest.mark.parametrize("sizes", [[1], [7], [31, 32, 33], [80], [199]])
def test_chunks_of_a_prompt_give_the_same_bits(weights: str, sizes: list[int]) -> None:
    text = ids(200)
    whole = run(make_backend(weights), (0, text, 0))
    assert np.array_equal(run_in_chunks(make_backend(weights), text, sizes), whole)


@CACHES
def test_chunks_give_the_same_bits_with_every_cache(kv_cache: str) -> None:
    text = ids(150)
    whole = run(make_backend(kv_cache=kv_cache), (0, text, 0))
    assert np.array_equal(run_in_chunks(make_backend(kv_cache=kv_cache), text, [50, 1, 13]), whole)


@FORMATS
def test_neighbours_change_nothing(weights: str) -> None:
    text, other, third = ids(100), ids(130, seed=1), ids(9, seed=2)
    backend = make_backend(weights)
    alone = run_in_chunks(backend, text, [60, 1])
    backend.free(0)
    mixed = [run(backend, (5, other[:50], 0), (0, text[:60], 0))[50:]]
    for position in range(60, 100):
        parts = [(0, text[position : position + 1], position)]
        if position == 62:
            parts.append((9, third, 0))
        if position % 2:
            parts.insert(0, (5, other[position - 10 : position - 8], position - 11))
        logits = run(backend, *parts)
        row = 2 if position % 2 else 0
        mixed.append(logits[row : row + 1])
    assert np.array_equal(np.concatenate(mixed), alone)


@FORMATS
def test_threads_change_nothing(weights: str) -> None:
    text = ids(120)
    one = run_in_chunks(make_backend(weights, num_threads=1), text, [100, 1])
    for num_threads in (2, 3):
        assert np.array_equal(run_in_chunks(make_backend(weights, num_threads=num_threads), text, [100, 1]), one)


def test_more_rows_than_go_through_at_once() -> None:
    text = ids(700)
    backend = make_backend()
    whole = run(backend, (0, text, 0))
    assert whole.shape == (700, CONFIG.vocab_size)
    assert np.array_equal(run_in_chunks(backend, text, [100], sequence_id=1), whole)
    many = run(backend, (2, text, 0), (3, text[:300], 0), (4, text[:30], 0), num_logits=3)
    assert np.array_equal(many, np.concatenate([whole[697:700], whole[297:300], whole[27:30]]))


def test_local_layers_hold_a_window_and_global_layers_all() -> None:
    backend = make_backend()
    run_in_chunks(backend, ids(1000), [40])
    local, full = backend._cache.kinds
    block = kernels.KV_BLOCK
    assert full.pool.num_blocks - full.pool.num_free == -(-1000 // block)
    held = local.pool.num_blocks - local.pool.num_free
    assert held <= -(-CONFIG.sliding_window // block) + 1
    assert backend.kv_cache_used_bytes == (held * local.token_bytes + -(-1000 // block) * full.token_bytes) * block
    # A token costs 2 · K · H values a layer.
    assert local.token_bytes == 2 * 2 * CONFIG.num_key_value_heads * CONFIG.head_dim * 2
    backend.free(0)
    assert backend.kv_cache_used_bytes == 0


def test_a_long_prompt_leaves_no_more_than_a_short_one() -> None:
    backend = make_backend()
    run(backend, (0, ids(1000), 0), num_logits=1)
    local = backend._cache.kinds[0]
    assert local.pool.num_blocks - local.pool.num_free <= -(-CONFIG.sliding_window // kernels.KV_BLOCK) + 1


@CACHES
@pytest.mark.parametrize("shared", [1, 31, 32, 33, 90, 120])
def test_a_fork_goes_on_as_its_parent_would(kv_cache: str, shared: int) -> None:
    text, other = ids(160), ids(40, seed=3)
    backend = make_backend(kv_cache=kv_cache)
    run(backend, (0, text[:shared], 0))
    before = backend.kv_cache_used_bytes
    backend.fork(0, 1)
    assert backend.kv_cache_used_bytes == before  # shared, not copied
    # Both write on from the same place, by turns; neither sees the other's tokens.
    first = [run(backend, (1, other[:5], shared)), run(backend, (0, text[shared : shared + 5], shared))]
    first += [run(backend, (1, other[5:], shared + 5)), run(backend, (0, text[shared + 5 :], shared + 5))]
    alone = make_backend(kv_cache=kv_cache)
    parent = run(alone, (0, text, 0))[shared:]
    child = run(alone, (1, np.concatenate([text[:shared], other]), 0))[shared:]
    assert np.array_equal(np.concatenate([first[1], first[3]]), parent)
    assert np.array_equal(np.concatenate([first[0], first[2]]), child)
    for sequence_id in (0, 1):
        backend.free(sequence_id)
    assert backend.kv_cache_used_bytes == 0


def test_a_fork_of_a_part() -> None:
    text = ids(100)
    backend = make_backend()
    whole = run(backend, (0, text, 0))
    backend.fork(0, 1, 70)
    assert np.array_equal(run(backend, (1, text[70:], 70)), whole[70:])
    backend.free(0)
    backend.fork(1, 2, 50)
    assert np.array_equal(run(backend, (2, text[50:], 50)), whole[50:])


def test_forks_that_cannot_be() -> None:
    backend = make_backend()
    run(backend, (0, ids(300), 0), num_logits=0)
    with pytest.raises(ValueError, match="sequence 7 is not in the cache"):
        backend.fork(7, 8)
    with pytest.raises(ValueError, match="sequence 0 is in the cache already"):
        backend.fork(0, 0)
    with pytest.raises(ValueError, match="has 300 tokens, so 301 cannot be shared"):
        backend.fork(0, 1, 301)
    with pytest.raises(ValueError, match="local layers have given back positions below"):
        backend.fork(0, 1, 150)
    backend.fork(0, 1, 299)


def test_a_full_cache_is_refused_and_frees_the_sequences_of_the_step() -> None:
    backend = make_backend(kv_cache_bytes=1)  # room for one sequence of the context's length
    run(backend, (0, ids(900), 0), num_logits=0)
    with pytest.raises(KVCacheFullError, match=r"blocks of \d+ tokens free, but this step needs"):
        run(backend, (1, ids(500), 0), num_logits=0)
    assert backend._cache.num_tokens(1) == 0
    whole = run(make_backend(), (0, ids(1000), 0))
    assert np.array_equal(run(backend, (0, ids(1000)[900:], 900)), whole[900:])
    backend.free(0)
    run(backend, (1, ids(500), 0), num_logits=0)


def test_ctrl_c_while_blocks_are_handed_out_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make_backend()
    free = [kind.pool.num_free for kind in backend._cache.kinds]
    local, full = backend._cache.kinds
    monkeypatch.setattr(full, "extend", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(backend, (0, ids(200), 0))
    assert [kind.pool.num_free for kind in (local, full)] == free
    monkeypatch.undo()
    assert np.array_equal(run(backend, (0, ids(200), 0)), run(make_backend(), (0, ids(200), 0)))


@pytest.mark.parametrize("limit", ["address space", "container"])
def test_a_cache_takes_half_of_what_limits_leave(limit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if limit == "address space":
        monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 28, 1 << 30))
    else:
        (tmp_path / "memory.max").write_text(f"{1 << 28}\n")
        monkeypatch.setattr("gemma2.cpu.backend.MEMORY_LIMIT_FILE", tmp_path / "memory.max")
    kinds = make_backend()._cache.kinds
    capacity = sum(kind.pool.num_blocks * kernels.KV_BLOCK * kind.token_bytes for kind in kinds)
    assert 0.9 * (1 << 27) < capacity <= 1 << 27


def test_only_the_rows_with_logits_go_through_the_last_layer() -> None:
    text = ids(90)
    whole = run(make_backend(), (0, text, 0))
    backend = make_backend()
    assert run(backend, (0, text[:50], 0), num_logits=0).shape == (0, CONFIG.vocab_size)
    assert np.array_equal(run(backend, (0, text[50:], 50), num_logits=4), whole[86:])


def test_a_cache_of_8_bits_is_near_one_of_16() -> None:
    text = ids(300)
    wide = run(make_backend("float32", kv_cache="float32"), (0, text, 0))
    middle = run(make_backend("float32", kv_cache="bfloat16"), (0, text, 0))
    narrow = run(make_backend("float32", kv_cache="int8"), (0, text, 0))
    spread = float(wide.std())
    assert 0 < np.abs(middle - wide).mean() < 0.02 * spread
    assert 0 < np.abs(narrow - wide).mean() < 0.05 * spread


def test_what_it_says_of_itself() -> None:
    backend = make_backend("q8", num_threads=2, isa="scalar", kv_cache="int8")
    assert (backend.weights, backend.num_threads, backend.isa, backend.kv_cache) == ("q8", 2, "scalar", "int8")
    assert backend.config == CONFIG
    assert make_backend("float32").kv_cache == "float32" and make_backend("q4").kv_cache == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": "float16"}, "kv_cache must be one of auto, float32, bfloat16, int8, but is 'float16'"),
        ({"num_threads": 0}, "num_threads must be a whole number from 1 to 1024, but is 0"),
        ({"isa": "sse"}, "instruction set .* but is 'sse'"),
        ({"isa": None}, "isa must be a name, such as 'auto', but is None"),
        ({"head_candidates": 1.5}, "head_candidates must be a whole number of at least 1, but is 1.5"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes must be a whole number of at least 1, but is 0"),
        ({"kv_cache_bytes": "1e9"}, "kv_cache_bytes must be a whole number of at least 1, but is '1e9'"),
        ({"kv_cache_bytes": 10**15}, r"a KV cache of \d+ bytes cannot be had"),
        ({"kv_cache_bytes": 10**18}, r"a KV cache of \d+ bytes cannot be had"),
        ({"kv_cache_bytes": 10**30}, r"a KV cache of \d+ bytes cannot be had"),
    ],
)
def test_options_that_are_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CpuBackend(random_model("q4"), **options)  # type: ignore[arg-type]


def test_the_environment_names_threads_and_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA2_NUM_THREADS", "3")
    monkeypatch.setenv("GEMMA2_ISA", "scalar")
    backend = CpuBackend(random_model("q4"))
    assert (backend.num_threads, backend.isa) == (3, "scalar")
    for nonsense in ("none", "0", "-1", "1025", "9" * 30, "9" * 5000):
        monkeypatch.setenv("GEMMA2_NUM_THREADS", nonsense)
        with pytest.raises(ConfigError, match="GEMMA2_NUM_THREADS must be a whole number from 1 to 1024, but is '"):
            default_num_threads()
    monkeypatch.delenv("GEMMA2_NUM_THREADS")
    assert default_num_threads() >= 1


def test_a_head_in_two_planes() -> None:
    """The second plane makes the embedding nearly exact; candidates get the logits of both planes, the others one."""
    text = ids(120)
    packed = random_model("q4")
    name = "model.embed_tokens.weight"
    shape = (CONFIG.vocab_size, CONFIG.hidden_size)
    runtime = kernels.Runtime(1)
    weights = kernels.unpack_matrix(runtime, kernels.Matrix("float32", *shape, random_model("float32").tensors[name]))
    lost = weights - kernels.unpack_matrix(runtime, kernels.Matrix("q4", *shape, packed.tensors[name]))
    plane = np.zeros_like(packed.tensors[name])
    whole = np.zeros(len(plane) + 64, dtype=np.uint8)
    plane = whole[-whole.ctypes.data % 64 :][: len(plane)]
    kernels.pack_matrix(runtime, np.ascontiguousarray(lost), "q4", plane)
    planes = dataclasses.replace(packed, tensors={**packed.tensors, SECOND_PLANE: plane})
    one = run(CpuBackend(packed, num_threads=2), (0, text, 0))
    full = run(CpuBackend(planes, num_threads=2, head_candidates=CONFIG.vocab_size), (0, text, 0))
    some = run(CpuBackend(planes, num_threads=2, head_candidates=40), (0, text, 0))
    assert full.shape == some.shape
    assert not np.array_equal(one, full)
    assert (some.argmax(-1) == full.argmax(-1)).mean() > 0.97
    refined = np.isclose(some, full, rtol=0, atol=1e-4).sum(axis=1)
    assert refined.min() >= 40
    # Rows do not depend on each other here either.
    assert np.array_equal(run_in_chunks(CpuBackend(planes, num_threads=1, head_candidates=40), text, [50, 1]), some)


def test_threads_wait_for_each_other() -> None:
    """All passes go through the same buffers."""
    texts = {index: ids(60, seed=index) for index in range(4)}
    expected = {index: run_in_chunks(make_backend(), text, [7]) for index, text in texts.items()}
    backend = make_backend()
    together = threading.Barrier(len(texts))

    def score(index: int) -> Logits:
        together.wait()
        logits = run_in_chunks(backend, texts[index], [7], sequence_id=index)
        backend.free(index)
        return logits

    with ThreadPoolExecutor(len(texts)) as threads:
        for _ in range(3):
            for index, logits in enumerate(threads.map(score, texts)):
                np.testing.assert_array_equal(logits, expected[index])
    assert backend.kv_cache_used_bytes == 0
