"""`gemma2 distill SETTINGS.yaml`, and `gemma2 distill cache SETTINGS.yaml`."""

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
    say_stopped,
    show_run,
    stop_requests,
    training_memory,
    training_ranks,
)
from gemma2.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2.distributed import Ranks
    from gemma2.training.distill import DistillPlan
    from gemma2.training.distill_settings import DistillSettings

_EXAMPLES: Final = """
The smallest file of settings, which trains a new student on the bundled model's words:

  output: runs/student
  student: {model: {hidden_size: 128, intermediate_size: 384, num_hidden_layers: 4, num_attention_heads: 4,
                    num_key_value_heads: 2, head_dim: 32, query_pre_attn_scalar: 32, sliding_window: 128,
                    max_position_embeddings: 512}}
  text: {train: [books.jsonl]}
  optimizer: {learning_rate: 1.0e-3}
  run: {num_steps: 1000, batch_size: 8, sequence_length: 512}

The teacher may run beside the student, in PyTorch or on the CPU engine (teacher.backend: cpu), or once before: `gemma2
distill cache` writes its most probable words to the folder teacher.cache, from which any number of runs read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.description = (
        "Trains a student on what a larger teacher finds probable at each token, on text, on examples, or on what the\n"
        "student says itself. Called again with the same settings, it goes on from the last checkpoint."
    )
    parser.usage = "gemma2 distill [cache] SETTINGS.yaml [--set SECTION.KEY=VALUE] [--dry-run] [--debug]"
    parser.epilog = _EXAMPLES + SEVERAL_PROCESSES.format(verb="distill")
    parser.add_argument(
        "words", nargs="+", metavar="[cache] SETTINGS.yaml", help="cache: write the teacher's words, and train nothing"
    )
    add_settings_options(
        parser, example="run.num_steps=100", dry_run="check settings and data, print the plan and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    require_libraries("torch", "pydantic", "yaml", "matplotlib")
    from gemma2.runtime import share_cores_with_torch
    from gemma2.training.distill_settings import load_distill_settings

    with one_voice():
        writes_cache = len(args.words) == 2 and args.words[0] == "cache"
        if len(args.words) > 1 and not writes_cache:
            raise ConfigError(f"one file of settings is needed, or cache and one, but {' '.join(args.words)!r} came")
        settings = load_distill_settings(Path(args.words[-1]), args.set)
        if settings.teacher.backend == "cpu":
            share_cores_with_torch()
        if writes_cache and settings.teacher.cache is None:
            raise ConfigError(f"{args.words[-1]}: teacher.cache must name the folder to write")
        with training_ranks(settings.parallel, settings.run) as ranks:
            return _run(args, settings, ranks, writes_cache=writes_cache)


def _run(args: argparse.Namespace, settings: DistillSettings, ranks: Ranks, *, writes_cache: bool) -> int:
    from gemma2.cli.source import find_folder, model_options
    from gemma2.training.distill import check_settings, distill

    if writes_cache and ranks.world_size > 1:
        raise ConfigError("gemma2 distill cache runs in one process; start it without torchrun, once")
    student = settings.student.name
    console = make_training_console(ranks)
    with TokenizingBar(console) as bar:
        plan = check_settings(
            settings,
            find_folder(settings.teacher.name),
            None if student is None else find_folder(student),
            on_tokenizing=bar.on_progress,
            for_cache=writes_cache,
            needs_cache=not args.dry_run,
            ranks=ranks,
        )
    if args.dry_run or writes_cache:
        _print_plan(settings, plan, console, ranks)
    if args.dry_run:
        return 0
    if writes_cache:
        return _write_cache(settings, plan, console)
    base = None if settings.adapter is None else student
    return show_run(
        console,
        partial(distill, settings, plan, ranks=ranks),
        next_command=lambda folder: f"gemma2 generate {model_options(folder, base=base)} 'Once upon a time'",
    )


def _print_plan(settings: DistillSettings, plan: DistillPlan, console: Console, ranks: Ranks) -> None:
    from gemma2.training.distill import cache_info
    from gemma2.training.example_data import describe_examples

    run = settings.run
    for name, examples in (("training", plan.train), ("validation", plan.validation)):
        if examples is not None:
            console.print(describe_examples(name, examples), highlight=False)
    tokens = plan.num_steps * run.batch_size * run.sequence_length
    info = cache_info(settings, plan)
    console.print(
        f"teacher: {plan.teacher.config.count_parameters().total:,} parameters, {settings.teacher.backend}\n"
        f"student: {plan.config.count_parameters().total:,} parameters, on {ranks.describe(plan.device)}\n"
        f"run: {plan.num_steps:,} steps of {run.batch_size} × {run.sequence_length} = {tokens:,} tokens at most\n"
        f"a cache of the {info.top_k} most probable words takes {info.bytes_per_token:,} bytes a trained token, "
        f"{format_bytes(tokens * info.bytes_per_token)} at most\n"
        f"memory: about {format_bytes(_memory(settings, plan, ranks))}, beside the program itself\n"
        f"output: {settings.output}",
        highlight=False,
    )


def _memory(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> int:
    """Bytes of each process: the student's training, and the teacher's weights if it runs beside."""
    from gemma2.memory.weights import weight_bytes
    from gemma2.training.teachers import is_teacher_shared, teacher_weights

    run, teacher = settings.run, settings.teacher
    total = training_memory(
        plan.config, run, settings.optimizer, settings.adapter, ranks, length=run.sequence_length
    ).total
    if teacher.cache is not None:
        return total
    weights = teacher_weights(teacher, run)
    beside = weight_bytes(plan.teacher.config, {"nf4": "q4"}.get(weights, weights))
    return total + beside // (ranks.world_size if is_teacher_shared(teacher, ranks) else 1)


def _write_cache(settings: DistillSettings, plan: DistillPlan, console: Console) -> int:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from gemma2.training.distill import write_cache

    folder = settings.teacher.cache
    assert folder is not None
    with (
        stop_requests(console) as should_stop,
        Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bar,
    ):
        task = bar.add_task("", total=plan.num_steps, tokens=0)
        total = 0

        def on_step(step: int, num_tokens: int) -> None:
            nonlocal total
            total += num_tokens
            bar.update(task, completed=step, tokens=total)

        def say(line: str) -> None:
            console.print(line, highlight=False)

        is_whole = write_cache(settings, plan, folder, on_step=on_step, say=say, should_stop=should_stop)
    if not is_whole:
        return say_stopped(console)
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"wrote {folder}: {plan.num_steps:,} steps, {format_bytes(size)}", highlight=False)
    return 0
