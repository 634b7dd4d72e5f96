"""`gemma2 pretrain SETTINGS.yaml`: trains a tokenizer and a Gemma 2 from scratch."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.cli.training_progress import (
    SEVERAL_PROCESSES,
    add_settings_options,
    make_training_console,
    one_voice,
    require_libraries,
    show_run,
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
    add_settings_options(
        parser, example="run.num_steps=100", dry_run="check settings and data, print the plan and stop"
    )


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
    return show_run(
        console,
        partial(pretrain, settings, ranks=ranks),
        next_command=lambda folder: f"gemma2 generate --model {folder} 'Once upon a time'",
    )


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
