"""Prefill and decode beside transformers, on the same folder, in one sitting.

    python benchmarks/compare_transformers.py --make 2b /tmp/gemma-2b     random weights of the real shape, 5.2 GB
    python benchmarks/compare_transformers.py /tmp/gemma-2b               measure

The two sides run by turns and medians are taken, as the speed of a machine with neighbours changes within minutes.
Ours is what `gemma2.load` makes: bf16 with packed matrices, run through the backend, logits copied to numpy. Theirs is
transformers in bf16 with eager attention, which is the only CPU attention it has for Gemma 2's cap. The ceiling of
decode is memory: what a plain read of as many bytes as the weights have takes is measured before and after.

Random weights cost what trained ones cost. Both models are in memory together: 12 GB for the 2B.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from gemma2.checkpoints import expected_tensors, open_checkpoint, save_checkpoint
from gemma2.config import PRESETS, Gemma2Config
from gemma2.model import TorchBackend, load_model, pack_linear_layers
from gemma2.step import SequenceStep, StepBatch

SHAPES = {
    **PRESETS,
    # To try this script: a minute's work less, and no figure worth reporting.
    "tiny": PRESETS["2b"].replace(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, head_dim=64, query_pre_attn_scalar=64
    ),
}


def make_folder(folder: Path, config: Gemma2Config) -> None:
    """Writes a bf16 model of random weights, without a tokenizer."""

    def tensors() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in expected_tensors(config).items():
            deviation = 0.1 if "norm" in name else config.initializer_range
            value = torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, deviation, generator=generator)
            yield name, value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)

    save_checkpoint(folder, config, tensors())


class Ours:
    """Our backend, one sequence."""

    def __init__(self, folder: Path, *, pack: bool) -> None:
        model = load_model(open_checkpoint(folder), dtype="bfloat16")
        self.packed = pack and pack_linear_layers(model)
        self._backend = TorchBackend(model)
        self._position = 0

    def prefill(self, ids: npt.NDArray[np.int32]) -> None:
        """A new sequence."""
        self._backend.free(0)
        self._position = 0
        self._step(ids)

    def decode(self, token_id: int) -> None:
        """Its next token."""
        self._step(np.array([token_id], dtype=np.int32))

    def _step(self, ids: npt.NDArray[np.int32]) -> None:
        part = SequenceStep(sequence_id=0, token_ids=ids, position=self._position, num_logits=1)
        self._backend.forward(StepBatch(steps=(part,)))
        self._position += len(ids)


class Theirs:
    """transformers, one sequence."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.version = transformers.__version__
        self._model: Any = transformers.Gemma2ForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, ids: npt.NDArray[np.int32]) -> None:
        """A new sequence."""
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        self._cache = self._model(batch, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode(self, token_id: int) -> None:
        """Its next token."""
        batch = torch.tensor([[token_id]])
        self._cache = self._model(batch, past_key_values=self._cache, use_cache=True).past_key_values


def seconds_of(action: Callable[..., object], *arguments: object) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def read_bandwidth(num_bytes: int) -> float:
    """GB/s of summing an array of this size, at most 2 GB, as int64: the plainest read there is."""
    array = torch.ones(min(num_bytes, 2_000_000_000) // 8, dtype=torch.int64)
    array.sum()
    return array.nbytes / min(seconds_of(array.sum) for _ in range(3)) / 1e9


def measure(folder: Path, *, prompt: int, tokens: int, rounds: int, pack: bool) -> None:
    """Prints the medians of both sides and their ratio."""
    checkpoint = open_checkpoint(folder)
    config, num_bytes = checkpoint.config, checkpoint.num_bytes
    theirs, ours = Theirs(folder), Ours(folder, pack=pack)
    sides: dict[str, Ours | Theirs] = {"ours": ours, "transformers": theirs}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, prompt).astype(np.int32)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {theirs.version}; {num_bytes / 1e9:.2f} GB of bf16 weights"
        f"{', layers packed' if ours.packed else ''}; load {', '.join(f'{value:.1f}' for value in os.getloadavg())}"
    )
    bandwidth = read_bandwidth(num_bytes)
    prefill: dict[str, list[float]] = {name: [] for name in sides}
    decode: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # first calls build products' code
        side.prefill(ids[:16])
        side.decode(5)
    for index in range(rounds):
        order = list(sides) if index % 2 else list(reversed(sides))
        for name in order:
            prefill[name].append(seconds_of(sides[name].prefill, ids))
        for token in range(tokens):
            for name in order:
                decode[name].append(seconds_of(sides[name].decode, token))
    bandwidth = max(bandwidth, read_bandwidth(num_bytes))
    for what, times, count in (
        (f"prefill {prompt}", prefill, prompt),
        (f"decode at {prompt} to {prompt + tokens}", decode, 1),
    ):
        rates = {name: count / statistics.median(values) for name, values in times.items()}
        line = ", ".join(f"{name} {rate:.2f} tok/s" for name, rate in rates.items())
        print(f"{what}: {line}; ratio {rates['ours'] / rates['transformers']:.2f}")
        if times is decode:
            print(f"  plain reads {bandwidth:.1f} GB/s; ours reads {rates['ours'] * num_bytes / 1e9:.1f} GB/s")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder; a tokenizer is not needed")
    parser.add_argument("--make", choices=SHAPES, help="write the folder, with random weights of this shape, and end")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode in each round (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side has its turn (default: 3)")
    parser.add_argument("--no-pack", action="store_true", help="leave our matrices as the file has them")
    arguments = parser.parse_args()
    if arguments.make:
        make_folder(arguments.folder, SHAPES[arguments.make])
    else:
        measure(
            arguments.folder,
            prompt=arguments.prompt,
            tokens=arguments.tokens,
            rounds=arguments.rounds,
            pack=not arguments.no_pack,
        )


if __name__ == "__main__":
    main()
