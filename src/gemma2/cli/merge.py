"""`gemma2 merge`: folds adapters into a model's weights, or averages the weights of several models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy.typing as npt

    from gemma2.checkpoints import Checkpoint

_EXAMPLES: Final = """
  gemma2 merge google/gemma-2-2b-it --adapter runs/mine/adapter --output merged
  gemma2 merge runs/a/model runs/b/model --output average
  gemma2 merge runs/a/model runs/b/model --method slerp --base google/gemma-2-2b --weights 0.7,0.3 --output average

The result is a model's folder for every verb, for transformers and for vLLM. One tensor is in memory at a time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.description = (
        "Folds LoRA adapters into the weights of a model, or averages the weights of models that were tuned from one."
    )
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="one to fold adapters into (default: the bundled model), or several"
    )
    parser.add_argument("--output", "-o", required=True, metavar="FOLDER", help="the folder to write; new or empty")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a LoRA adapter to fold in; may be given several times",
    )
    parser.add_argument(
        "--method",
        choices=("linear", "slerp"),
        help="of an average: along lines, or along arcs between the weights (default: linear)",
    )
    parser.add_argument("--weights", metavar="W,W", help="the share of each model in an average (default: all alike)")
    parser.add_argument(
        "--base", metavar="MODEL", help="what the models were tuned from: averages what tuning changed, not the weights"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="to store (default: what the first model stores most in)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb."""
    from gemma2.checkpoints import open_adapter, open_checkpoint, save_checkpoint
    from gemma2.checkpoints.merging import averaged_tensors, folded_tensors
    from gemma2.cli.source import find_folder
    from gemma2.errors import ConfigError

    is_average = len(args.models) > 1
    for option, value in (("--method", args.method), ("--weights", args.weights), ("--base", args.base)):
        if value is not None and not is_average:
            raise ConfigError(f"{option} is of averages, which need two models or more, but {len(args.models)} came")
    if is_average and args.adapter:
        raise ConfigError("--adapter folds into one model, but several came; fold first, then average the results")
    if not is_average and not args.adapter:
        raise ConfigError("there is nothing to merge: give --adapter, or two models or more to average")
    checkpoints = [open_checkpoint(find_folder(name)) for name in args.models or [None]]
    first = checkpoints[0]
    if is_average:
        base = None if args.base is None else open_checkpoint(find_folder(args.base))
        tensors: Iterator[tuple[str, npt.NDArray[Any]]] = averaged_tensors(
            checkpoints, weights=_numbers(args.weights), method=args.method or "linear", base=base
        )
    else:
        tensors = folded_tensors(first, [open_adapter(folder, first.config) for folder in args.adapter])
    folder = save_checkpoint(
        args.output,
        first.config,
        _shown(tensors, first),
        dtype=args.dtype or _stored_dtype(first),
        tokenizer_files=first.tokenizer_files,
        extra_files=_generation_config([*args.adapter, first.folder]),
        overwrite_advice="",
    )
    print(f"wrote {folder}", file=sys.stderr)
    return 0


def _numbers(text: str | None) -> list[float] | None:
    from gemma2.errors import ConfigError

    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights needs numbers with commas between, like 0.7,0.3, but is {text!r}") from None


def _stored_dtype(checkpoint: Checkpoint) -> Any:
    """float32 or bfloat16, by most bytes; float16 becomes float32, which keeps it exactly."""
    num_bytes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        num_bytes[tensor.dtype] = num_bytes.get(tensor.dtype, 0) + tensor.num_bytes
    return "bfloat16" if max(num_bytes, key=lambda dtype: num_bytes[dtype]) == "BF16" else "float32"


def _generation_config(folders: list[Any]) -> dict[str, bytes]:
    """The first generation_config.json there is: an adapter's says how a tuned model's answers end."""
    from pathlib import Path

    for folder in folders:
        path = Path(folder).expanduser() / "generation_config.json"
        if path.is_file():
            return {path.name: path.read_bytes()}
    return {}


def _shown(
    tensors: Iterator[tuple[str, npt.NDArray[Any]]], checkpoint: Checkpoint
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Moves a bar by the bytes of what has been merged, where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    with Progress(
        "merging",
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("merging", total=checkpoint.num_bytes)
        for name, array in tensors:
            yield name, array
            bar.update(task, advance=checkpoint.tensors[name].num_bytes)
