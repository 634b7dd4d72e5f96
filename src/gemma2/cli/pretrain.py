"""`gemma2 pretrain SETTINGS.yaml`: trains a tokenizer and a Gemma 2 from scratch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.cli.training_progress import (
    SEVERAL_PROCESSES,
    TrainingBar,
    make_training_console,
    one_voice,
    require_libraries,
    stop_requests,
    training_ranks,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2.distributed import Ranks
    from gemma2.training.settings import PretrainSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.description = (
        "Trains a tokenizer and a Gemma 2 from scratch on text or JSONL files. Called again with the same settings, "
        "it goes on from the last checkpoint. Ctrl-C writes a checkpoint and stops."
    )
    parser.epilog = SEVERAL_PROCESSES.format(verb="pretrain")
    parser.add_argument("settings", type=Path, metavar="SETTINGS.yaml", help="see examples/pretrain-*.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change one setting, as in --set run.num_steps=100; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, print the plan and stop")


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    require_libraries("torch", "pydantic", "yaml", "matplotlib")
    from gemma2.training.settings import load_pretrain_settings

    with one_voice():
        settings = load_pretrain_settings(args.settings, args.set)
        with training_ranks(settings.parallel, settings.run) as ranks:
            return _run(args, settings, ranks)


def _run(args: argparse.Namespace, settings: PretrainSettings, ranks: Ranks) -> int:
    from gemma2.training.pretrain import pretrain

    console = make_training_console(ranks)
    if args.dry_run:
        _print_plan(settings, console, ranks)
        return 0
    with stop_requests(console) as should_stop, TrainingBar(console) as bar:
        folder = pretrain(
            settings,
            progress=bar,
            say=lambda line: console.print(line, highlight=False),
            should_stop=should_stop,
            ranks=ranks,
        )
    if folder is None:
        console.print("stopped; the same command goes on from here", highlight=False)
        return 130
    console.print(f"wrote {folder}\ntry: gemma2 generate --model {folder} 'Once upon a time'", highlight=False)
    return 0


def _print_plan(settings: PretrainSettings, console: Console, ranks: Ranks) -> None:
    from gemma2.training.pretrain import check_settings

    plan = check_settings(settings, ranks=ranks)
    run = settings.run
    tokens = run.num_steps * run.batch_size * run.sequence_length
    console.print(
        f"data: {len(plan.files)} files, {sum(file.stat().st_size for file in plan.files):,} bytes\n"
        f"model: {plan.config.count_parameters().total:,} parameters, on {ranks.describe(plan.device)}\n"
        f"run: {run.num_steps:,} steps of {run.batch_size} × {run.sequence_length} = {tokens:,} tokens\n"
        f"output: {settings.output}",
        highlight=False,
    )
