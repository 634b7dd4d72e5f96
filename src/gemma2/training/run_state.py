"""Checkpoints of a training run: everything that makes a resumed run go on as if it had not been stopped.

A checkpoint is one file, `checkpoints/step-00000250.pt`, or, of several processes, a folder `step-00000250` with

    run.pt                numbers, and in the place of each tensor its name
    loader-00000.pt       where the loaders are: of each process what no process before it has
    .metadata, *.distcp   the tensors, each process's part in a file of its own (see `distributed.tensor_files`)

Either is written under another name, flushed to the disk and renamed, so a run that is killed at any moment leaves
whole checkpoints only. Either is read by any number of processes.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gemma2.checkpoints.staging import sync
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.failures import is_lost_connection
from gemma2.errors import CheckpointError

_NAME: Final = re.compile(r"step-(\d{8})(\.pt)?")
_BEST: Final = "best.pt"
_SHARED_BEST: Final = "best"
_NUMBERS: Final = "run.pt"
_FOLDER: Final = "folder"
"""The key under which a state that several processes read says where its tensors are."""


def save_run_state(folder: Path, step: int, state: dict[str, Any], *, to_keep: int, ranks: Ranks = ONE_PROCESS) -> Path:
    """Writes the checkpoint of `step` and removes all but the newest `to_keep`.

    Args:
        folder: of all checkpoints of the run; with several processes, the same folder for all of them.
        step: how many steps are done.
        state: tensors, numbers, strings, lists and dicts of them. With several processes all must have the same, but
            for the parts of DTensors and for state["loader"].
        to_keep: how many checkpoints are left there.
        ranks: the processes; all must take part.

    Raises:
        CheckpointError: the disk is full or not writable; checkpoints that were there are left alone.
    """
    name = f"step-{step:08d}"
    path = _write(folder / f"{name}.pt", state) if ranks.world_size == 1 else _write_shared(folder / name, state, ranks)
    if ranks.is_first:
        for old in list_run_states(folder)[:-to_keep]:
            _remove(old)
    return path


def save_best(folder: Path, state: dict[str, Any], *, ranks: Ranks = ONE_PROCESS) -> Path:
    """Writes the weights of the best validation so far over those of the one before; as `save_run_state`."""
    if ranks.world_size == 1:
        path = _write(folder / _BEST, state)
    else:
        path = _write_shared(folder / _SHARED_BEST, state, ranks)
    if ranks.is_first:
        _remove(folder / (_SHARED_BEST if path.name == _BEST else _BEST))
    return path


def load_best(folder: Path, *, ranks: Ranks = ONE_PROCESS) -> dict[str, Any]:
    """Reads what `save_best` wrote, in any number of processes; as `load_run_state`."""
    return load_run_state(folder / _BEST if (folder / _BEST).exists() else folder / _SHARED_BEST, ranks=ranks)


def best_loss(folder: Path, *, ranks: Ranks = ONE_PROCESS) -> float:
    """The loss of the weights that `save_best` wrote last; infinity if there are none that can be read."""

    def read() -> float:
        path = folder / _BEST if (folder / _BEST).exists() else folder / _SHARED_BEST / _NUMBERS
        try:
            return float(_load(path, mapped=True).get("loss", math.inf))
        except Exception:  # torch raises many kinds for a damaged file
            return math.inf

    return ranks.first_does(read)


def list_run_states(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: path.name[:13])


def load_run_state(path: Path, *, ranks: Ranks = ONE_PROCESS, mapped: bool = False) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
        path: one of `list_run_states`.
        ranks: the processes.
        mapped: whether tensors stay on the disk until they are looked at.

    Returns:
        What was saved. With several processes its tensors are still on the disk; `fill_tensors` reads them.

    Raises:
        CheckpointError: the file is damaged; the message says to remove it, so that the one before it is used.
    """
    try:
        if not path.is_dir():
            return _load(path, mapped=mapped or ranks.world_size > 1)
        state = _load(path / _NUMBERS)
        loaders = sorted(path.glob("loader-*.pt"))
        if loaders:
            state["loader"] = {key: value for file in loaders for key, value in _load(file).items()}
        if mapped or ranks.world_size > 1:
            return {**state, _FOLDER: path}
        from gemma2.distributed.tensor_files import read_whole_tensors

        return _with_tensors(state, read_whole_tensors(path))  # type: ignore[no-any-return]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise _not_read(path, error) from error


def fill_tensors(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes the tensors of a checkpoint into those that a run of several processes has, each process its part.

    Args:
        own: a state of the same form, or a part of one; its tensors are written to.
        state: from `load_run_state`.

    Raises:
        CheckpointError: they cannot be read.
    """
    _, tensors = _without_tensors(own)
    if _FOLDER not in state:
        from gemma2.distributed.placement import fill

        fill(tensors, _without_tensors(state)[1])
        return
    from gemma2.distributed.tensor_files import read_tensors

    try:
        read_tensors(state[_FOLDER], tensors)
    except (OSError, RuntimeError) as error:
        if is_lost_connection(error):
            raise
        raise _not_read(state[_FOLDER], error) from error


# -- one process ----------------------------------------------------------------------------------------------------


def _write(path: Path, state: dict[str, Any]) -> Path:
    beside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(beside, state)
        beside.replace(path)
        sync(path.parent)
        for left_over in path.parent.glob("*.partial"):  # of a run that was killed while it wrote
            _remove(left_over)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        beside.unlink(missing_ok=True)
        raise _not_written(path, error) from error
    return path


def _save(path: Path, state: Any) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    # Tensors, numbers, strings and lists only: a checkpoint from elsewhere can run no code.
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return state


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _not_written(path: Path, reason: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: the checkpoint cannot be written ({reason}); free some space and resume")


def _not_read(path: Path, reason: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: the checkpoint cannot be read ({str(reason).splitlines()[0]}); "
        f"remove it to resume from the one before"
    )


# -- several processes ----------------------------------------------------------------------------------------------


def _write_shared(path: Path, state: dict[str, Any], ranks: Ranks) -> Path:
    from gemma2.distributed.tensor_files import write_tensors

    beside = path.with_name(path.name + ".partial")

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob("*.partial"):  # of a run that was killed while it wrote
            _remove(left_over)
        beside.mkdir()

    def publish() -> None:
        _remove(path)
        beside.replace(path)
        sync(path.parent)

    rest, tensors = _without_tensors({key: value for key, value in state.items() if key != "loader"})
    try:
        ranks.first_does(begin)
        write_tensors(beside, tensors)
        if ranks.is_first:
            _save(beside / _NUMBERS, rest)
        loader = state.get("loader", {})
        others = ranks.gather(sorted(loader))[: ranks.rank]
        if own := {key: value for key, value in loader.items() if not any(key in keys for keys in others)}:
            _save(beside / f"loader-{ranks.rank:05d}.pt", own)
        ranks.wait()
        ranks.first_does(publish)
    except (OSError, RuntimeError) as error:
        if is_lost_connection(error):
            raise
        raise _not_written(path, error) from error
    return path


def _without_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state with the names of its tensors in their place, and the tensors by name; single numbers stay."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {key: walk(below, f"{name}/{key}".lstrip("/")) for key, below in value.items()}
        return value

    rest: dict[str, Any] = walk(state, "")
    return rest, tensors


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"tensor"}:
        return tensors[value["tensor"]]
    return {key: _with_tensors(below, tensors) for key, below in value.items()}
