"""Writing a folder so that it looks whole only when it is.

All files are first written to a staging folder inside the target, on the same disk, and moved out when all are there,
config.json last: a folder without it opens nowhere, here or in transformers, so a write that is killed never leaves
one that looks whole. What a killed write left is cleared up by the next; a folder that another process writes to is
refused, by a lock that ends with its process.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from gemma2.checkpoints.layout import CONFIG_FILE, first_few, readable_size
from gemma2.errors import CheckpointError

_PREFIX: Final = ".writing-"
_SUFFIX: Final = ".partial"


@contextmanager
def staging_folder(folder: Path, *, may_overwrite: Callable[[Path], bool], advice: str = "") -> Iterator[Path]:
    """Gives an empty folder inside `folder`; removes it at the end, and on an error also `folder` if it was made.

    Args:
        folder: made if missing, with its parents.
        may_overwrite: whether a folder that is not empty may be written to; is asked only of such a one.
        advice: what to do besides choosing another folder where it may not, as ", or …".

    Raises:
        CheckpointError: the folder is a file, may not be overwritten, or is being written to; or the system refuses.
    """
    with clear_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder}: is a file, but a model is written to a folder; choose another name")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(folder.iterdir())
        abandoned = [path for path in entries if path.name.startswith(_PREFIX) and path.name.endswith(_SUFFIX)]
        others = [path.name for path in entries if path not in abandoned]
        if others and not may_overwrite(folder):
            raise CheckpointError(f"{folder}: is not empty (it has {first_few(others)}); choose another folder{advice}")
        for path in abandoned:  # left by a write that was killed
            with _locked(path) as is_ours:
                if not is_ours:
                    raise CheckpointError(
                        f"{folder}: another process is writing to it; wait for its end, or choose another folder"
                    )
                shutil.rmtree(path, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=folder))
    try:
        with _locked(staging):
            yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(staging: Path) -> Iterator[bool]:
    """Locks a staging folder while this process lives, or says that another holds it; without locks, nobody does."""
    try:
        descriptor = os.open(staging, os.O_RDONLY)
    except FileNotFoundError:  # it ended meanwhile
        yield True
        return
    is_ours = True
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_ours = False
        except (OSError, ImportError):  # a file system without locks, or Windows
            pass
        yield is_ours
    finally:
        os.close(descriptor)


def publish(
    staging: Path, folder: Path, *, weights: Callable[[Path], list[Path]], config_file: str = CONFIG_FILE
) -> None:
    """Moves the finished files out, so that the folder opens neither as the old model nor as the new one in between.

    Args:
        staging: holds the config and what belongs to it.
        folder: where to.
        weights: says which files of a folder hold weights. Those of `folder` that have no successor are removed.
        config_file: the file without which the folder opens nowhere.
    """
    for path in staging.iterdir():
        sync(path)  # a rename may survive a power cut that the contents do not
    (folder / config_file).unlink(missing_ok=True)
    new = [path.name for path in weights(staging)]
    others = sorted(path.name for path in staging.iterdir() if path.name not in (*new, config_file))
    # The weights first: so the folder has some at any time, by which a next write sees that it may go on here.
    for name in (*new, *others):
        (staging / name).replace(folder / name)
    for path in weights(folder):
        if path.name not in new:
            path.unlink()
    sync(folder)
    (staging / config_file).replace(folder / config_file)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def clear_errors(target: Path) -> Iterator[None]:
    """Turns the system's errors into ours, which say what was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(disk_full(target)) from error
        where = f"{error.filename}: " if error.filename not in (None, str(target)) else ""
        raise CheckpointError(f"{target}: cannot be written: {where}{error.strerror or error}") from error


def require_room(target: Path, folder: Path, needed_bytes: int) -> None:
    """Raises CheckpointError if the disk of `folder` has less than `needed_bytes` free; `target` is what it is for."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise CheckpointError(disk_full(target, needed=needed_bytes, free=free))


def disk_full(target: Path, *, needed: int | None = None, free: int | None = None) -> str:
    """The message of a full disk."""
    sizes = ""
    if needed is not None and free is not None:
        sizes = f": {readable_size(needed)} are needed, {readable_size(free)} are free"
    return f"{target}: not written, as the disk is full{sizes}; make room or choose a folder on another disk"
