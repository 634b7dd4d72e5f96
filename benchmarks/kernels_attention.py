"""Measures the attention kernels beside the ceilings of the machine.

    python benchmarks/kernels_attention.py                      every shape and type, one thread
    python benchmarks/kernels_attention.py --threads 2 --shapes 2b --types bfloat16

Prefill is arithmetic: its rate is compared with dot products in registers of the type that the cache uses (int8 needs
two planes of queries and weights, so half of its peak is the most it can reach). Decoding is memory: its rate is
compared with a plain read. Both ceilings are measured in the same run. Times are the best of several rounds, on one
thread in processor time, so that neighbours do not count.
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels

SHAPES = {"2b": (8, 4, 256), "9b": (16, 8, 256), "27b": (32, 16, 128), "small": (4, 2, 64)}
"""Query heads, key/value heads, head size."""
COLD_BYTES = 256 << 20
"""Decoding goes through as many layers' caches as take this much: more than caches of the processor hold."""


def aligned(size: int, *, huge: bool = True) -> npt.NDArray[np.uint8]:
    """Memory that is really there: pages that were only reserved would all be read from one page of zeros."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    array[:] = 1
    return array


@dataclass
class Case:
    """`num_layers` caches of some sequences, filled up to `context`, and the next tokens of each sequence."""

    shape: tuple[int, int, int]
    dtype: str
    context: int
    num_tokens: int
    num_sequences: int = 1
    num_layers: int = 1
    window: int = 0
    is_scattered: bool = False
    """Whether the blocks of a text lie in no order, as after long serving, or follow each other."""

    def __post_init__(self) -> None:
        _, kv_heads, head_dim = self.shape
        total = self.context + self.num_tokens
        per_sequence = -(-total // kernels.KV_BLOCK)
        num_blocks = per_sequence * self.num_sequences
        size = num_blocks * kernels.KVCache.block_bytes(self.dtype, kv_heads, head_dim)
        order = np.arange(num_blocks, dtype=np.int32)
        if self.is_scattered:
            np.random.default_rng(0).shuffle(order)
        self.blocks = order.reshape(self.num_sequences, per_sequence)
        self.caches = []
        rng = np.random.default_rng(1)
        for _ in range(self.num_layers):
            self.caches.append(kernels.KVCache(self.dtype, kv_heads, head_dim, num_blocks, aligned(size)))
        if self.context:
            n = self.num_sequences
            table = kernels.BatchTable(
                np.arange(n + 1, dtype=np.int32) * self.context, np.zeros(n, np.int32), self.blocks
            )
            for cache in self.caches:
                self.append(kernels.Runtime(2), rng, table, n * self.context, cache)
        n = self.num_sequences
        self.table = kernels.BatchTable(
            np.arange(n + 1, dtype=np.int32) * self.num_tokens, np.full(n, self.context, np.int32), self.blocks
        )
        self.queries = self.append(kernels.Runtime(2), rng, self.table, n * self.num_tokens, self.caches[0])
        self.out = np.zeros_like(self.queries)

    def append(
        self,
        runtime: kernels.Runtime,
        rng: np.random.Generator,
        table: kernels.BatchTable,
        rows: int,
        cache: kernels.KVCache,
    ) -> npt.NDArray[np.float32]:
        heads, kv_heads, head_dim = self.shape
        self.qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * head_dim), np.float32)
        self.cos, self.sin = np.ones((rows, head_dim // 2), np.float32), np.zeros((rows, head_dim // 2), np.float32)
        queries = np.empty((rows, heads * head_dim), np.float32)
        kernels.append_kv(runtime, self.qkv, self.cos, self.sin, table, cache, head_dim**-0.5, queries)
        return queries

    def append_again(self, runtime: kernels.Runtime) -> None:
        for cache in self.caches:
            kernels.append_kv(runtime, self.qkv, self.cos, self.sin, self.table, cache, 0.1, self.queries)

    def attend(self, runtime: kernels.Runtime) -> None:
        for cache in self.caches:
            kernels.attend(runtime, self.queries, self.table, cache, self.window, 50.0, self.out)

    @property
    def keys_seen(self) -> int:
        """Over all tokens of one sequence and layer."""
        last = np.arange(self.context, self.context + self.num_tokens) + 1
        return int(np.minimum(last, self.window).sum() if self.window else last.sum())

    @property
    def flop(self) -> int:
        heads, _, head_dim = self.shape
        return self.keys_seen * heads * head_dim * 4 * self.num_sequences * self.num_layers

    @property
    def bytes_read(self) -> int:
        """When each token sees about the same keys: of one token."""
        _, kv_heads, head_dim = self.shape
        per_token = kernels.KVCache.block_bytes(self.dtype, kv_heads, head_dim) // kernels.KV_BLOCK
        return self.keys_seen // self.num_tokens * per_token * self.num_sequences * self.num_layers


def best_seconds(action: Callable[[], None], threads: int, seconds: float) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    action()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = clock()
        action()
        best = min(best, clock() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--types", nargs="+", default=["bfloat16", "int8", "float32"])
    parser.add_argument("--only", nargs="+", default=["prefill", "decode", "append"])
    args = parser.parse_args()
    runtime = kernels.Runtime(args.threads, args.isa)
    read = kernels.measure_read_bandwidth(runtime, aligned(COLD_BYTES), args.seconds)[0]
    print(f"{args.threads} threads, {runtime.isa}; reads {read / 1e9:.1f} GB/s")
    for dtype in args.types:
        peak = kernels.measure_dot_peak(runtime, dtype, args.seconds)[0]
        print(f"{dtype}: dot products in registers {peak / 1e9:.0f} Gop/s")
        for name in args.shapes:
            shape = SHAPES[name]

            def report(
                what: str,
                case: Case,
                action: Callable[[kernels.Runtime], None],
                name: str = name,
                peak: float = peak,
            ) -> None:
                took = best_seconds(lambda: action(runtime), args.threads, args.seconds) / case.num_layers
                line = f"  {name:6}{what:34}{took * 1e6:11.1f} µs"
                if action == case.append_again:
                    line += f"  {case.qkv.size / took / 1e9:6.2f} values/ns"
                elif case.num_tokens > 1:
                    rate = case.flop / case.num_layers / took
                    line += f"  {rate / 1e9:6.0f} Gflop/s, {rate / peak:.2f} of the peak"
                else:
                    rate = case.bytes_read / case.num_layers / took
                    line += f"  {rate / 1e9:6.1f} GB/s, {rate / read:.2f} of reads"
                print(line, flush=True)

            if "prefill" in args.only:
                for context, n, window in ((0, 512, 0), (3584, 512, 0), (7680, 512, 0), (7680, 512, 4096)):
                    case = Case(shape, dtype, context, n, window=window)
                    report(f"prefill {n} at {context}" + (f", window {window}" if window else ""), case, case.attend)
            if "decode" in args.only:
                for context, n in ((8191, 1), (511, 1), (2047, 16)):
                    probe = Case(shape, dtype, context, 1, n)
                    case = Case(shape, dtype, context, 1, n, num_layers=max(1, COLD_BYTES // probe.bytes_read))
                    report(f"decode at {context + 1}, {n} sequences", case, case.attend)
                case = Case(shape, dtype, 20, 1)
                report("decode at 21, in cache", case, case.attend)
            if "append" in args.only:
                for n in (512, 1):
                    case = Case(shape, dtype, 20, n)
                    report(f"append {n}", case, case.append_again)


if __name__ == "__main__":
    main()
