"""`gemma2 quantize`: round a model's weights, into a folder that loads at once."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma2.cli.source import find_folder
from gemma2.cli.terminal import PlainProgress, format_bytes, make_console, make_table
from gemma2.errors import ConfigError

if TYPE_CHECKING:
    from gemma2.checkpoints import Checkpoint
    from gemma2.config import Gemma2Config
    from gemma2.quantization.feedback import Calibration
    from gemma2.quantization.packing import RoundingError

_TIME_OF_2B: Final = "a quarter of an hour"
_ROUNDING_TOKENS: Final = 1000
"""What rounding a layer's weights costs, in tokens that a calibration runs through it."""
CALIBRATION_TOKENS: Final = 16_384
"""A half or a quarter of them are worth a tenth less."""
FORMATS: Final = ("q4", "q8", "bfloat16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    # Not argparse's order, in which SRC and DST would be files to calibrate on.
    parser.usage = (
        f"%(prog)s SRC DST [--format {{{','.join(FORMATS)}}}] [--one-plane]\n"
        f"{'':23}[--calibrate [FILE ...]] [--calibration-tokens N] [--threads N] [--json] [--debug]"
    )
    parser.add_argument("source", metavar="SRC", help="a model's folder, or its name on the Hub if it was pulled")
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="the folder to write; must be new or empty, or hold packed weights, which are then replaced",
    )
    parser.add_argument("--format", choices=FORMATS, default="q4", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--one-plane",
        action="store_true",
        help="keep the embedding of q4 in 4 bits alone, without the second 4 bits that make the head as exact as q8",
    )
    parser.add_argument(
        "--calibrate",
        nargs="*",
        metavar="FILE",
        help="let rounding errors cancel each other, as the model's inputs allow. Text or JSONL files like those that "
        "the model will see halve what 4 bits cost; without any, random words take two fifths off. Takes about "
        f"{_TIME_OF_2B} for 2B on two cores",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help=f"of the files, or random (default: {CALIBRATION_TOKENS:,})",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: one for each core)")
    parser.add_argument("--json", action="store_true", help="write one JSON object, for programs")
    parser.epilog = (
        "DST is then a model for every verb and for gemma2.load. Stopped half-way, by Ctrl-C or a signal, it leaves\n"
        "nothing behind, and begins from the start the next time. Nobody can clear up after kill -9 at once: the next\n"
        "gemma2 quantize with the same DST does."
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of the tensors of one kind, in all layers together."""

    name: str
    shape: tuple[int, ...]
    count: int
    """Tensors of this kind."""
    before_bytes: int
    after_bytes: int
    output_error: float | None
    """Root mean square error of the outputs, relative to theirs: for random inputs, or for those of the calibration.
    None for norms, which are exact."""

    @property
    def num_weights(self) -> int:
        """Weights of all of them."""
        return math.prod(self.shape) * self.count

    @property
    def bits_per_weight(self) -> float:
        """Of all of them, padding included."""
        return 8 * self.after_bytes / self.num_weights


def run(args: argparse.Namespace) -> int:
    """Quantizes, and prints what became of the weights."""
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads must be at least 1, but is {args.threads}")
    if args.one_plane and args.format != "q4":
        raise ConfigError(f"--one-plane is for q4, whose embedding has two; leave it out with --format {args.format}")
    if args.calibrate is not None and args.format not in ("q8", "q4"):
        raise ConfigError(f"--calibrate is for q8 and q4; leave it out with --format {args.format}")
    if args.calibration_tokens is not None and (args.calibrate is None or args.calibration_tokens < 1):
        raise ConfigError("--calibration-tokens must be at least 1, and goes with --calibrate")
    from gemma2.checkpoints import open_checkpoint, save_packed
    from gemma2.cpu import resolve_num_threads

    checkpoint = open_checkpoint(find_folder(args.source))
    num_threads = resolve_num_threads(args.threads)
    started = time.perf_counter()
    is_calibrated = args.calibrate is not None
    with _progress(f"{args.source} → {args.format}", is_calibrated=is_calibrated) as work:
        calibration = _calibration(args, checkpoint, num_threads, work) if is_calibrated else None
        errors = save_packed(
            args.destination,
            checkpoint,
            args.format,
            num_threads=num_threads,
            second_plane=False if args.one_plane else None,
            calibration=calibration,
            progress=work.follow_rounding,
        )
    seconds = time.perf_counter() - started
    rows = summarize(checkpoint, args.format, errors)
    if args.json:
        print(json.dumps(_describe(args, rows, seconds), indent=2, ensure_ascii=False))
    else:
        _print(args, rows, seconds)
    return 0


def _calibration(args: argparse.Namespace, checkpoint: Checkpoint, num_threads: int, work: _Work) -> Calibration:
    """Runs text of the files, or random words, through the model when the rounding asks for it."""
    from gemma2.cpu.calibration import CalibrationRun, cut, random_words
    from gemma2.data import expand_files, iter_documents
    from gemma2.text import Tokenizer

    num_tokens = args.calibration_tokens or CALIBRATION_TOKENS
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    tokenizer.check_fits(checkpoint.config)
    if not args.calibrate:
        sequences = random_words(checkpoint.config, num_tokens=num_tokens, bos_id=tokenizer.bos_id)
    else:
        documents = iter_documents(expand_files(args.calibrate), text_key="text", text_key_is_fixed=True)
        texts = (tokenizer.encode(document.text) for document in documents)
        sequences = cut(texts, checkpoint.config, num_tokens=num_tokens, bos_id=tokenizer.bos_id)
        found = sum(map(len, sequences))
        if found < num_tokens / 2:
            work.say(
                f"the files to calibrate on hold {found:,} tokens, far fewer than {num_tokens:,}: what is fitted to so "
                "few suits other text less; name more files, or none for random words"
            )
    run = CalibrationRun(checkpoint, sequences, num_threads=num_threads, progress=work.follow_calibration)
    config = checkpoint.config
    count = config.count_parameters()
    work.plan_calibration(run.work, _ROUNDING_TOKENS * config.num_hidden_layers * count.total / count.non_embedding)
    return run


class _Work:
    """Adds up how far rounding and calibration are, which go on by turns, to one share of the time.

    Args:
        show: is told how much is done, and of how much: bytes or, with a calibration, tokens through a layer.
        say: prints a sentence that stays.
    """

    def __init__(self, show: Callable[[float, float], None], say: Callable[[str], None]) -> None:
        self._show = show
        self.say = say
        self._calibration = self._rounding = 0.0
        self._calibrated = self._rounded = 0.0

    def plan_calibration(self, calibration: float, rounding: float) -> None:
        """Is told how long both will take, in one unit."""
        self._calibration, self._rounding = calibration, rounding

    def follow_calibration(self, done: int, total: int) -> None:
        """Takes the progress of a calibration."""
        self._calibrated = done / total
        self._show_sum()

    def follow_rounding(self, done: int, total: int) -> None:
        """Takes the progress of rounding, in bytes."""
        self._rounded = done / total
        if self._calibration:
            self._show_sum()
        else:
            self._show(done, total)

    def _show_sum(self) -> None:
        done = self._calibrated * self._calibration + self._rounded * self._rounding
        self._show(done, self._calibration + self._rounding)


@contextmanager
def _progress(what: str, *, is_calibrated: bool) -> Iterator[_Work]:
    """A bar with the time left on standard error; a line now and then where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True, markup=False, highlight=False)
    if is_calibrated:
        what += ", calibrated"
    if not console.is_terminal:
        print(f"{what} …", file=sys.stderr, flush=True)
        plain = PlainProgress(what)
        yield _Work(plain.update, lambda sentence: print(sentence, file=sys.stderr, flush=True))
        return
    amount = (TaskProgressColumn(), TimeElapsedColumn()) if is_calibrated else (DownloadColumn(), TransferSpeedColumn())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=120
        if is_calibrated
        else 30,  # some layers' worth of work, which comes by fits and starts
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield _Work(lambda done, total: bar.update(task, completed=done, total=total), console.print)


def summarize(checkpoint: Checkpoint, weight_format: str, errors: Mapping[str, RoundingError]) -> list[Row]:
    """Adds up tensors of the same kind over the layers, in the order of use.

    Args:
        checkpoint: the model that was packed.
        weight_format: what into.
        errors: what `save_packed` returned.
    """
    from gemma2.quantization import SECOND_PLANE, packed_shapes
    from gemma2.quantization.packing import EMBEDDING, RoundingError, packed_parts, packed_sizes

    config: Gemma2Config = checkpoint.config
    sizes = packed_sizes(config, weight_format, second_plane=SECOND_PLANE in errors)
    kinds: dict[str, list[str]] = {}
    for name in packed_shapes(config):
        kinds.setdefault(_kind(name), []).append(name)
    rows = []
    for kind, names in kinds.items():
        shape = packed_shapes(config)[names[0]]
        after = sum(sizes[name] for name in names)
        error = sum((errors[name] for name in names), RoundingError())
        if names == [EMBEDDING] and SECOND_PLANE in errors:
            after += sizes[SECOND_PLANE]
            error = errors[SECOND_PLANE]
        rows.append(
            Row(
                name=kind,
                shape=shape,
                count=len(names),
                before_bytes=sum(
                    checkpoint.tensors[part].num_bytes for name in names for part in packed_parts(config)[name]
                ),
                after_bytes=after,
                output_error=error.relative if len(shape) == 2 else None,
            )
        )
    return rows


def _kind(name: str) -> str:
    """ "model.layers.3.mlp.down_proj.weight" is of the kind "down_proj"; all norms are one kind."""
    module = re.sub(r"\.weight$", "", name).rpartition(".")[2]
    return "norms" if module.endswith("norm") else module


def _describe(args: argparse.Namespace, rows: list[Row], seconds: float) -> dict[str, object]:
    return {
        "folder": str(args.destination),
        "format": args.format,
        "calibrated": args.calibrate is not None,
        "second_plane": _has_two_planes(args),
        "seconds": seconds,
        "before_bytes": sum(row.before_bytes for row in rows),
        "after_bytes": sum(row.after_bytes for row in rows),
        "tensors": [{**asdict(row), "bits_per_weight": row.bits_per_weight} for row in rows],
    }


def _has_two_planes(args: argparse.Namespace) -> bool:
    return args.format == "q4" and not args.one_plane


def _print(args: argparse.Namespace, rows: list[Row], seconds: float) -> None:
    console = make_console()
    table = make_table(console, "tensor", "shape", "before", "after", "bits per weight", "output error", left=1)
    for row in rows:
        shape = " × ".join(f"{length:,}" for length in row.shape)
        error = "" if row.output_error is None else f"{100 * row.output_error:.2f}%"
        table.add_row(
            row.name,
            f"{row.count} of {shape}" if row.count > 1 else shape,
            format_bytes(row.before_bytes),
            format_bytes(row.after_bytes),
            f"{row.bits_per_weight:.2f}",
            error,
        )
    before, after = sum(row.before_bytes for row in rows), sum(row.after_bytes for row in rows)
    table.add_section()
    table.add_row(
        "total",
        "",
        format_bytes(before),
        format_bytes(after),
        f"{8 * after / sum(row.num_weights for row in rows):.2f}",
    )
    console.print(table)
    note = "random inputs."
    if args.calibrate is not None:
        note = "inputs of the calibration; not to be compared with figures without one, which are for random inputs."
    console.print(f"Output error: root mean square, relative to the outputs, for {note}", style="dim")
    if _has_two_planes(args):
        console.print(
            "The embedding, which is the head, lies in two planes of 4 bits: all words are ranked by the first, the "
            "best by both.",
            style="dim",
        )
    kind = [args.format]
    if args.calibrate is not None:
        kind.append("calibrated on files" if args.calibrate else "calibrated on random words")
    if args.format == "q4":
        kind.append("the embedding in " + ("two planes" if _has_two_planes(args) else "one plane"))
    console.print(f"{args.destination}: {', '.join(kind)}; written in {seconds:.1f} s.")
    console.print(f"Run it: gemma2 generate --model {args.destination} --backend cpu")
