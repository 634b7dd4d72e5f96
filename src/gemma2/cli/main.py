"""`gemma2 VERB …`: finds the verb, runs it, and turns a user's mistake into one line and a non-zero exit.

A verb is the module `gemma2.cli.VERB` with two functions:

    add_arguments(parser)      declares its arguments; imports nothing heavy, since --help calls it
    run(args) -> int           does the work and returns the exit status; imports what it needs

Exit statuses: 0 done, 1 the work failed, 2 the command line is wrong, 130 interrupted, 141 the reader of a pipe left,
128 + n ended by signal n.

SIGTERM (`kill`, `timeout`) and SIGHUP (a closed terminal) end the work as Ctrl-C does, so that every verb can clear up
what it left half done. A verb may take them itself while it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Final, NoReturn, Protocol, TextIO, cast

from gemma2 import __version__
from gemma2.errors import Gemma2Error, MissingDependencyError, nearest_name

VERBS: Final = {
    "generate": "continue a text",
    "chat": "talk with a model in the terminal",
    "inspect": "show a model's architecture, layers, parameters and files",
    "plan": "say how much memory running or training takes, and whether it fits this machine",
    "bench": "measure how fast this machine runs a model, beside what it can do",
    "pull": "download a model from the Hugging Face Hub",
    "quantize": "round a model's weights to 8 or 4 bits, into a folder that loads at once",
    "eval": "measure how well a model predicts text, or compare several",
    "lm-eval": "run tasks of lm-eval, the Language Model Evaluation Harness, on a model",
    "pretrain": "train a model from scratch, from a file of settings",
    "tune": "fine-tune a model on examples, whole or by an adapter, from a file of settings",
    "distill": "train a student on the words of a larger teacher, from a file of settings",
    "merge": "fold adapters into a model's weights, or average the weights of several models",
}
"""Each verb and its line in --help."""

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141

# Which extra brings a library that running does not need.
_EXTRAS: Final = {
    "torch": "torch",
    "pydantic": "train",
    "yaml": "train",
    "matplotlib": "train",
    "zstandard": "train",
    "peft": "train",
}


class Verb(Protocol):
    """What a verb's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the verb's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Does the work and returns the exit status."""
        ...


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line each and name the nearest option."""

    _given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        greedy = [option for option in self._given if option in self._options_that_take_all]
        if greedy and "required" in message:
            message += f"; they go before {greedy[0]}, which takes all that follows it"
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = nearest_name(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}.{hint}" if hint else error.message) from None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses like argparse, but refuses what is left over here, where the known options are at hand."""
        self._given = list(sys.argv[1:] if args is None else args)
        parsed, left_over = super().parse_known_args(args, namespace)
        if left_over:
            first = left_over[0]
            if first.startswith("-"):
                name = first.partition("=")[0]
                options = [option for action in self._actions for option in action.option_strings]
                self.error(f"there is no option {name}.{nearest_name(name, options)}")
            self.error(f"one argument too many: {first!r}; a text with spaces needs quotes around it")
        return parsed, left_over

    @property
    def _options_that_take_all(self) -> set[str]:
        return {option for action in self._actions if action.nargs in ("*", "+") for option in action.option_strings}


class _Ended(SystemExit):
    """A signal that ends the work; a SystemExit, which event loops let through."""


class _EndOnSignals:
    """While entered, SIGTERM and SIGHUP raise `_Ended`, unless they were ignored (nohup) or are handled already.

    Only the first does: what it ends shall clear up undisturbed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._numbers: list[signal.Signals] = []

    def __enter__(self) -> _EndOnSignals:
        named = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))  # Windows has no SIGHUP
        with contextlib.suppress(ValueError):  # not in the main thread, which alone is given signals
            for number in named:
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, self._end)
                    self._numbers.append(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)

    def _end(self, signal_number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal_number
            raise _Ended(128 + signal_number)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: the arguments after the program's name; left out, those of this process.

    Returns:
        The exit status. `--help`, `--version` and mistakes in the arguments raise `SystemExit`, as argparse does.
    """
    _replace_unprintable_characters()
    arguments = list(sys.argv[1:] if argv is None else argv)
    status = EXIT_FAILED
    with _EndOnSignals() as ending:
        try:
            status = _run(arguments)
        except BaseException:  # after the end of a terminal also errors of writing to it
            if ending.received is None:
                raise
    if ending.received is None:
        return status
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    _drop_unwritten_output()
    return 128 + ending.received


def _run(arguments: list[str]) -> int:
    """Runs one command line, and says what went wrong."""
    debug = "--debug" in arguments or os.environ.get("GEMMA2_DEBUG", "") not in ("", "0")
    try:
        try:
            status = _dispatch(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            print(f"gemma2: {interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _drop_unwritten_output()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError):
            _drop_unwritten_output()
        if debug:
            traceback.print_exc()
        elif message := _one_line(error):  # empty where another process of a run has said it
            print(f"gemma2: error: {message}", file=sys.stderr)
        return EXIT_FAILED


def _dispatch(arguments: list[str]) -> int:
    parser = _make_top_parser()
    position = next((index for index, argument in enumerate(arguments) if not argument.startswith("-")), None)
    parser.parse_args(arguments[:position])
    if position is None:
        parser.print_help()
        return 0
    name = arguments[position]
    if name not in VERBS:
        hint = nearest_name(name, VERBS) or f" The verbs are {', '.join(VERBS)}."
        print(f"gemma2: error: there is no verb {name!r}.{hint}", file=sys.stderr)
        return EXIT_USAGE
    verb = cast(Verb, importlib.import_module(f"gemma2.cli.{name.replace('-', '_')}"))
    verb_parser = ArgumentParser(
        prog=f"gemma2 {name}",
        description=f"{VERBS[name][0].upper()}{VERBS[name][1:]}.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(verb_parser)
    _add_debug_option(verb_parser)
    return verb.run(verb_parser.parse_args(arguments[position + 1 :]))


def _make_top_parser() -> ArgumentParser:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {line}" for name, line in VERBS.items())
    parser = ArgumentParser(
        prog="gemma2",
        usage="gemma2 VERB [options]",
        description="Gemma 2: run it, adapt it, train it, understand it.",
        epilog=f"verbs:\n{verbs}\n\ngemma2 VERB --help shows the options of a verb.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gemma2 {__version__}")
    _add_debug_option(parser)
    return parser


def _add_debug_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (also: GEMMA2_DEBUG=1)")


def _one_line(error: Exception) -> str:
    """What an exception says to a user, without line breaks."""
    if isinstance(error, ModuleNotFoundError):
        error = _missing_dependency(error)
    text = " ".join(str(error).split())
    if isinstance(error, Gemma2Error):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # PyTorch's allocators raise RuntimeError: "… can't allocate memory …" on a CPU, "CUDA out of memory …" on a GPU.
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "the memory does not suffice; `gemma2 plan` says what a model, a context and a batch need"
    return f"{type(error).__name__}: {text}. This is a defect of gemma2; --debug shows where, to report it"


def _missing_dependency(error: ModuleNotFoundError) -> MissingDependencyError:
    name = (error.name or "").partition(".")[0]
    if name == "gemma2":
        return MissingDependencyError(f"{error.name} is missing; install gemma2 anew")
    extra = f"[{_EXTRAS[name]}]" if name in _EXTRAS else ""
    return MissingDependencyError(f"this needs {name}, which is not installed: pip install 'gemma2{extra}'")


def _replace_unprintable_characters() -> None:
    """Lets a terminal that knows only ASCII or Latin-1 show ? where it has no character, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _drop_unwritten_output() -> None:
    """Points standard output to nothing, or Python would try once more to write it at exit, and complain."""
    stream: TextIO | None = sys.stdout
    try:
        descriptor = stream.fileno() if stream is not None else None
    except (OSError, ValueError):  # not a file, as under a test's capture
        return
    if descriptor is not None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, descriptor)
        os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
