"""`gemma2 bench`: how fast the CPU engine runs, as fractions of what this machine can do."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma2.cli.model_options import num_threads
from gemma2.cli.terminal import format_bytes, make_console
from gemma2.config import PRESETS, Gemma2Config
from gemma2.errors import ConfigError, Gemma2Error

if TYPE_CHECKING:
    from rich.progress import TaskID

    from gemma2.cli.bench_first_token import FirstToken
    from gemma2.cli.bench_measure import Row, Work
    from gemma2.cli.bench_report import Subject
    from gemma2.quantization import PackedModel

WEIGHTS: Final = ("q4", "q8", "bfloat16", "float32")
KV_CACHES: Final = ("auto", "float32", "bfloat16", "int8")
PREFILL: Final = (512, 4096)
CONTEXTS: Final = (512, 4096, 7900)
BATCHES: Final = (1, 4, 16)
_ROOM: Final = 300_000_000
"""What running takes beside weights, keys and values."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Measures prefill, decode and batches of the CPU engine, with random weights of a published size (no files are "
        "needed) or with a model's own. Beside each figure stands the fraction of what this machine can do, which is "
        "measured before and after it: reads of memory, and dot products."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", choices=list(PRESETS), help="random weights of this size (default: 2b)")
    what.add_argument("--model", metavar="MODEL", help="a folder, or a name on the Hub that was pulled")
    parser.add_argument("--weights", choices=WEIGHTS, help="how weights are kept (default: q4)")
    parser.add_argument(
        "--one-plane", action="store_true", help="random q4 weights: as `gemma2 quantize --one-plane` makes them"
    )
    parser.add_argument("--kv-cache", choices=KV_CACHES, default="auto", help="dtype of keys and values")
    parser.add_argument("--threads", type=num_threads, metavar="N", help="threads (default: one for each core)")
    parser.add_argument("--isa", default="auto", metavar="NAME", help="instruction set (default: the best there is)")
    lists = (
        ("--prefill", PREFILL, "lengths of prompts to read"),
        ("--context", CONTEXTS, "lengths at which to decode"),
        ("--batch", BATCHES, "numbers of sequences that decode together"),
    )
    for option, values, meaning in lists:
        default = ",".join(map(str, values))
        parser.add_argument(
            option, type=_numbers, metavar="N,N", help=f"{meaning}, or none (default: {default}, as far as they fit)"
        )
    parser.add_argument(
        "--decode-steps", type=int, default=24, metavar="N", help="steps of each (default: %(default)s)"
    )
    parser.add_argument(
        "--first-token",
        action="store_true",
        help="also time `gemma2 generate` of --model from the start of the program to the first token",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there too; - for standard output, alone")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: %(default)s)")


def _numbers(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"needs whole numbers from 1, with commas between, or none, not {text!r}")
    return numbers


def run(args: argparse.Namespace) -> int:
    """Measures, and prints a table; what is done so far after Ctrl-C too."""
    from gemma2.cli.bench_first_token import measure_first_token
    from gemma2.cli.bench_machine import ThisMachine
    from gemma2.cli.bench_measure import Bench
    from gemma2.cli.bench_report import describe, print_report
    from gemma2.runtime import resolve_isa

    if args.decode_steps < 1:
        raise ConfigError(f"--decode-steps must be at least 1, but is {args.decode_steps}")
    if args.one_plane and (args.model is not None or args.weights not in (None, "q4")):
        raise ConfigError("--one-plane goes with random weights in q4")
    if args.first_token and args.model is None:
        raise ConfigError("--first-token starts `gemma2 generate`, which needs files: name a --model")
    nothing = all(lengths == () for lengths in (args.prefill, args.context, args.batch))
    if nothing and not args.first_token:
        raise ConfigError("--prefill, --context and --batch are all none, so there is nothing to measure")
    args.isa = resolve_isa(args.isa, setting="--isa")
    if args.json not in (None, "-"):
        _check_writable(Path(args.json))
    rows: list[Row] = []
    first_token: FirstToken | None = None
    with _Progress() as progress:
        subject, work = _open_subject(args, progress)
        backend = subject.backend
        machine = ThisMachine(
            num_threads=backend.num_threads,
            isa=backend.isa,
            weight_format=backend.weights,
            tensors=subject.packed.tensors,
        )
        bench = Bench(
            backend=backend,
            machine=machine,
            watcher=progress,
            weight_bytes=subject.weight_bytes,
            idle_bytes=subject.second_plane_bytes,
            kv_format=backend.kv_cache,
            seed=args.seed,
        )
        interrupted = False
        try:
            if args.first_token:
                progress.start("first token", 1)
                first_token = measure_first_token(
                    args.model, weights=args.weights, num_threads=backend.num_threads, isa=backend.isa
                )
            for row in bench.run(work):
                rows.append(row)
        except KeyboardInterrupt:
            interrupted = True
    report = describe(subject, rows, first_token)
    if args.json == "-":
        print(json.dumps(report, indent=2))
    else:
        print_report(make_console(), subject, rows, first_token)
        if args.json is not None:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 130 if interrupted else 0


def _check_writable(file: Path) -> None:
    """Refuses a file that cannot be written, before minutes of work."""
    if file.is_dir():
        raise Gemma2Error(f"--json {file}: is a folder; name a file in it")
    if not file.parent.is_dir():
        raise Gemma2Error(f"--json {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise Gemma2Error(f"--json {file}: cannot be written")


# -- the subject ----------------------------------------------------------------------------------------------------


def _open_subject(args: argparse.Namespace, progress: _Progress) -> tuple[Subject, Work]:
    from gemma2.cli.bench_report import Subject
    from gemma2.cpu import CpuBackend
    from gemma2.quantization import SECOND_PLANE

    start = time.perf_counter()
    if args.model is not None:
        name, packed = _open_model(args, progress)
        work = _make_work(args, name, packed.config)
    else:
        size = args.size or "2b"
        name, config = f"Gemma 2 {size.upper()}, random weights", PRESETS[size]
        work = _make_work(args, name, config)
        packed = _make_random(args, config, work, progress)
    made = time.perf_counter()
    second_plane = packed.tensors.get(SECOND_PLANE)
    backend = CpuBackend(packed, num_threads=args.threads, isa=args.isa, kv_cache=args.kv_cache)
    return (
        Subject(
            name=name,
            packed=packed,
            backend=backend,
            weight_bytes=sum(tensor.nbytes for name, tensor in packed.tensors.items() if name != SECOND_PLANE),
            second_plane_bytes=second_plane.nbytes if second_plane is not None else 0,
            make_seconds=made - start,
            load_seconds=time.perf_counter() - made,
        ),
        work,
    )


def _make_work(args: argparse.Namespace, name: str, config: Gemma2Config) -> Work:
    """The lengths asked for; of the defaults, those that the model's context holds."""
    from gemma2.cli.bench_measure import BATCH_PROMPT_TOKENS, Work

    room = config.max_position_embeddings
    for option, lengths, more in (("--prefill", args.prefill, 0), ("--context", args.context, args.decode_steps)):
        if lengths and max(lengths) + more > room:
            steps = f" and {more} steps" if more else ""
            raise ConfigError(f"{name} reads up to {room} tokens, but {option} asks for {max(lengths)}{steps}")
    if args.batch and BATCH_PROMPT_TOKENS + args.decode_steps > room:
        raise ConfigError(f"{name} reads up to {room} tokens, too few for --decode-steps {args.decode_steps}")
    return Work(
        prefill=tuple(n for n in PREFILL if n <= room) if args.prefill is None else args.prefill,
        contexts=tuple(n for n in CONTEXTS if n + args.decode_steps <= room) if args.context is None else args.context,
        batches=BATCHES if args.batch is None else args.batch,
        decode_steps=args.decode_steps,
    )


def _make_random(args: argparse.Namespace, config: Gemma2Config, work: Work, progress: _Progress) -> PackedModel:
    from gemma2.cli.machine import main_memory
    from gemma2.cpu.random_weights import random_packed_model
    from gemma2.memory.weights import weight_bytes

    weights = args.weights or "q4"
    kv_cache = {"auto": "float32" if weights == "float32" else "bfloat16"}.get(args.kv_cache, args.kv_cache)
    second_plane = weights == "q4" and not args.one_plane
    needed = weight_bytes(config, weights, second_plane=second_plane) + work.kv_bytes(config, kv_cache) + _ROOM
    memory = main_memory()
    if memory is not None and needed > memory.free_bytes:
        raise Gemma2Error(
            f"this needs {format_bytes(needed)} of memory, but {memory.name} has {format_bytes(memory.free_bytes)} "
            "free; choose smaller --weights, --size, --context or --batch, or end other programs"
        )
    progress.start("random weights", 1)
    return random_packed_model(config, weights, args.seed, progress.follow, second_plane=second_plane)


def _open_model(args: argparse.Namespace, progress: _Progress) -> tuple[str, PackedModel]:
    """Maps a quantized folder, or quantizes another one (which is kept, for the next time)."""
    from gemma2.checkpoints import is_packed, open_checkpoint, open_packed, packed_model
    from gemma2.cli.source import find_folder
    from gemma2.cpu.threads import default_num_threads

    folder = find_folder(args.model)
    num_threads = args.threads or default_num_threads()
    if is_packed(folder):
        file = open_packed(folder)
        if args.weights not in (None, file.format):
            raise ConfigError(f"{folder}: its weights are {file.format}; leave --weights out, or name the original")
        return str(folder), file.load(num_threads=num_threads)
    progress.start("weights", 1)
    packed = packed_model(
        open_checkpoint(folder),
        args.weights or "q4",
        num_threads=num_threads,
        progress=progress.follow,
        notify=progress.say,
    )
    return str(folder), packed


class _Progress:
    """A bar for the row that runs, and a line for each that is done, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            refresh_per_second=2,  # drawing takes a core's time from what is measured
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, what: str, total: int) -> None:
        """A new bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total)
        if not self._console.is_terminal:
            print(f"{what} …", file=sys.stderr, flush=True)

    def follow(self, done: int, total: int) -> None:
        """Sets the bar."""
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        self._console.print(sentence)

    def advance(self, amount: int) -> None:
        """Moves the bar."""
        assert self._task is not None
        self._bar.advance(self._task, amount)

    def finish(self, row: Row) -> None:
        """A line above the bar."""
        from gemma2.cli.bench_report import title

        of = f"{row.fraction_of_read:.0%} of memory's rate" if row.bytes_read else f"{row.fraction_of_dot:.0%} of peak"
        self._console.print(f"{title(row)}: {row.tokens_per_second:,.1f} tok/s, {of}")
