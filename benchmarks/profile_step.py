"""Where a step's time goes, kernel by kernel: python benchmarks/profile_step.py [--size 2b] [--weights q4] [--rows 1]

Runs steps of the CPU engine over random weights and adds up the wall time inside each kernel; matrix products are told
apart by the matrix. The rest is Python.
"""

from __future__ import annotations

import argparse
import collections
import time
from typing import Any

import numpy as np

import gemma2.cpu.model
from gemma2 import _kernels
from gemma2.config import PRESETS, preset
from gemma2.cpu import CpuBackend
from gemma2.cpu.random_weights import random_packed_model
from gemma2.step import SequenceStep, StepBatch

KERNELS = (
    "matmul",
    "append_kv",
    "attend",
    "write_activations",
    "add_rms_norm",
    "rms_norm",
    "geglu",
    "embed",
    "soft_cap",
)


class TimedKernels:
    """The kernels, each with a clock around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(_kernels, name)
        if name not in KERNELS:
            return kernel

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            kernel(*arguments)
            elapsed = time.perf_counter() - start
            if name == "matmul":
                w = arguments[2]
                self.seconds[f"matmul {w.outputs} x {w.inputs}"] += elapsed
            else:
                self.seconds[name] += elapsed

        return timed


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(PRESETS), default="2b")
    parser.add_argument("--weights", choices=("q4", "q8", "bfloat16", "float32"), default="q4")
    parser.add_argument("--rows", type=int, default=1, help="tokens of a step: 1 to decode, 512 to prefill")
    parser.add_argument("--sequences", type=int, default=1, help="sequences of a step, each with so many rows")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache before the first measured step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()

    backend = CpuBackend(random_packed_model(preset(arguments.size), arguments.weights), num_threads=arguments.threads)
    generator = np.random.default_rng(0)

    def step(position: int, num_tokens: int) -> None:
        steps = (
            SequenceStep(
                sequence_id=sequence_id,
                token_ids=generator.integers(0, 256_000, num_tokens).astype(np.int32),
                position=position,
                num_logits=1,
            )
            for sequence_id in range(arguments.sequences)
        )
        backend.forward(StepBatch(steps=tuple(steps)))

    position = 0
    if arguments.context:
        step(0, arguments.context)
        position = arguments.context
    timed = TimedKernels()
    gemma2.cpu.model.kernels = timed  # type: ignore[assignment]
    totals = []
    for index in range(arguments.steps + 2):
        if index == 2:  # the first ones touch memory for the first time
            timed.seconds.clear()
            totals.clear()
        start = time.perf_counter()
        step(position, arguments.rows)
        totals.append(time.perf_counter() - start)
        if arguments.rows == 1:
            position += 1
        else:  # every step reads the same part of a text
            for sequence_id in range(arguments.sequences):
                backend.free(sequence_id)
            if arguments.context:
                before = dict(timed.seconds)
                step(0, arguments.context)
                timed.seconds = collections.defaultdict(float, before)
    total = sum(totals)
    tokens = arguments.rows * arguments.sequences
    print(
        f"{tokens} tokens a step, {total / len(totals) * 1e3:.2f} ms (median {np.median(totals) * 1e3:.2f}), "
        f"{tokens / np.median(totals):.1f} tokens/s, {backend.num_threads} threads, {backend.isa}"
    )
    timed.seconds["Python"] = total - sum(timed.seconds.values())
    for name, seconds in sorted(timed.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:28s} {seconds / len(totals) * 1e3:9.3f} ms  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
