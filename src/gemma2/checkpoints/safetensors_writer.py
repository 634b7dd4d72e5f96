"""Writes a Hugging Face model folder, one tensor in memory at a time.

Names and shapes are known from the config, so every header is written before the first value, and each tensor goes to
its own place in whatever order it comes. A write that is killed never leaves a folder that looks whole; see `staging`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from gemma2.checkpoints.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    SHARD_PATTERN,
    SINGLE_FILE,
    first_few,
    shard_file,
)
from gemma2.checkpoints.names import TIED_HEAD, expected_tensors
from gemma2.checkpoints.safetensors_format import DTYPES, TensorEntry, build_header
from gemma2.checkpoints.staging import clear_errors, publish, require_room, staging_folder
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, nearest_name

StoredDtype = Literal["float32", "bfloat16"]
DEFAULT_SHARD_BYTES: Final = 5_000_000_000

_STORED: Final[Mapping[str, str]] = {"float32": "F32", "bfloat16": "BF16"}
_CONVERTIBLE: Final = ("float32", "bfloat16", "float16", "float64")
_CHUNK_BYTES: Final = 1 << 26  # conversions go through pieces of this size, not through a second embedding


def save_checkpoint(
    folder: str | Path,
    config: Gemma2Config,
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    *,
    dtype: StoredDtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_files: Iterable[str | Path] = (),
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
    overwrite_advice: str = ", or pass overwrite=True",
) -> Path:
    """Writes a model folder that transformers, vLLM and `open_checkpoint` read.

    Args:
        folder: where to; made if missing, with its parents.
        config: the architecture; written as config.json.
        tensors: (Hugging Face name, array) of each tensor of `expected_tensors(config)`, once, in any order. The
            fastest order is that one. Each array may be let go once the next is asked for.
        dtype: what to store, rounding to nearest even where it is narrower. None: the arrays' own dtype, which must
            then be the same for all, float32 or ml_dtypes.bfloat16.
        max_shard_bytes: tensor bytes a file may hold; a single larger tensor gets a file of its own. More than one
            file brings an index.
        tokenizer_files: files that are copied in under their own names; see `Checkpoint.tokenizer_files`.
        extra_files: name → contents of further files, such as generation_config.json.
        overwrite: whether a folder that is not empty may be written to. Its weights, index and config.json are
            replaced; other files stay, unless one of the same name is given.
        overwrite_advice: what else the error says that refuses it, where this function is not what a person called.

    Returns:
        The folder.

    Raises:
        CheckpointError: a tensor is missing, unknown, comes twice or has a wrong shape or dtype; the folder is not
            empty; the disk is full or refuses. What was written is then removed. Errors that `tensors` raises by
            itself pass through, after the same clean-up.
    """
    folder = Path(folder).expanduser()
    if dtype is not None and dtype not in _STORED:
        raise CheckpointError(f"dtype must be float32 or bfloat16, but is {dtype!r}.{_dtype_hint(str(dtype))}")
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, but is {max_shard_bytes}")
    copied = [Path(path).expanduser() for path in tokenizer_files]
    written = dict(extra_files or {})
    _check_further_files(copied, written)
    with staging_folder(folder, may_overwrite=lambda _: overwrite, advice=overwrite_advice) as staging:
        writer = _Writer(staging, folder, config, dtype, max_shard_bytes)
        for name, array in tensors:
            with clear_errors(folder):
                writer.write(name, array)
        stored = writer.finish()
        with clear_errors(folder):
            for path in copied:
                shutil.copyfile(path, staging / path.name)
            for name, contents in written.items():
                (staging / name).write_bytes(contents.encode("utf-8") if isinstance(contents, str) else contents)
            config.to_json_file(staging / CONFIG_FILE, dtype=stored)
            publish(staging, folder, weights=_weight_files)
    return folder


# -- Tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    file: Path
    entry: TensorEntry


class _Writer:
    """Puts each tensor in its place; the places are laid out when the first one shows the dtype."""

    def __init__(
        self, staging: Path, folder: Path, config: Gemma2Config, dtype: StoredDtype | None, max_shard_bytes: int
    ) -> None:
        self._staging = staging
        self._folder = folder
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._shapes = expected_tensors(config)
        self._stored: str | None = None
        self._places: dict[str, _Place] = {}
        self._written: set[str] = set()

    def write(self, name: str, array: npt.NDArray[Any]) -> None:
        self._check(name, array)
        if self._stored is None:
            self._stored = self._dtype or str(array.dtype)
            self._lay_out(_STORED[self._stored])
        place = self._places[name]
        stored = DTYPES[place.entry.dtype]
        # Opened anew for each tensor: with small shards there can be more files than the system allows open ones.
        with place.file.open("r+b") as stream:
            stream.seek(place.entry.start)
            rows = max(1, _CHUNK_BYTES * len(array) // array.nbytes)
            for start in range(0, len(array), rows):
                chunk = np.ascontiguousarray(array[start : start + rows], dtype=stored)
                # As bytes, since the buffer protocol has no letter for bfloat16.
                stream.write(chunk.reshape(-1).view(np.uint8).data)
        self._written.add(name)

    def finish(self) -> str:
        """Checks that all tensors came, and returns the stored dtype."""
        missing = [name for name in self._shapes if name not in self._written]
        if missing:
            raise CheckpointError(
                f"{self._folder}: not written, as {len(missing)} of {len(self._shapes)} tensors did not come: "
                f"{first_few(missing)}"
            )
        assert self._stored is not None, "a model has tensors"
        return self._stored

    def _check(self, name: str, array: npt.NDArray[Any]) -> None:
        if name not in self._shapes:
            head = " The head is the embedding and is not stored; leave it out" if name == TIED_HEAD else ""
            raise CheckpointError(
                f"{self._folder}: not written, as this Gemma 2 has no tensor {name!r}."
                f"{head or nearest_name(name, self._shapes)}"
            )
        if name in self._written:
            raise CheckpointError(f"{self._folder}: not written, as {name} came twice")
        if not isinstance(array, np.ndarray):
            raise CheckpointError(
                f"{self._folder}: not written, as {name} must be a numpy array, but is a {type(array).__name__}"
            )
        if array.shape != self._shapes[name]:
            raise CheckpointError(
                f"{self._folder}: not written, as {name} must have the shape {self._shapes[name]}, but it has "
                f"{array.shape}"
            )
        dtype = str(array.dtype)
        if self._dtype is None and dtype != (self._stored or dtype):
            raise CheckpointError(
                f"{self._folder}: not written, as {name} is {dtype}, but the tensors before it are {self._stored}; "
                "say with dtype= which to store"
            )
        if dtype not in (_STORED if self._dtype is None else _CONVERTIBLE):
            raise CheckpointError(
                f"{self._folder}: not written, as {name} is {dtype}, but float32 and bfloat16 are what can be "
                f"stored.{_dtype_hint(dtype)}"
            )

    def _lay_out(self, stored: str) -> None:
        """Decides which tensor goes to which file, and writes all headers and the index."""
        shards: list[list[str]] = [[]]
        filled = total = 0
        for name, shape in self._shapes.items():
            size = math.prod(shape) * DTYPES[stored].itemsize
            if shards[-1] and filled + size > self._max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            total += size
        require_room(self._folder, self._staging, total)
        weight_map: dict[str, str] = {}
        for index, names in enumerate(shards):
            file = self._staging / shard_file(index, len(shards))
            header, entries = build_header((name, stored, self._shapes[name]) for name in names)
            file.write_bytes(header)
            for entry in entries:
                self._places[entry.name] = _Place(file, entry)
                weight_map[entry.name] = file.name
        if len(shards) > 1:
            contents = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._staging / INDEX_FILE).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _dtype_hint(dtype: str) -> str:
    if dtype == "float16":
        # Many programs compute in the dtype that they find, and Gemma 2's residual stream overflows float16.
        return " Say dtype='float32', which keeps float16 exactly, or dtype='bfloat16'"
    return nearest_name(dtype, _STORED)


def _weight_files(folder: Path) -> list[Path]:
    names = [SINGLE_FILE, INDEX_FILE, *(path.name for path in folder.glob(SHARD_PATTERN))]
    return [folder / name for name in names if (folder / name).exists()]


def _check_further_files(tokenizer_files: list[Path], extra_files: Mapping[str, str | bytes]) -> None:
    for path in tokenizer_files:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; tokenizer_files must name files that can be copied")
    names = [path.name for path in tokenizer_files] + list(extra_files)
    for name in names:
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"extra_files: {name!r} must be a plain file name, without folders")
        if name in (CONFIG_FILE, INDEX_FILE) or name.endswith(".safetensors"):
            raise CheckpointError(f"{name} is written by itself and cannot be among the further files")
        if names.count(name) > 1:
            raise CheckpointError(f"{name} is given twice among the further files")
