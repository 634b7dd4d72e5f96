"""An opened model: its config, and its tensors as arrays that the disk holds until they are touched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma2.checkpoints.layout import TOKENIZER_FILES
from gemma2.checkpoints.safetensors_format import DTYPES
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """One stored tensor, whose values stay on disk until `numpy()` is read from."""

    name: str
    """Hugging Face's name."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: "F32", "BF16" or "F16"."""
    file: Path
    """The file that holds it."""
    _mapping: mmap = field(repr=False, compare=False)
    _start: int = field(repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Size on disk, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def numpy(self) -> npt.NDArray[Any]:
        """Returns the values as a read-only view of the mapped file; nothing is read before it is used.

        Returns:
            `shape`, in float32, ml_dtypes.bfloat16 or float16. It is a copy, also read-only, only if the file puts
            the tensor at an odd address, as some old writers do: compiled kernels need aligned rows.
        """
        array = np.frombuffer(
            self._mapping, dtype=DTYPES[self.dtype], count=math.prod(self.shape), offset=self._start
        ).reshape(self.shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def read_into(self, buffer: npt.NDArray[np.uint8], *, first_byte: int = 0) -> None:
        """Fills a buffer with stored bytes by reading the file, so that no mapped pages add to the memory in use.

        Args:
            buffer: (n,) uint8, writable and C-contiguous; n bytes are read.
            first_byte: which of the tensor's bytes goes first.

        Raises:
            CheckpointError: the file cannot be read or has become shorter.
        """
        if buffer.ndim != 1 or not 0 <= first_byte <= first_byte + buffer.size <= self.num_bytes:
            raise ValueError(
                f"{self.name} has {self.num_bytes} bytes; cannot read from byte {first_byte} into {buffer.shape}"
            )
        rest = buffer.data
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self._start + first_byte)
                while len(rest):  # one call reads at most 2 GiB
                    num_read = stream.readinto(rest)
                    if not num_read:
                        raise CheckpointError(f"{self.file}: is truncated: it ends inside {self.name}; copy it again")
                    rest = rest[num_read:]
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read: {error.strerror or error}") from error

    def raw_bytes(self) -> npt.NDArray[np.uint8]:
        """Returns the stored bytes, (num_bytes,) uint8, as a read-only view of the mapped file."""
        return np.frombuffer(self._mapping, dtype=np.uint8, count=self.num_bytes, offset=self._start)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder that was checked whole: every tensor of `config` is there once, in its shape."""

    folder: Path
    config: Gemma2Config
    tensors: Mapping[str, LazyTensor]
    """Hugging Face name → tensor, in the order of `expected_tensors(config)`; the tied head has no entry."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def num_bytes(self) -> int:
        """Size of all tensors on disk, in bytes."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files that lie beside the weights; they may be handed to `save_checkpoint`."""
        return tuple(path for name in TOKENIZER_FILES if (path := self.folder / name).is_file())

    def arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yields (name, array) of each tensor, as writers and converters take them; see `LazyTensor.numpy`."""
        for name, tensor in self.tensors.items():
            yield name, tensor.numpy()
