"""Quantized copies of models, made once and kept: whoever runs a bf16 model in q4 waits for the rounding only once.

They lie in the folder `packed` of the package's cache (`gemma2.cache_folder`). A copy's name tells the model's folder,
and hashes of that folder's path and of its files: their paths, sizes, times and headers. So a model whose files change
is rounded anew, and the copy of its former files goes. Nothing there is needed; any of it may be deleted at any time.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma2.cache_folder import cache_folder
from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.layout import PACKED_SUFFIX, first_few
from gemma2.checkpoints.packed_folder import unused_packed_files, write_packed_file
from gemma2.checkpoints.packed_format import FORMAT_VERSION, open_packed_file
from gemma2.checkpoints.packing import Progress, pack_model
from gemma2.checkpoints.safetensors_format import MAX_HEADER_BYTES
from gemma2.checkpoints.staging import sync
from gemma2.errors import CheckpointError
from gemma2.quantization import PackedModel
from gemma2.quantization.packing import ROUNDING_VERSION, layout_of, packed_sizes, with_second_plane

_NAME_BYTES: Final = 100
"""How much of a folder's name is in that of its copy: file systems take 255 bytes in all."""
SMALL_MODEL_PARAMETERS: Final = 20_000_000
"""A model of fewer is rounded in a tenth of a second, so no copy of it is kept."""


def packed_model(
    checkpoint: Checkpoint,
    weight_format: str,
    *,
    num_threads: int,
    second_plane: bool | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> PackedModel:
    """Returns a model's weights, packed.

    q8 and q4 weights of a model that is not small come from the cache, where they are put first if they are not there.
    Of several processes that need the same copy one makes it, and the others wait. Where nothing can be kept (no room,
    a folder that may not be written) the weights are packed in memory, as float32 and bfloat16 always are.

    Args:
        checkpoint: an opened model folder.
        weight_format: one of `PACKED_FORMATS`.
        num_threads: threads that round and check.
        second_plane: whether the head gets two planes of 4 bits, see `SECOND_PLANE`; None: in q4.
        progress: is told of the bytes of the checkpoint that are done, and all, if it is rounded now.
        notify: is given a sentence where the work takes its time or cannot be kept, or where packed weights lie beside
            the model, which are not used.

    Raises:
        CheckpointError: a weight is NaN, infinite or too large for the format, or a file cannot be read.
    """
    if unused := unused_packed_files(checkpoint.folder):
        names = first_few(file.name for file in unused)
        notify(
            f"{checkpoint.folder}: holds packed weights beside the model, {names}, which are not used; they run from a "
            "folder of their own, with config.json and the tokenizer"
        )
    is_small = checkpoint.config.count_parameters().total < SMALL_MODEL_PARAMETERS
    if weight_format not in ("float32", "bfloat16") and not is_small:
        copy = None
        try:
            copy = _Copy.of(checkpoint, weight_format, second_plane=second_plane)
            # Without the lock first: a copy comes whole or not at all, and a cache that may only be read has no locks.
            kept = copy.open(num_threads, lambda sentence: None)
            if kept is None:
                with _locked(copy, notify):
                    kept = copy.open(num_threads, notify)
                    if kept is None:
                        notify(f"{checkpoint.folder}: rounding to {weight_format}, once; kept in {copy.file.parent}")
                        copy.make(num_threads, progress)
                        kept = copy.open(num_threads, notify)
            if kept is not None:
                return kept
        except OSError as error:
            file = error.filename or (copy.file.parent if copy is not None else "the cache")
            what = f"{file}: {error.strerror or error}"
            notify(
                f"{what}; the rounded weights cannot be kept, so the next start takes as long. GEMMA2_CACHE moves them"
            )
    return pack_model(checkpoint, weight_format, num_threads=num_threads, second_plane=second_plane, progress=progress)


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """A copy of a model that is in the cache, or may come there."""

    checkpoint: Checkpoint
    format: str
    second_plane: bool
    file: Path
    lock: Path
    """Is held by whoever makes a copy of this folder in this format."""
    same_folder: str
    """Pattern of the copies of this folder in this format, this one and older ones, whole or not."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, weight_format: str, *, second_plane: bool | None) -> _Copy:
        second_plane = with_second_plane(weight_format, second_plane)
        kind = f"{weight_format}+{weight_format}" if second_plane else weight_format
        source = checkpoint.folder.resolve()
        name = os.fsencode(source.name)[:_NAME_BYTES].decode(errors="ignore")  # for whoever looks into the cache
        stem = f"{name}-{_hash(os.fsencode(source))}-{kind}"
        identity = {
            "version": [FORMAT_VERSION, ROUNDING_VERSION],
            "layout": layout_of(weight_format),
            "config": checkpoint.config.to_dict(),
            "files": [_describe(path) for path in checkpoint.files],
        }
        folder = cache_folder() / "packed"
        identity_hash = _hash(json.dumps(identity, sort_keys=True).encode())
        return cls(
            checkpoint=checkpoint,
            format=weight_format,
            second_plane=second_plane,
            file=folder / f"{stem}-{identity_hash}{PACKED_SUFFIX}",
            lock=folder / f"{stem}.lock",
            same_folder=f"{glob.escape(stem)}-*",
        )

    def open(self, num_threads: int, notify: Callable[[str], None]) -> PackedModel | None:
        """Returns the weights if they are there and whole."""
        if not self.file.exists():
            return None
        try:
            packed = open_packed_file(self.file)
            if (packed.config, packed.format) != (self.checkpoint.config, self.format):
                return None
            return packed.load(num_threads=num_threads) if packed.has_second_plane == self.second_plane else None
        except CheckpointError:  # its advice is for folders that a user made
            notify(f"{self.file}: the copy of the rounded weights is damaged; it is made again now")
            return None

    def make(self, num_threads: int, progress: Progress | None) -> None:
        """Writes the copy, and removes what the same folder had before."""
        folder = self.file.parent
        for path in folder.glob(self.same_folder):
            path.unlink(missing_ok=True)
        needed = sum(packed_sizes(self.checkpoint.config, self.format, second_plane=self.second_plane).values())
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        descriptor, name = tempfile.mkstemp(prefix=f"{self.file.name}.", suffix=".partial", dir=folder)
        os.close(descriptor)
        beside = Path(name)
        try:
            write_packed_file(
                beside,
                self.checkpoint,
                self.format,
                num_threads=num_threads,
                second_plane=self.second_plane,
                progress=progress,
            )
            sync(beside)
            beside.replace(self.file)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def _locked(copy: _Copy, notify: Callable[[str], None]) -> Iterator[None]:
    import filelock

    copy.lock.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(copy.lock)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        notify(f"{copy.checkpoint.folder}: another process rounds it to {copy.format}; waiting for it")
        lock.acquire()
    except NotImplementedError:  # a file system without locks: a copy may be made twice, but is never half a one
        pass
    try:
        yield
    finally:
        lock.release()


def _describe(file: Path) -> list[str | int]:
    """What changes when a file does: its place, size, time and safetensors header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, MAX_HEADER_BYTES))
        status = os.fstat(stream.fileno())
    return [str(file.resolve()), status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
