"""`gemma2 plan`: how much memory running or training a model takes, and whether that fits."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gemma2.cli.machine import Place, find_places, parse_size
from gemma2.cli.source import find_config
from gemma2.cli.terminal import format_bytes, heading, make_console, make_table
from gemma2.config import PRESETS, Gemma2Config
from gemma2.errors import ConfigError, ContextLengthError
from gemma2.memory.running import engine_prefill_bytes, kv_cache_bytes, logits_bytes, prefill_bytes
from gemma2.memory.training import (
    ProcessGrid,
    TrainingMemory,
    adapter_parameters,
    adapter_training,
    full_training,
    uneven_sizes,
)
from gemma2.memory.weights import ADAPTABLE_MODULES, WEIGHT_FORMATS, weight_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

KINDS_OF_TRAINING: Final = ("full", "lora", "qlora")
_STYLES: Final = {"fits": "green", "needs room": "yellow", "too large": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{', '.join(PRESETS)}, a model's folder, or its name on the Hub if it was pulled; left out, the bundled "
        "model",
    )
    parser.add_argument("--context", type=int, metavar="TOKENS", help="length of a sequence (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="TOKENS", help="tokens of a prompt that go in at once (default: 512)"
    )
    parser.add_argument("--train", choices=KINDS_OF_TRAINING, help="plan training instead of running")
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="plan training on so many GPUs, one process on each, which share the weights (default: 1); sizes are "
        "those of one GPU, and --batch is the sequences of one process",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="of the GPUs, how many share each matrix product, as parallel.tensor does (default: 1)",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="of LoRA's adapters (default: 16)")
    parser.add_argument(
        "--modules",
        metavar="NAMES",
        help=f"which maps get an adapter, with commas between (default: {','.join(ADAPTABLE_MODULES)})",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="judge by this much memory, like 24GiB, instead of what this machine has"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object, with bytes, for programs")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is planned: the arguments, checked."""

    name: str
    config: Gemma2Config
    context: int
    batch_size: int
    chunk_tokens: int
    rank: int
    modules: tuple[str, ...]
    grid: ProcessGrid
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class RunningPlan:
    """What running takes with one format of the weights, in bytes."""

    weight_format: str
    weights: int
    kv_cache: int
    """Of all sequences of the batch, local layers bounded."""
    prefill: int
    logits: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.kv_cache + self.prefill + self.logits

    def sequences_that_fit(self, batch_size: int, place: Place) -> int:
        """How many sequences the free memory holds beside the weights; `batch_size` is what was planned for."""
        one = (self.kv_cache + self.logits) // batch_size
        return max(0, place.free_bytes - self.weights - self.prefill) // one


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    setup = _read_setup(args)
    training = plan_training(setup, args.train) if args.train else None
    if args.json:
        print(json.dumps(describe(setup, training), indent=2))
        return 0
    console = make_console()
    _print_header(console, setup)
    if training is not None:
        _print_training(console, setup, args.train, training)
    else:
        _print_running(console, setup)
        _print_kv_cache(console, setup)
    return 0


def _read_setup(args: argparse.Namespace) -> Setup:
    name, config = find_config(args.model)
    context = config.max_position_embeddings if args.context is None else args.context
    for option, value in (("--context", context), ("--batch", args.batch), ("--chunk", args.chunk)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, but is {value}")
    if context > config.max_position_embeddings:
        raise ContextLengthError(
            f"{name} reads up to {config.max_position_embeddings} tokens, but --context asks for {context}"
        )
    grid = _read_grid(args, name, config)
    if args.train not in ("lora", "qlora") and (args.rank is not None or args.modules is not None):
        raise ConfigError("--rank and --modules are those of adapters; add --train lora or --train qlora")
    rank = 16 if args.rank is None else args.rank
    modules = ADAPTABLE_MODULES
    if args.modules is not None:
        modules = tuple(name.strip() for name in args.modules.split(",") if name.strip())
        if not modules:
            raise ConfigError(f"--modules names no linear map; they are {', '.join(ADAPTABLE_MODULES)}")
    adapter_parameters(config, rank=rank, modules=modules)  # refuses unknown names
    if args.memory is not None:
        size = parse_size(args.memory)
        places = [Place(name=format_bytes(size), total_bytes=size, free_bytes=size)]
    else:
        places = find_places()
    return Setup(
        name=name,
        config=config,
        context=context,
        batch_size=args.batch,
        chunk_tokens=min(args.chunk, context),
        rank=rank,
        modules=modules,
        grid=grid,
        places=tuple(places),
    )


def _read_grid(args: argparse.Namespace, name: str, config: Gemma2Config) -> ProcessGrid:
    for option, value in (("--gpus", args.gpus), ("--tensor", args.tensor)):
        if value < 1:
            raise ConfigError(f"{option} must be at least 1, but is {value}")
    if args.gpus > 1 and args.train is None:
        raise ConfigError("--gpus is for training; add --train full, lora or qlora")
    if args.gpus % args.tensor:
        raise ConfigError(f"--tensor must divide --gpus, but they are {args.tensor} and {args.gpus}")
    if args.tensor > 1 and args.train == "qlora":
        raise ConfigError("--tensor is for weights that are not quantized; leave it out, or plan --train lora")
    if uneven := uneven_sizes(config, args.tensor):
        raise ConfigError(
            f"--tensor must divide {name} evenly, but is {args.tensor}, and it has {' and '.join(uneven)}"
        )
    return ProcessGrid(data=args.gpus // args.tensor, tensor=args.tensor)


def plan_running(setup: Setup) -> list[RunningPlan]:
    """Works out what running takes with each format of the weights."""
    config = setup.config
    plans = []
    for weight_format in WEIGHT_FORMATS:
        # Activations and cache are float32 beside float32 weights, and bf16 beside all others.
        is_float32 = weight_format == "float32"
        kv_format = "float32" if is_float32 else "bfloat16"
        if weight_format in ("q8", "q4"):  # which only the CPU engine runs
            prefill = engine_prefill_bytes(config, chunk_tokens=setup.chunk_tokens)
        else:
            prefill = prefill_bytes(
                config,
                chunk_tokens=setup.chunk_tokens,
                num_keys=setup.context,
                bytes_per_value=4 if is_float32 else 2,
            )
        plans.append(
            RunningPlan(
                weight_format=weight_format,
                weights=weight_bytes(config, weight_format, second_plane=weight_format == "q4"),
                kv_cache=setup.batch_size * kv_cache_bytes(config, setup.context, kv_format=kv_format),
                prefill=prefill,
                logits=logits_bytes(config, setup.batch_size),
            )
        )
    return plans


def plan_training(setup: Setup, kind: str) -> dict[bool, TrainingMemory]:
    """Works out what a training step takes, without (False) and with (True) checkpointing of activations."""
    plans = {}
    for checkpointing in (False, True):
        if kind == "full":
            plans[checkpointing] = full_training(
                setup.config,
                batch_size=setup.batch_size,
                length=setup.context,
                checkpointing=checkpointing,
                grid=setup.grid,
            )
        else:
            plans[checkpointing] = adapter_training(
                setup.config,
                rank=setup.rank,
                modules=setup.modules,
                weight_format="q4" if kind == "qlora" else "bfloat16",
                batch_size=setup.batch_size,
                length=setup.context,
                checkpointing=checkpointing,
                grid=setup.grid,
            )
    return plans


# -- for programs ---------------------------------------------------------------------------------------------------


def describe(setup: Setup, training: dict[bool, TrainingMemory] | None) -> dict[str, Any]:
    """Returns what `--json` prints; sizes in bytes."""
    config = setup.config
    values: dict[str, Any] = {
        "name": setup.name,
        "parameters": config.count_parameters().total,
        "context": setup.context,
        "batch": setup.batch_size,
        "gpus": setup.grid.size,
        "tensor": setup.grid.tensor,
        "places": [dataclasses.asdict(place) for place in setup.places],
    }

    def with_verdicts(plan: RunningPlan | TrainingMemory) -> dict[str, Any]:
        verdicts = {place.name: place.judge(plan.total) for place in setup.places}
        return {**dataclasses.asdict(plan), "total": plan.total, "verdicts": verdicts}

    if training is not None:
        values["training"] = {
            "without_checkpointing": with_verdicts(training[False]),
            "with_checkpointing": with_verdicts(training[True]),
        }
        return values
    values["running"] = [with_verdicts(plan) for plan in plan_running(setup)]
    values["kv_cache_of_one_sequence"] = {
        kv_format: {
            "bounded": kv_cache_bytes(config, setup.context, kv_format=kv_format),
            "whole": kv_cache_bytes(config, setup.context, kv_format=kv_format, bounded=False),
        }
        for kv_format in ("bfloat16", "int8")
    }
    return values


# -- for people -----------------------------------------------------------------------------------------------------


def _print_header(console: Console, setup: Setup) -> None:
    count = setup.config.count_parameters().total
    sequences = "1 sequence" if setup.batch_size == 1 else f"{setup.batch_size:,} sequences"
    console.print(f"{setup.name}: {count:,} parameters", style="bold")
    grid = setup.grid
    on_each = "" if grid.size == 1 else f" at once in each of {grid.data} parts of a batch"
    console.print(f"{sequences} of {setup.context:,} tokens{on_each}")
    if grid.size > 1:
        shared = f"; {grid.tensor} share each matrix product" if grid.tensor > 1 else ""
        console.print(f"{grid.size:,} GPUs, which share the weights{shared}: sizes are those of one GPU")
    for place in setup.places:
        if place.name == format_bytes(place.total_bytes):  # --memory
            console.print(f"Judged by {place.name} of memory")
            continue
        free = "" if place.free_bytes == place.total_bytes else f", {format_bytes(place.free_bytes)} of them free"
        console.print(f"{place.name[0].upper()}{place.name[1:]}: {format_bytes(place.total_bytes)} of memory{free}")
    if not setup.places:
        console.print("This system does not tell its memory; --memory SIZE judges by a size that you name")


def _print_running(console: Console, setup: Setup) -> None:
    heading(console, "To run")
    verdicts = [place.name for place in setup.places]
    table = make_table(console, "format", "weights", "KV cache", "prefill", "logits", "total", *verdicts)
    for plan in plan_running(setup):
        sizes = [plan.weights, plan.kv_cache, plan.prefill, plan.logits, plan.total]
        cells = []
        for place in setup.places:
            most = plan.sequences_that_fit(setup.batch_size, place)
            cells.append(_verdict(place, plan.total, f", up to {most:,}" if most else ""))
        table.add_row(plan.weight_format, *map(format_bytes, sizes), *cells)
    console.print(table)
    if setup.places:
        console.print(f"“up to”: so many sequences of {setup.context:,} tokens fit at once.", style="dim")
    console.print(
        "q8 and q4 are the CPU engine's 8- and 4-bit weights, q4 with a head of two planes; `gemma2 bench` measures "
        "how fast they run here.",
        style="dim",
    )
    whole = logits_bytes(setup.config, setup.context * setup.batch_size)
    console.print(
        f"Prefill takes {setup.chunk_tokens:,} tokens at a time. One row of logits a sequence; all {setup.context:,} "
        f"positions at once would take {format_bytes(whole)}.",
        style="dim",
    )


def _print_kv_cache(console: Console, setup: Setup) -> None:
    heading(console, f"KV cache of one sequence of {setup.context:,} tokens")
    table = make_table(console, "", "bfloat16", "int8 + scales")
    window = f"{setup.config.sliding_window:,}"
    for label, bounded in ((f"local layers keep {window} tokens", True), ("all layers keep all", False)):
        sizes = (
            kv_cache_bytes(setup.config, setup.context, kv_format=kv_format, bounded=bounded)
            for kv_format in ("bfloat16", "int8")
        )
        table.add_row(label, *(f"{size / 2**20:,.1f} MiB" for size in sizes))
    console.print(table)


def _print_training(console: Console, setup: Setup, kind: str, plans: dict[bool, TrainingMemory]) -> None:
    titles = {
        "full": "To train every weight, AdamW in mixed precision",
        "lora": f"To train LoRA adapters of rank {setup.rank} on bf16 weights",
        "qlora": f"To train LoRA adapters of rank {setup.rank} on q4 weights",
    }
    heading(console, titles[kind])
    if kind != "full":
        count = adapter_parameters(setup.config, rank=setup.rank, modules=setup.modules)
        console.print(f"{count:,} parameters are trained, in {', '.join(setup.modules)}")
    table = make_table(console, "", "without checkpointing", "with it")
    labels = {
        "weights": {
            "full": "weights, bf16",
            "lora": "weights, bf16, frozen",
            "qlora": "weights, q4 (embedding bf16), frozen",
        }[kind],
        "master_weights": "master weights, float32" if kind == "full" else "adapters, float32",
        "gradients": f"gradients, {'bf16' if kind == 'full' and setup.grid.size == 1 else 'float32'}",
        "optimizer": "AdamW's two moments, float32",
        "activations": "activations for the backward pass",
        "loss": "loss, in chunks of the vocabulary's logits",
        "gathered": "layers and embedding, put together for the moment",
    }
    for field, label in labels.items():
        sizes = [getattr(plans[checkpointing], field) for checkpointing in (False, True)]
        if any(sizes):
            table.add_row(label, *map(format_bytes, sizes))
    table.add_section()
    table.add_row("total", *(format_bytes(plans[checkpointing].total) for checkpointing in (False, True)))
    for place in setup.places:
        table.add_row(place.name, *(_verdict(place, plans[checkpointing].total) for checkpointing in (False, True)))
    console.print(table)
    console.print("Checkpointing keeps each layer's input and computes the layer again on the way back.", style="dim")
    if setup.grid.size == 1:
        console.print("A plan for any trainer; --gpus N plans for several GPUs, as docs/scaling.md does.", style="dim")
    else:
        option = f" --set parallel.tensor={setup.grid.tensor}" if setup.grid.tensor > 1 else ""
        command = f"torchrun --nproc-per-node {setup.grid.size} -m gemma2 tune SETTINGS.yaml{option}"
        console.print(f"On one machine: {command}", style="dim")


def _verdict(place: Place, num_bytes: int, more: str = "") -> Text:
    from rich.text import Text

    verdict = place.judge(num_bytes)
    return Text(verdict + more, style=_STYLES[verdict])
