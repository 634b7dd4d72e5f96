"""Checkpoints of a training run: everything that makes a resumed run go on as if it had not been stopped.

A checkpoint is one file, `checkpoints/step-00000250.pt`. It is written under another name, flushed to the disk and
renamed, so a run that is killed at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from gemma2.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8})\.pt")
_BEST = "best.pt"


def save_run_state(folder: Path, step: int, state: dict[str, Any], *, to_keep: int) -> Path:
    """Writes the checkpoint of `step` and removes all but the newest `to_keep`.

    Raises:
        CheckpointError: the disk is full or not writable; checkpoints that were there are left alone.
    """
    path = _write(folder / f"step-{step:08d}.pt", state)
    for old in list_run_states(folder)[:-to_keep]:
        old.unlink()
    return path


def save_best(folder: Path, state: dict[str, Any]) -> Path:
    """Writes the weights of the best validation so far over those of the one before; raises as `save_run_state`."""
    return _write(folder / _BEST, state)


def load_best(folder: Path) -> dict[str, Any]:
    """Reads what `save_best` wrote; raises as `load_run_state`."""
    return load_run_state(folder / _BEST)


def _write(path: Path, state: dict[str, Any]) -> Path:
    beside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        for left_over in path.parent.glob("*.partial"):  # of a run that was killed while it wrote
            left_over.unlink()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: the checkpoint cannot be written ({error}); free some space and resume"
        ) from error
    return path


def list_run_states(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def load_run_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Raises:
        CheckpointError: the file is damaged; the message says to remove it, so that the one before it is used.
    """
    try:
        # Tensors, numbers, strings and lists only: a checkpoint from elsewhere can run no code.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"{path}: the checkpoint cannot be read ({str(error).splitlines()[0]}); "
            f"remove it to resume from the one before"
        ) from error
    return state
