"""Matrix products alone, beside the machine's ceilings: benchmarks/kernels_matmul.py [--formats F …] [--rows N …]

Weights are random, in the shapes of 2B unless --shapes says otherwise. For each product: the best time of several,
arithmetic and its share of the peak of dot products in registers, bytes of weights per second and their share of the
read bandwidth. On one thread time is that thread's CPU time, so that a busy machine spoils less; on several it is the
clock's. The ceilings are measured before each shape, with the same threads and instruction set, by the clock.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels

SHAPES_2B = ["4096x2304", "2304x2048", "18432x2304", "2304x9216"]
"""outputs x inputs of one layer: query, key and value; attention's output; gate and up; down."""
BEYOND_CACHES_BYTES = 256 << 20


def aligned(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialized memory that starts at a cache line."""
    memory = np.empty(num_bytes + 63, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:num_bytes]


def random_matrices(format: str, outputs: int, inputs: int, copies: int) -> list[kernels.Matrix]:
    """The same random weights several times, so that one product finds none of the last one's in a cache."""
    weights = np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)
    first = aligned(kernels.matrix_bytes(format, outputs, inputs))
    kernels.pack_matrix(kernels.Runtime(1), weights, format, first)
    blocks = [first]
    for _ in range(copies - 1):
        blocks.append(aligned(first.nbytes))
        blocks[-1][:] = first
    return [kernels.Matrix(format, outputs, inputs, block) for block in blocks]


def best_seconds(runtime: kernels.Runtime, matrices: list[kernels.Matrix], rows: int, seconds: float) -> float:
    """The shortest time of one product."""
    outputs, inputs = matrices[0].outputs, matrices[0].inputs
    x = kernels.Activations(matrices[0].activation_format, rows, inputs)
    kernels.write_activations(runtime, np.random.default_rng(1).standard_normal((rows, inputs), np.float32), x)
    out = np.empty((rows, outputs), np.float32)
    clock = time.thread_time if runtime.num_threads == 1 else time.perf_counter
    best, until, count = float("inf"), time.monotonic() + seconds, 0
    while count < 3 or time.monotonic() < until:
        began = clock()
        kernels.matmul(runtime, x, matrices[count % len(matrices)], out)
        best = min(best, clock() - began)
        count += 1
    return best


def main() -> None:
    """Prints one line for each product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["q4", "q8", "bfloat16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES_2B, metavar="OUTPUTSxINPUTS")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="auto", help=", ".join(kernels.available_isas()))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each product")
    parser.add_argument("--warm", action="store_true", help="the same weights each time, in a cache if they fit one")
    args = parser.parse_args()
    runtime = kernels.Runtime(args.threads, args.isa)
    memory = aligned(BEYOND_CACHES_BYTES)
    memory[:] = 1
    print(f"{runtime.isa}, {runtime.num_threads} threads")
    for format in args.formats:
        kind = "int8" if format in ("q4", "q8") else format
        for shape in args.shapes:
            peak = kernels.measure_dot_peak(runtime, kind, 0.2)[0]
            bandwidth = kernels.measure_read_bandwidth(runtime, memory, 0.4)[0]
            print(f"{format} {shape}: at most {peak / 1e9:.0f} Gop/s ({kind}), {bandwidth / 1e9:.1f} GB/s")
            outputs, inputs = map(int, shape.split("x"))
            size = kernels.matrix_bytes(format, outputs, inputs)
            matrices = random_matrices(format, outputs, inputs, 1 if args.warm else 1 + BEYOND_CACHES_BYTES // size)
            for rows in args.rows:
                seconds = best_seconds(runtime, matrices, rows, args.seconds)
                rate, read = 2 * rows * outputs * inputs / seconds, size / seconds
                print(
                    f"  {rows:4} rows: {seconds * 1e6:9.1f} us, {rate / 1e9:7.1f} Gop/s"
                    f" ({rate / peak:4.0%}), {read / 1e9:5.1f} GB/s ({read / bandwidth:4.0%})",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
