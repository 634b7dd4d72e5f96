"""`gemma2 tune SETTINGS.yaml`: fine-tunes a model on examples."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma2.cli.terminal import format_bytes
from gemma2.cli.training_progress import (
    SEVERAL_PROCESSES,
    TokenizingBar,
    add_settings_options,
    make_training_console,
    one_voice,
    require_libraries,
    show_run,
    training_memory,
    training_ranks,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2.distributed import Ranks
    from gemma2.training.tune import TunePlan
    from gemma2.training.tune_settings import TuneSettings

_EXAMPLES: Final = """
The smallest file of settings, which tunes an adapter for the bundled model:

  output: runs/mine
  adapter: {r: 16}
  data: {train: [mine.jsonl]}
  run: {num_epochs: 3, sequence_length: 256}

Examples may be JSON lines (.xz, .gz, .zst too), JSON, Parquet, or datasets of the Hub (hf:owner/name), in the forms
messages, prompt/completion, question/answer, text, ShareGPT, Alpaca and preference pairs. --dry-run shows one with the
tokens that are trained.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.description = (
        "Fine-tunes a model on examples: every weight, or a LoRA adapter on frozen weights, which may be quantized.\n"
        "Called again with the same settings, it goes on from the last checkpoint. Ctrl-C writes one and stops."
    )
    parser.epilog = _EXAMPLES + SEVERAL_PROCESSES.format(verb="tune")
    parser.add_argument("settings", type=Path, metavar="SETTINGS.yaml", help="see examples/tune-*.yaml")
    add_settings_options(
        parser,
        example="run.num_epochs=3",
        dry_run="check settings and data, show an example and the plan, and stop",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    require_libraries("torch", "pydantic", "yaml", "matplotlib")
    from gemma2.runtime import share_cores_with_torch
    from gemma2.training.tune_settings import ENGINE_FORMATS, load_tune_settings

    with one_voice():
        settings = load_tune_settings(args.settings, args.set)
        if settings.model.quantization in ENGINE_FORMATS:
            share_cores_with_torch()
        with training_ranks(settings.parallel, settings.run) as ranks:
            return _run(args, settings, ranks)


def _run(args: argparse.Namespace, settings: TuneSettings, ranks: Ranks) -> int:
    from gemma2.cli.source import find_folder, model_options
    from gemma2.training.tune import check_settings, tune

    base_folder = find_folder(settings.model.name)
    console = make_training_console(ranks)
    with TokenizingBar(console) as bar:
        plan = check_settings(settings, base_folder, on_tokenizing=bar.on_progress, ranks=ranks)
    if args.dry_run:
        _print_plan(settings, plan, console, ranks)
        return 0
    base = None if settings.adapter is None else settings.model.name
    return show_run(
        console,
        partial(tune, settings, plan, ranks=ranks),
        next_command=lambda folder: f"gemma2 chat {model_options(folder, base=base)}",
    )


def _print_plan(settings: TuneSettings, plan: TunePlan, console: Console, ranks: Ranks) -> None:
    from rich.text import Text

    from gemma2.data import EncodedPair, render_example
    from gemma2.training.example_data import describe_examples

    for choice in plan.train.choices:
        console.print(str(choice), highlight=False)
    console.print(describe_examples("training", plan.train), highlight=False)
    if plan.validation is not None:
        console.print(describe_examples("validation", plan.validation), highlight=False)
    run, length = settings.run, plan.train.sequence_length
    console.print(
        f"run: {plan.num_steps:,} steps of {run.batch_size} × {length} tokens, on {ranks.describe(plan.device)}",
        highlight=False,
    )
    config = plan.checkpoint.config
    memory = training_memory(
        config,
        run,
        settings.optimizer,
        settings.adapter,
        ranks,
        length=length,
        quantization=settings.model.quantization,
        has_reference=settings.objective.kind == "dpo",
    )
    each = " in each process" if ranks.world_size > 1 else ""
    console.print(
        f"memory: about {format_bytes(memory.total)}{each}, beside the program itself\noutput: {settings.output}\n",
        highlight=False,
    )
    encoded = plan.train.encoded(0)
    parts = (
        [("chosen", encoded.chosen), ("rejected", encoded.rejected)]
        if isinstance(encoded, EncodedPair)
        else [("", encoded)]
    )
    for name, example in parts:
        what = f"the first example{', ' + name if name else ''} ({plan.train.where(0)}); "
        console.print(what + "what is trained is in green, or between ⟦ and ⟧ where there are no colours:")
        text = Text()
        for span in render_example(plan.tokenizer, example):
            if span.is_trained:
                text.append(span.text if console.is_terminal else f"⟦{span.text}⟧", style="green")
            else:
                text.append(span.text, style="dim")
        console.print(text)
        console.print()
