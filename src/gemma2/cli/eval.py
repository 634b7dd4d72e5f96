"""`gemma2 eval FILES`: how well a model predicts text, or several models the same text."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gemma2.cli.model_options import add_model_arguments, load_model
from gemma2.cli.terminal import make_console, make_table
from gemma2.errors import Gemma2Error

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from gemma2.api import LLM
    from gemma2.evaluation import FileText, SlidingWindow, TextScore

_SECONDS_BETWEEN_LINES: Final = 60.0
"""Of progress, where nobody looks at a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Measures how well a model predicts text: bits per byte and perplexity. Long documents are read in windows\n"
        "that overlap, each with <bos> first; every token is scored once, and documents do not see each other."
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="text (.txt, one document a file) or JSON lines (.jsonl, .json), also with .xz, .gz or .zst; a glob or a "
        "folder means all such files in it",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a window (default: all that the model can read)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens by which a window moves on; with all of --context, windows do not overlap (default: half of it)",
    )
    parser.add_argument("--max-documents", type=int, metavar="N", help="read so many documents, of all files together")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="read so many tokens, of all files together; of several models, the first one counts them",
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="of JSON lines (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="write one JSON object, for programs")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    add_model_arguments(parser, several=True)
    parser.epilog = (
        "--model and --weights may come several times: each model is then measured with each kind of weights, on the\n"
        "same text, and a table compares them. Bits per byte compare any two models. Perplexity is per token, and\n"
        "compares only models with the same tokenizer.\n"
        "\n"
        "Token number i of a document is predicted from <bos> and all i tokens before it, if i is less than\n"
        "--context; else from <bos> and at least --context minus --stride of them. Ctrl-C shows what is known so far."
    )


@dataclass
class FileScore:
    """What a model said of one file, as far as it came."""

    score: TextScore
    num_documents: int = 0


@dataclass
class Result:
    """What a model said of all files, as far as it came."""

    model: str
    weights: str
    windows: SlidingWindow
    num_tokens: int
    """Tokens to score."""
    files: dict[Path, FileScore] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> TextScore:
        """Of all files."""
        from gemma2.evaluation import TextScore

        return sum((file.score for file in self.files.values()), TextScore())

    @property
    def is_complete(self) -> bool:
        """Whether it came to the end."""
        return self.total.num_tokens == self.num_tokens

    @property
    def tokens_per_second(self) -> float:
        """Tokens scored in a second."""
        return self.total.num_tokens / max(self.seconds, 1e-9)


def run(args: argparse.Namespace) -> int:
    """Measures, and prints tables: what is known so far after Ctrl-C, or if a later model cannot be run."""
    models, weights = args.model or [None], args.weights or ["auto"]
    texts = _check_and_read(args, models)
    results: list[Result] = []
    failure: Gemma2Error | None = None
    try:
        for model, kind in itertools.product(models, weights):
            llm = load_model(argparse.Namespace(**{**vars(args), "model": model, "weights": kind}), quiet=args.quiet)
            name = model or "bundled model"
            result = _measure(llm, name if args.adapter is None else f"{name} + {args.adapter}", texts, args)
            del llm  # before the next one is loaded
            results.append(result)
            if not result.is_complete:
                break
    except Gemma2Error as error:
        if not results:
            raise
        failure = error
    except KeyboardInterrupt:
        if not results:
            raise
    is_complete = len(results) == len(models) * len(weights) and results[-1].is_complete
    if args.json:
        print(json.dumps(_describe(args, results, is_complete=is_complete), indent=2, ensure_ascii=False))
    else:
        _print(make_console(), results)
    if failure is not None:
        raise failure
    return 0 if is_complete else 130


def _check_and_read(args: argparse.Namespace, models: Sequence[str | None]) -> list[FileText]:
    """Reads the files, and finds what is wrong with them or with a model before the first one runs for hours."""
    from gemma2.cli.source import find_config, find_folder
    from gemma2.evaluation import SlidingWindow, read_texts
    from gemma2.text import Tokenizer

    folders = [find_folder(model) for model in models]
    for model in models:
        SlidingWindow.fit(find_config(model)[1], context=args.context, stride=args.stride)
    return read_texts(
        args.files,
        Tokenizer.from_folder(folders[0]),
        text_key=args.text_key,
        max_documents=args.max_documents,
        max_tokens=args.max_tokens,
    )


def _measure(llm: LLM, model: str, texts: Sequence[FileText], args: argparse.Namespace) -> Result:
    """Scores the texts; Ctrl-C ends that, not the program."""
    from gemma2.cli.streaming import StopOnInterrupt
    from gemma2.evaluation import SlidingWindow, TextScore, encode_text, score_windows

    windows = SlidingWindow.fit(llm.config, context=args.context, stride=args.stride)
    encoded = [encode_text(llm.tokenizer, text.text) for text in texts]
    result = Result(model, llm.backend.weights, windows, num_tokens=sum(len(text.token_ids) for text in encoded))
    title = f"{model}, {result.weights}"
    interrupt = StopOnInterrupt()
    interrupt.can_wait = True
    with interrupt, _Progress(title, result.num_tokens, is_shown=not args.quiet) as progress:
        began, last_number = time.monotonic(), -1
        scores = score_windows(llm.backend, llm.tokenizer, encoded, windows)
        for number, score in scores:
            file = result.files.setdefault(texts[number].file, FileScore(TextScore()))
            file.score += score
            file.num_documents += number != last_number
            last_number = number
            result.seconds = time.monotonic() - began
            progress.show(result)
            if interrupt.is_requested:
                scores.close()
    return result


class _Progress:
    """A bar on standard error; a line a minute where that is no terminal."""

    def __init__(self, title: str, num_tokens: int, *, is_shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, markup=False, highlight=False)
        self._title = title
        self._writes_lines = is_shown and not console.is_terminal
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,} of {task.total:,} tokens, {task.fields[speed]:,.0f}/s,"),
            TextColumn("{task.fields[bits]:.4f} bits per byte, left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not (is_shown and console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=num_tokens, speed=0.0, bits=math.nan)
        if self._writes_lines:
            self._write(f"{num_tokens:,} tokens …")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, result: Result) -> None:
        """Shows how far it is."""
        total = result.total
        self._bar.update(
            self._task, completed=total.num_tokens, speed=result.tokens_per_second, bits=total.bits_per_byte
        )
        if self._writes_lines and time.monotonic() >= self._next_line:
            self._next_line += _SECONDS_BETWEEN_LINES
            left = (result.num_tokens - total.num_tokens) / result.tokens_per_second
            self._write(
                f"{total.num_tokens:,} of {result.num_tokens:,} tokens, {result.tokens_per_second:,.0f}/s, "
                f"{total.bits_per_byte:.4f} bits per byte, {_duration(left)} left"
            )

    def _write(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)


# -- what is printed ------------------------------------------------------------------------------------------------


def _describe(args: argparse.Namespace, results: Sequence[Result], *, is_complete: bool) -> dict[str, Any]:
    """What --json writes."""

    def score(score: TextScore) -> dict[str, Any]:
        return {
            "tokens": score.num_tokens,
            "bytes": score.num_bytes,
            "nats": score.nats,
            "bits_per_byte": score.bits_per_byte,
            "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,  # JSON has no infinity
        }

    return {
        "is_complete": is_complete,
        "max_documents": args.max_documents,
        "max_tokens": args.max_tokens,
        "models": [
            {
                "model": result.model,
                "weights": result.weights,
                "context": result.windows.context,
                "stride": result.windows.stride,
                "is_complete": result.is_complete,
                **score(result.total),
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "files": [
                    {"file": str(path), "documents": file.num_documents, **score(file.score)}
                    for path, file in result.files.items()
                ],
            }
            for result in results
        ],
    }


def _print(console: Console, results: Sequence[Result]) -> None:
    if len(results) == 1:
        _print_files(console, results[0])
    else:
        _print_models(console, results)
    for result in results:
        if not result.is_complete:
            stopped = f"{result.model}, {result.weights}: stopped after {result.total.num_tokens:,} of "
            console.print(f"{stopped}{result.num_tokens:,} tokens", style="yellow")


def _print_files(console: Console, result: Result) -> None:
    """One model: a line for each file."""
    table = make_table(console, "file", "documents", "tokens", "bytes", "bits/byte", "perplexity")

    def add(name: str, documents: int, score: TextScore) -> None:
        counts = (f"{number:,}" for number in (documents, score.num_tokens, score.num_bytes))
        table.add_row(name, *counts, f"{score.bits_per_byte:.4f}", _perplexity(score))

    names = _short_names(list(result.files))
    for path, file in result.files.items():
        add(names[path], file.num_documents, file.score)
    if len(result.files) > 1:
        table.add_section()
        add("all", sum(file.num_documents for file in result.files.values()), result.total)
    console.print(table)
    console.print(
        f"{result.model}, {result.weights}; {_windows(result)}; {_duration(result.seconds)}, "
        f"{result.tokens_per_second:,.0f} tokens a second",
        style="dim",
    )


def _print_models(console: Console, results: Sequence[Result]) -> None:
    """Several: a line for each model, and for several files their bits per byte."""
    table = make_table(console, "model", "weights", "tokens", "bits/byte", "perplexity", "tokens/s", left=2)
    for result in results:
        score = result.total
        table.add_row(
            result.model,
            result.weights,
            f"{score.num_tokens:,}",
            f"{score.bits_per_byte:.4f}",
            _perplexity(score),
            f"{result.tokens_per_second:,.0f}",
        )
    console.print(table)
    paths = list(dict.fromkeys(path for result in results for path in result.files))
    if len(paths) > 1:
        names = _short_names(paths)
        table = make_table(console, "bits/byte", *_labels(results))
        for path in paths:
            scores = [result.files[path].score if path in result.files else None for result in results]
            table.add_row(names[path], *(f"{score.bits_per_byte:.4f}" if score else "" for score in scores))
        console.print()
        console.print(table)
    if len({_windows(result) for result in results}) == 1:
        console.print(f"{_windows(results[0])[0].upper()}{_windows(results[0])[1:]}.", style="dim")
    else:
        for result in results:
            console.print(f"{result.model}: {_windows(result)}.", style="dim")
    console.print(
        "Bits per byte compare any two models; perplexity is per token, and compares only models with one tokenizer.",
        style="dim",
    )


def _labels(results: Sequence[Result]) -> list[str]:
    """What tells the results apart, in as few words as it takes."""
    if len({result.model for result in results}) == 1:
        return [result.weights for result in results]
    if len({result.model for result in results}) == len(results):
        return [result.model for result in results]
    return [f"{result.model}, {result.weights}" for result in results]


def _perplexity(score: TextScore) -> str:
    return f"{score.perplexity:,.2f}" if score.perplexity < 1e7 else f"{score.perplexity:.3g}"


def _windows(result: Result) -> str:
    context, stride = result.windows.context, result.windows.stride
    if stride == context:
        return f"windows of {context:,} tokens that do not overlap"
    return f"windows of {context:,} tokens that move on by {stride:,}"


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """File names without their folders, if that leaves no two alike."""
    are_unique = len({path.name for path in paths}) == len(paths)
    return {path: path.name if are_unique else str(path) for path in paths}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
