"""What a person sees of a training run: a bar, lines for validations, and Ctrl-C that first writes a checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from gemma2.cli.terminal import format_bytes, format_duration
from gemma2.errors import MissingDependencyError

SEVERAL_PROCESSES: Final = """
On several GPUs or machines, with the same file:

  torchrun --nproc-per-node 8 -m gemma2 {verb} SETTINGS.yaml

Processes cut each batch and share the weights among them; `parallel: {{tensor: 2}}` also lets pairs of them share each
matrix product. A run may go on with another number of processes. docs/scaling.md has plans for 27B.
"""

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2.config import Gemma2Config
    from gemma2.data import TokenizingProgress
    from gemma2.distributed import Ranks
    from gemma2.memory.training import TrainingMemory
    from gemma2.training.loop import Progress, StepReport
    from gemma2.training.settings import LoopSettings, OptimizerSettings, ParallelSettings
    from gemma2.training.tune_settings import AdapterSettings


class Run(Protocol):
    """Trains, and returns what was written; None if it was stopped before the end."""

    def __call__(
        self, *, progress: Progress, say: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> Path | None: ...


def add_settings_options(parser: argparse.ArgumentParser, *, example: str, dry_run: str) -> None:
    """Declares --set and --dry-run.

    Args:
        parser: of a verb with a settings file.
        example: a setting to change, such as "run.num_steps=100".
        dry_run: what --dry-run does.
    """
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help=f"change one setting, as in --set {example}; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def require_libraries(*names: str) -> None:
    """Refuses to begin without the libraries of training.

    Raises:
        MissingDependencyError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"training needs {name}, which is not installed; install it with: pip install 'gemma2[train]'"
            )
    # Which tells, whenever PEFT looks for it, of kernels that it would like to download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def make_training_console(ranks: Ranks) -> Console:
    """Where a run's lines go: standard error, those of the first process only."""
    from rich.console import Console

    return Console(stderr=True, markup=False, soft_wrap=True, quiet=not ranks.is_first)


def training_ranks(parallel: ParallelSettings, run: LoopSettings) -> AbstractContextManager[Ranks]:
    """Joins the processes that `torchrun` started, if it did; see `joined_ranks`."""
    from gemma2.distributed import joined_ranks

    data = None if parallel.data == "auto" else parallel.data
    return joined_ranks(data=data, tensor=parallel.tensor, device=run.device)


def training_memory(
    config: Gemma2Config,
    run: LoopSettings,
    optimizer: OptimizerSettings,
    adapter: AdapterSettings | None,
    ranks: Ranks,
    *,
    length: int,
    quantization: str = "none",
    has_reference: bool = False,
) -> TrainingMemory:
    """What a run's settings come to in each process; see `gemma2.memory.training`.

    Args:
        config: of the model that is trained.
        run: how much goes through at once, in which dtype.
        optimizer: which one.
        adapter: what is trained; None for every weight.
        ranks: the processes.
        length: tokens of a row.
        quantization: of the frozen weights.
        has_reference: whether the model that training began with is kept, where an adapter cannot be switched off.
    """
    from gemma2.memory.training import ProcessGrid, adapter_training, full_training
    from gemma2.training.tune_settings import ENGINE_FORMATS

    grid = ProcessGrid(data=ranks.data, tensor=ranks.tensor)
    rows = {"batch_size": ranks.rows_at_once(run.batch_size, run.micro_batch_size), "length": length}
    checkpointing, muon = run.gradient_checkpointing, optimizer.kind == "muon"
    if adapter is None:
        memory = full_training(config, **rows, checkpointing=checkpointing, muon=muon, grid=grid)
        return replace(memory, reference=4 * config.count_parameters().total // grid.size) if has_reference else memory
    return adapter_training(
        config,
        rank=adapter.r,
        modules=adapter.modules,
        weight_format={"none": run.dtype, "nf4": "q4", "int8": "q8"}.get(quantization, quantization),
        on_engine=quantization in ENGINE_FORMATS,
        **rows,
        checkpointing=checkpointing,
        muon=muon,
        grid=grid,
    )


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets one of several processes speak for all that fail alike; imports nothing for one process alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    from gemma2.distributed import failures

    with failures.one_voice():
        yield


@contextmanager
def stop_requests(console: Console) -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second stops at once.

    Gives a function that says whether to stop.
    """
    requests: list[int] = []

    def on_interrupt(signal_number: int, _frame: object) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(signal_number)
        console.print("stopping when a step is done, with a checkpoint (Ctrl-C again: at once)", style="yellow")

    previous = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def show_run(console: Console, run: Run, *, next_command: Callable[[Path], str]) -> int:
    """Trains where a person can see it, and stop it.

    Args:
        console: where to.
        run: what trains.
        next_command: from what was written to a command line that uses it.

    Returns:
        The status for the shell.
    """
    with stop_requests(console) as should_stop, TrainingBar(console) as progress:
        folder = run(progress=progress, say=lambda line: console.print(line, highlight=False), should_stop=should_stop)
    if folder is None:
        return say_stopped(console)
    console.print(f"wrote {folder}\ntry: {next_command(folder)}", highlight=False)
    return 0


def say_stopped(console: Console) -> int:
    """Says how to go on, and returns the status for the shell."""
    console.print("stopped; the same command goes on from here", highlight=False)
    return 130


class TrainingBar:
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
            TextColumn("{task.fields[memory]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_step(self, report: StepReport) -> None:
        """Moves the bar; time left counts validation and checkpoints too, as it is measured over the whole run."""
        import time

        now = time.monotonic()
        if self._started is None:
            self._started = (now, report.step)
        first_time, first_step = self._started
        rate = (report.step - first_step) / (now - first_time) if report.step > first_step else 0.0
        left = format_duration((report.num_steps - report.step) / rate) if rate else "?"
        memory, speed = format_bytes(report.memory_bytes), report.tokens_per_second
        if self._task is None:
            self._task = self._bar.add_task(
                "", total=report.num_steps, loss=report.loss, speed=speed, left=left, memory=memory
            )
        self._bar.update(
            self._task,  # type: ignore[arg-type]
            completed=report.step,
            loss=report.loss,
            speed=speed,
            left=left,
            memory=memory,
        )
        if not self._console.is_terminal:
            self._console.print(
                f"step {report.step}/{report.num_steps}  loss {report.loss:.4f}  {speed:,.0f} tok/s  left {left}  "
                f"{memory}",
                highlight=False,
            )

    def on_validation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Prints a line above the bar."""
        of_text = "" if bits_per_byte is None else f" nats per token, {bits_per_byte:.4f} bits per byte"
        self._console.print(f"step {step}: validation loss {loss:.4f}{of_text}", highlight=False)

    def on_checkpoint(self, path: Path) -> None:
        """Checkpoints are silent: they come often and the folder shows them."""


class TokenizingBar:
    """A bar for each set of examples, gone when it is done; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._tasks: dict[str, int] = {}
        self._bar = Progress(
            TextColumn("tokenizing {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[speed]:,.0f} tok/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TokenizingBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_progress(self, name: str, progress: TokenizingProgress) -> None:
        """Moves the bar of `name`."""
        speed = progress.tokens_per_second
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=1.0, speed=speed)
        self._bar.update(self._tasks[name], completed=progress.fraction, speed=speed)  # type: ignore[arg-type]
