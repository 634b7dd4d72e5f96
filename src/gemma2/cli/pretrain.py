"""`gemma2 pretrain SETTINGS.yaml`: trains a tokenizer and a Gemma 2 from scratch."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.cli.terminal import format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2.training.settings import PretrainSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.description = (
        "Trains a tokenizer and a Gemma 2 from scratch on text or JSONL files. Called again with the same settings, "
        "it goes on from the last checkpoint. Ctrl-C writes a checkpoint and stops."
    )
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
    from gemma2.errors import MissingDependencyError

    for library in ("torch", "pydantic", "yaml", "matplotlib"):
        if importlib.util.find_spec(library) is None:
            raise MissingDependencyError(
                f"training needs {library}, which is not installed; install it with: pip install 'gemma2[train]'"
            )
    import signal

    from rich.console import Console

    from gemma2.training.pretrain import pretrain
    from gemma2.training.settings import load_pretrain_settings

    settings = load_pretrain_settings(args.settings, args.set)
    console = Console(stderr=True, markup=False, soft_wrap=True)
    if args.dry_run:
        _print_plan(settings, console)
        return 0
    stop_requests: list[int] = []

    def on_interrupt(signal_number: int, _frame: object) -> None:
        if stop_requests:
            raise KeyboardInterrupt
        stop_requests.append(signal_number)
        console.print("stopping after this step, with a checkpoint (Ctrl-C again: at once)", style="yellow")

    previous = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _ProgressBar(console) as bar:
            folder = pretrain(
                settings,
                progress=bar,
                say=lambda line: console.print(line, highlight=False),
                should_stop=lambda: bool(stop_requests),
            )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if folder is None:
        console.print("stopped; the same command goes on from here", highlight=False)
        return 130
    console.print(f"wrote {folder}\ntry: gemma2 generate --model {folder} 'Once upon a time'", highlight=False)
    return 0


def _print_plan(settings: PretrainSettings, console: Console) -> None:
    from gemma2.training.pretrain import check_settings

    plan = check_settings(settings)
    run = settings.run
    tokens = run.num_steps * run.batch_size * run.sequence_length
    console.print(
        f"data: {len(plan.files)} files, {sum(file.stat().st_size for file in plan.files):,} bytes\n"
        f"model: {plan.config.count_parameters().total:,} parameters, on {plan.device}\n"
        f"run: {run.num_steps:,} steps of {run.batch_size} × {run.sequence_length} = {tokens:,} tokens\n"
        f"output: {settings.output}",
        highlight=False,
    )


class _ProgressBar:
    """A bar with step, loss, tokens per second and time left; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = console
        self._task: int | None = None
        self._started: tuple[float, int] | None = None
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_step(self, step: int, num_steps: int, loss: float, tokens_per_second: float) -> None:
        """Moves the bar; time left counts validation and checkpoints too, as it is measured over the whole run."""
        import time

        now = time.monotonic()
        if self._started is None:
            self._started = (now, step)
        first_time, first_step = self._started
        rate = (step - first_step) / (now - first_time) if step > first_step else 0.0
        left = format_duration((num_steps - step) / rate) if rate else "?"
        if self._task is None:
            self._task = self._bar.add_task("", total=num_steps, loss=loss, speed=tokens_per_second, left=left)
        self._bar.update(self._task, completed=step, loss=loss, speed=tokens_per_second, left=left)  # type: ignore[arg-type]
        if not self._console.is_terminal:
            self._console.print(
                f"step {step}/{num_steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tok/s  left {left}",
                highlight=False,
            )

    def on_validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        """Prints a line above the bar."""
        self._console.print(
            f"step {step}: validation loss {loss:.4f} nats per token, {bits_per_byte:.4f} bits per byte",
            highlight=False,
        )

    def on_checkpoint(self, path: Path) -> None:
        """Checkpoints are silent: they come often and the folder shows them."""
