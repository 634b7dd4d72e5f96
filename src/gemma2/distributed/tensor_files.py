"""Tensors of many processes in one folder, to be read again by any number of them (torch.distributed.checkpoint).

Each process writes what it holds into a file of its own, and what several hold is written once. A reader takes the
parts that it needs from whichever files have them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_ALLOWED: Final = {
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""What a list of tensors is made of, beside dtypes."""


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors into a folder; all processes must take part.

    Args:
        folder: the same in all processes, on a disk that all of them see; made if missing.
        tensors: the same names in all processes; DTensors, or tensors that are the same everywhere.

    Raises:
        RuntimeError: some process could not; the message is the first one's. In all processes.
    """
    with _ordinary_errors():
        save(dict(tensors), storage_writer=FileSystemWriter(str(folder), sync_files=True))


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors with what `write_tensors` wrote; all processes must take part.

    Args:
        folder: where it was written.
        tensors: DTensors, cut in any way, or whole tensors; written to in place. They may be some of those written.

    Raises:
        RuntimeError: some process could not; the message is the first one's. In all processes.
    """
    with _ordinary_errors():
        load(dict(tensors), storage_reader=_Reader(str(folder)))


def read_whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads all that `write_tensors` wrote, into the memory of this process alone; raises as `read_tensors`."""
    metadata = _Reader(str(folder)).read_metadata()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings(), _ordinary_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        load(tensors, storage_reader=_Reader(str(folder)), no_dist=True)
    return tensors


@contextmanager
def _ordinary_errors() -> Iterator[None]:
    """CheckpointException is none of Python's ordinary exceptions, and its message is a page of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise RuntimeError(str(first)) from error


class _Reader(FileSystemReader):
    """Reads the list of tensors without running any code that a folder from elsewhere might bring."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"the list of tensors asks for {module}.{name}, which has no place in it")
        return super().find_class(module, name)
