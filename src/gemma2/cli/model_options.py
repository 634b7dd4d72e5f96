"""The options that say which model runs, and on what."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Final

from gemma2.cli.streaming import DIM, is_terminal, paint

if TYPE_CHECKING:
    from gemma2.api import LLM

BACKENDS: Final = ("auto", "cpu", "torch")
WEIGHTS: Final = ("auto", "float32", "bfloat16", "q8", "q4")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="MODEL", help="a folder, or a name on the Hub that was pulled (default: the bundled model)"
    )
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="what computes (default: %(default)s)")
    group.add_argument("--weights", choices=WEIGHTS, default="auto", help="how weights are kept (default: %(default)s)")
    group.add_argument("--device", help="such as cpu, cuda or cuda:1, for torch (default: the best there is)")


def load_model(args: argparse.Namespace, *, quiet: bool) -> LLM:
    """Loads the model that the options name; whoever watches the terminal is told to wait.

    Args:
        args: the options.
        quiet: whether to say nothing.

    Raises:
        Gemma2Error: there is no such model, or it cannot run so.
    """
    from gemma2.api import load

    notice = "loading the model …"
    is_shown = is_terminal(sys.stderr) and not quiet
    if is_shown:
        sys.stderr.write(paint(notice, DIM, sys.stderr))
        sys.stderr.flush()
    try:
        return load(args.model, backend=args.backend, weights=args.weights, device=args.device)
    finally:
        if is_shown:
            sys.stderr.write(f"\r{' ' * len(notice)}\r")
            sys.stderr.flush()
