"""LoRA training beside transformers + PEFT: tokens per second, peak memory, loss.

    python benchmarks/compare_transformers.py --make 2b /tmp/gemma-2b     random weights of the real shape, 5.2 GB
    python benchmarks/lora.py /tmp/gemma-2b --length 512                  ours
    python benchmarks/lora.py /tmp/gemma-2b --batch 2 --length 1024 --peer --peer-checkpointing

Adapters of rank 16 on all linear maps, bf16 weights (ours as `--quantization` says), AdamW, every token trained on.
Each run is a process of its own; with `--peer` the two sides take turns. Speed is the median of the steps after the
first, which allocates; memory is the most that the process ever had (ru_maxrss), interpreter and weights included.
Both sides start from the same weights, draw the same tokens, and adapters that change nothing yet, so that losses must
agree at the first step. After it they show what becomes of updates that are small beside the steps of bf16;
`--peer-float32` shows what they should be.

A step costs 4 flop for each weight and token: 2 forward, 2 for the gradient of a frozen map's input.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4


def run_ours(
    folder: Path, batch: int, length: int, num_checkpointed: int, quantization: str
) -> tuple[Callable[[], float], float]:
    """A function that makes one step and returns its loss, and the flop of a step."""
    import torch

    from gemma2.checkpoints import open_checkpoint
    from gemma2.model import load_model
    from gemma2.training.activation_checkpointing import checkpoint_layers
    from gemma2.training.adapters import add_adapter
    from gemma2.training.lean_lora import use_lean_lora
    from gemma2.training.objectives import Batch, next_token_objective
    from gemma2.training.packed_base import load_packed
    from gemma2.training.tune_settings import AdapterSettings

    checkpoint = open_checkpoint(folder)
    if quantization == "none":
        model = load_model(checkpoint, dtype="bfloat16")
    else:
        model = load_packed(checkpoint, quantization, dtype=torch.bfloat16, num_threads=torch.get_num_threads())
    add_adapter(model, AdapterSettings(r=RANK, lora_alpha=ALPHA), seed=0)
    use_lean_lora(model)
    if num_checkpointed:
        checkpoint_layers(model, num_checkpointed)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, fused=True)
    objective = next_token_objective(compute_dtype=torch.bfloat16, compiled=False)
    ids = _tokens(batch, length)
    rows = Batch(
        input_ids=ids,
        labels=torch.cat([ids[:, 1:], torch.full((batch, 1), -100)], dim=1),
        position_ids=torch.arange(length).expand(batch, -1),
        segment_ids=torch.ones_like(ids),
    )

    def step() -> float:
        loss = objective(model, rows) / (batch * (length - 1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, 4.0 * model.config.count_parameters().total * batch * length


def run_theirs(
    folder: Path, batch: int, length: int, num_checkpointed: int, is_wide: bool
) -> tuple[Callable[[], float], float]:
    """The same with transformers and PEFT."""
    import peft
    import torch
    import transformers

    model: Any = transformers.Gemma2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if is_wide else torch.bfloat16, attn_implementation="eager"
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    maps = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=maps))
    if num_checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    ids = _tokens(batch, length)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step, 4.0 * num_parameters * batch * length


def _tokens(batch: int, length: int) -> Any:
    import torch

    return torch.randint(1000, 200_000, (batch, length), generator=torch.Generator().manual_seed(0))


def run_one(arguments: argparse.Namespace) -> None:
    """One side in this process; writes a line of JSON."""
    if arguments.one == "ours" and arguments.quantization != "none":
        from gemma2.runtime import share_cores_with_torch

        share_cores_with_torch()  # before PyTorch is imported, as `gemma2 tune` does
    import torch

    torch.set_num_threads(arguments.threads)
    rows = (arguments.folder, arguments.batch, arguments.length, arguments.checkpointed)
    step, flop = (
        run_theirs(*rows, arguments.peer_float32)
        if arguments.one == "theirs"
        else run_ours(*rows, arguments.quantization)
    )
    seconds, losses = [], []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak, "flop": flop}))


def run_process(side: str, arguments: argparse.Namespace, num_checkpointed: int) -> dict[str, Any]:
    """One side in a process of its own."""
    options = {"one": side, "checkpointed": num_checkpointed}
    options |= {name: getattr(arguments, name) for name in ("batch", "length", "steps", "threads", "quantization")}
    command = [sys.executable, __file__, str(arguments.folder)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--peer-float32"] * arguments.peer_float32
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{side}: {(result.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
    figures: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return figures


def compare(arguments: argparse.Namespace) -> None:
    """Lets the sides take turns and prints the figures."""
    sides = {"ours": arguments.checkpointed}
    if arguments.peer:
        sides["theirs"] = int(arguments.peer_checkpointing)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    print(
        f"LoRA r={RANK}, {arguments.batch} x {arguments.length} tokens, {arguments.threads} threads; "
        f"load {', '.join(f'{value:.1f}' for value in os.getloadavg())}"
    )
    for index in range(arguments.rounds):
        for side in sides if index % 2 == 0 else reversed(sides):
            runs[side].append(run_process(side, arguments, sides[side]))
    rates, peaks = {}, {}
    names = {"ours": "gemma2", "theirs": "transformers + PEFT" + (", float32" if arguments.peer_float32 else "")}
    for side, figures in runs.items():
        median = statistics.median(second for run in figures for second in run["seconds"][1:])
        rates[side] = arguments.batch * arguments.length / median
        peaks[side] = max(run["peak_bytes"] for run in figures)
        losses = " ".join(f"{loss:.4f}" for loss in figures[-1]["losses"])
        checkpointed = f", {sides[side]} layers checkpointed" if side == "ours" and sides[side] else ""
        if side == "ours" and arguments.quantization != "none":
            checkpointed = f", {arguments.quantization} base" + checkpointed
        checkpointed += ", checkpointing" if side == "theirs" and sides[side] else ""
        print(
            f"{names[side]}{checkpointed}: {rates[side]:.2f} tok/s ({figures[0]['flop'] / median / 1e9:.0f} Gflop/s "
            f"of needed work), peak {peaks[side] / 1e9:.2f} GB, loss {losses}"
        )
    if arguments.peer:
        print(f"ratio: speed {rates['ours'] / rates['theirs']:.2f}, memory {peaks['ours'] / peaks['theirs']:.2f}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder; a tokenizer is not needed")
    parser.add_argument("--batch", type=int, default=1, help="rows (default: 1)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run; the first is not timed (default: 4)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each side has its turn (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default: 2)")
    parser.add_argument("--checkpointed", type=int, default=0, help="how many of our layers keep only their input")
    parser.add_argument(
        "--quantization",
        choices=("none", "q8", "q4"),
        default="none",
        help="of our frozen weights: bf16, or the CPU engine's 8 or 4 bits (default: none)",
    )
    parser.add_argument("--peer", action="store_true", help="run transformers + PEFT, too, by turns")
    parser.add_argument("--peer-checkpointing", action="store_true", help="with its gradient checkpointing")
    parser.add_argument("--peer-float32", action="store_true", help="with float32 weights and products")
    parser.add_argument("--one", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2, since the first is not timed")
    if arguments.one:
        run_one(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
