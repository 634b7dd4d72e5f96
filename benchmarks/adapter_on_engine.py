"""What a LoRA adapter on all linear maps costs when the CPU engine adds it to packed weights as they run.

python benchmarks/adapter_on_engine.py [--size 2b] [--weights q4] [--rank 16]: random weights, by turns without and with
the adapter; medians of decode steps at a context of 512, and of three prompts of 512 tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from gemma2.checkpoints import Adapter, LowRankUpdate
from gemma2.config import PRESETS, preset
from gemma2.cpu import CpuBackend
from gemma2.cpu.random_weights import random_packed_model
from gemma2.memory.weights import layer_matrices
from gemma2.step import SequenceStep, StepBatch


def random_adapter(config_name: str, rank: int) -> Adapter:
    config = preset(config_name)
    random = np.random.default_rng(0)
    updates = {}
    for index in range(config.num_hidden_layers):
        for name, (outputs, inputs) in layer_matrices(config).items():
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            updates[f"model.layers.{index}.{part}.{name}.weight"] = LowRankUpdate(
                a=0.02 * random.standard_normal((rank, inputs), np.float32),
                b=0.02 * random.standard_normal((outputs, rank), np.float32),
                scale=2.0,
            )
    return Adapter(folder=Path(), base_model="", updates=updates)


def measure(backend: CpuBackend, token_ids: np.ndarray) -> tuple[float, list[float]]:
    """Seconds of a prompt of 512 tokens, and of each of 16 steps after it."""

    def run(tokens: np.ndarray, position: int) -> float:
        step = SequenceStep(sequence_id=1, token_ids=tokens, position=position, num_logits=1)
        start = time.perf_counter()
        backend.forward(StepBatch(steps=(step,)))
        return time.perf_counter() - start

    prompt = run(token_ids, 0)
    steps = [run(token_ids[index : index + 1], 512 + index) for index in range(16)]
    backend.free(1)
    return prompt, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PRESETS, default="2b")
    parser.add_argument("--weights", choices=("q4", "q8", "bfloat16", "float32"), default="q4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    packed = random_packed_model(preset(args.size), args.weights)
    backends = {
        "without": CpuBackend(packed, num_threads=args.threads),
        "with": CpuBackend(packed, num_threads=args.threads, adapter=random_adapter(args.size, args.rank)),
    }
    token_ids = np.random.default_rng(0).integers(1000, 200_000, 512).astype(np.int32)
    prompts: dict[str, list[float]] = {name: [] for name in backends}
    steps: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(4):
        for name, backend in backends.items():
            seconds, each = measure(backend, token_ids)
            prompts[name].append(seconds)
            steps[name] += each
    for name in backends:
        prefill, decode = 512 / np.median(prompts[name][1:]), 1 / np.median(steps[name][16:])
        print(f"{name:8} prefill {prefill:6.1f} tok/s   decode {decode:5.2f} tok/s")


if __name__ == "__main__":
    main()
