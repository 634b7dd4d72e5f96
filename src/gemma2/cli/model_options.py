"""The options that say which model runs, and on what."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Final

from gemma2.cli.streaming import DIM, is_terminal, paint
from gemma2.cli.terminal import PlainProgress

if TYPE_CHECKING:
    from gemma2.api import LLM

BACKENDS: Final = ("auto", "cpu", "torch")
WEIGHTS: Final = ("auto", "float32", "bfloat16", "q8", "q4")
MAX_THREADS: Final = 1024
KV_CACHES: Final = ("auto", "float32", "bfloat16", "int8")


def add_model_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Declares the options.

    Args:
        parser: the verb's.
        several: whether --model and --weights may come several times; they are lists then, or None if left out.
    """
    group = parser.add_argument_group("model")
    action, again = ("append", "; may come again") if several else ("store", "")
    group.add_argument(
        "--model",
        metavar="MODEL",
        action=action,
        help=f"a folder, or a name on the Hub that was pulled{again} (default: the bundled model)",
    )
    group.add_argument(
        "--adapter", metavar="FOLDER", help="a LoRA adapter to run on top of the model, as `gemma2 tune` writes it"
    )
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="what computes (default: %(default)s)")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        action=action,
        default=None if several else "auto",
        help=f"how weights are kept{again} (default: auto)",
    )
    group.add_argument("--kv-cache", choices=KV_CACHES, default="auto", help="how the CPU engine keeps keys and values")
    group.add_argument(
        "--threads", type=num_threads, metavar="N", help="of the CPU engine (default: one for each core)"
    )
    group.add_argument("--device", help="such as cpu, cuda or cuda:1, for torch (default: the best there is)")


def num_threads(text: str) -> int:
    """Reads the value of --threads."""
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not 1 <= number <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_THREADS}, but is {text!r}")
    return number


def load_model(args: argparse.Namespace, *, quiet: bool) -> LLM:
    """Loads the model that the options name; whoever watches the terminal is told to wait, and for what.

    Args:
        args: the options.
        quiet: whether to say nothing.

    Raises:
        Gemma2Error: there is no such model, or it cannot run so.
    """
    from gemma2.api import load

    waiting = _Waiting(is_shown=is_terminal(sys.stderr) and not quiet, is_quiet=quiet)
    with waiting:
        return load(
            args.model,
            adapter=args.adapter,
            backend=args.backend,
            weights=args.weights,
            device=args.device,
            num_threads=args.threads,
            kv_cache=args.kv_cache,
            progress=waiting.show_progress,
            notify=waiting.show_sentence,
        )


class _Waiting:
    """One line on the terminal that says what is waited for, and is gone afterwards; a line now and then to a pipe."""

    def __init__(self, *, is_shown: bool, is_quiet: bool) -> None:
        self._is_shown = is_shown
        self._is_quiet = is_quiet
        self._first: tuple[float, int] | None = None
        self._plain = PlainProgress("quantizing")
        self._length = 0

    def __enter__(self) -> None:
        self._write("loading the model …")

    def __exit__(self, *exception: object) -> None:
        self._write("")

    def show_sentence(self, sentence: str) -> None:
        """Prints a sentence that stays."""
        if not self._is_quiet:
            self._write("")
            print(sentence, file=sys.stderr)

    def show_progress(self, done: int, total: int) -> None:
        """Shows how far the rounding of weights is: share and, once they can be told, rate and time left."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        if not self._is_shown:
            if not self._is_quiet:
                self._plain.update(done, total)
            return
        seconds, num_bytes = now - self._first[0], done - self._first[1]
        speed = ""
        if seconds >= 1 and num_bytes:
            rate = num_bytes / seconds
            speed = f", {rate / 1e6:,.0f} MB/s, {(total - done) / rate:,.0f} s left"
        self._write(f"quantizing {done / total:4.0%}{speed}")

    def _write(self, text: str) -> None:
        if self._is_shown:
            sys.stderr.write("\r" + paint(text, DIM, sys.stderr) + " " * (self._length - len(text)))
            if not text:
                sys.stderr.write("\r")
            sys.stderr.flush()
            self._length = len(text)
