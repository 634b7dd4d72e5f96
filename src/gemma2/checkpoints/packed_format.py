"""The packed file: weights in the CPU engine's layouts, in a safetensors container that is mapped and run as it lies.

Tensors come in the order of use, matrices as U8 of their packed bytes (kernels/matrix.h), then the norms as F32,
filled up with zeros to a multiple of 64 bytes. Each begins at a multiple of 64 bytes, the first one at a page. The
header's metadata, all text:

    format             "gemma2-packed"
    format_version     "1": of this description and of the layouts
    weight_format      "q4", "q8", "bfloat16" or "float32"
    group, tile        inputs that share a scale, outputs that are packed together
    codebook           the values of q4's codes
    calibrated         "yes" if errors were let make up for each other (quantization/feedback.py); else it is not there
    config             the architecture, as JSON
    checksums          JSON of tensor → checksum of its bytes
    header_checksum    xxh3-64 of the header, with 16 zeros in its own place

A tensor's checksum is the xxh3-64 of the xxh3-64 digests of its pieces of 8 MiB, so that threads can share the work of
checking one. They find every change of the bytes that chance makes; they are no protection against a forger.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from gemma2.checkpoints.layout import PACKED_SUFFIX, TOKENIZER_FILES
from gemma2.checkpoints.packing import as_tensors
from gemma2.checkpoints.safetensors_format import (
    TensorEntry,
    build_header,
    parse_json_object,
    read_header,
    read_metadata,
)
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, ConfigError
from gemma2.quantization import PACKED_FORMATS, SECOND_PLANE, PackedModel, packed_shapes
from gemma2.quantization.packing import ALIGNMENT, EMBEDDING, layout_of, packed_sizes

FORMAT_VERSION: Final = 1

_FORMAT: Final = "gemma2-packed"
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {"U8": np.dtype(np.uint8), "F32": np.dtype(np.float32)}
_PAGE_BYTES: Final = 4096
_PIECE_BYTES: Final = 8 << 20
_NO_CHECKSUM: Final = "0" * 16
_QUANTIZE_AGAIN: Final = "make it again from the original with `gemma2 quantize`"


def packed_file_name(weight_format: str) -> str:
    """Names the packed file of a folder. It does not match what open_checkpoint looks for."""
    return f"model-{weight_format}{PACKED_SUFFIX}"


# -- Writing ----------------------------------------------------------------------------------------------------------


class PackedWriter:
    """Writes a packed file, each tensor from its first byte to its last; the file is no valid one before `finish`.

    Args:
        file: where to; replaced if it is there.
        config: the architecture.
        weight_format: one of `PACKED_FORMATS`.
        second_plane: whether `SECOND_PLANE` will come; None: in q4.
        calibrated: whether the file shall say so.
    """

    def __init__(
        self,
        file: Path,
        config: Gemma2Config,
        weight_format: str,
        *,
        second_plane: bool | None = None,
        calibrated: bool = False,
    ) -> None:
        self._sizes = packed_sizes(config, weight_format, second_plane=second_plane)
        shapes = packed_shapes(config)
        self._order = [name for name in self._sizes if len(shapes.get(name, (0, 0))) == 2]
        self._order += [name for name in self._sizes if name not in self._order]
        self._hashes = {name: _PieceHashes() for name in self._sizes}
        self._metadata = {
            "format": _FORMAT,
            "format_version": str(FORMAT_VERSION),
            "weight_format": weight_format,
            **layout_of(weight_format),
            **({"calibrated": "yes"} if calibrated else {}),
            "config": json.dumps(config.to_dict(), separators=(",", ":")),
        }
        self._norms = {name for name, shape in shapes.items() if len(shape) == 1}
        header, entries = self._header(dict.fromkeys(self._order, _NO_CHECKSUM))
        self._starts = {entry.name: entry.start for entry in entries}
        self._num_header_bytes = len(header)
        self._stream = file.open("wb")
        self._stream.truncate(entries[-1].end)

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Appends bytes to a tensor."""
        hashes = self._hashes[name]
        self._stream.seek(self._starts[name] + hashes.num_bytes)
        self._stream.write(data.data)
        hashes.update(data)

    def finish(self) -> None:
        """Writes the header, which makes the file a valid one."""
        for name, size in self._sizes.items():
            written = self._hashes[name].num_bytes
            assert written == size, f"{name} has {size} bytes, but {written} were written"
            filling = np.zeros(_padded(size) - size, np.uint8)
            if filling.size:
                self.write(name, filling)
        header, _ = self._header({name: self._hashes[name].digest() for name in self._order})
        assert len(header) == self._num_header_bytes, "checksums have one length"
        self._stream.seek(0)
        self._stream.write(header.replace(_checksum_entry(_NO_CHECKSUM), _checksum_entry(_header_checksum(header))))
        self._stream.flush()

    def _header(self, checksums: Mapping[str, str]) -> tuple[bytes, list[TensorEntry]]:
        metadata = {
            **self._metadata,
            "checksums": json.dumps(checksums, separators=(",", ":")),
            "header_checksum": _NO_CHECKSUM,
        }
        return build_header(
            (
                (name, "F32", (_padded(self._sizes[name]) // 4,))
                if name in self._norms
                else (name, "U8", (self._sizes[name],))
                for name in self._order
            ),
            metadata=metadata,
            alignment=_PAGE_BYTES,
            dtypes=_DTYPES,
        )


class _PieceHashes:
    """The digests of the pieces of a tensor, as its bytes come."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._digests: list[bytes] = []
        self._current = xxhash.xxh3_64()

    def update(self, data: npt.NDArray[np.uint8]) -> None:
        start = 0
        while start < data.size:
            taken = min(data.size - start, _PIECE_BYTES - self.num_bytes % _PIECE_BYTES)
            self._current.update(data[start : start + taken].data)
            start += taken
            self.num_bytes += taken
            if self.num_bytes % _PIECE_BYTES == 0:
                self._digests.append(self._current.digest())
                self._current = xxhash.xxh3_64()

    def digest(self) -> str:
        rest = [self._current.digest()] if self.num_bytes % _PIECE_BYTES else []
        return xxhash.xxh3_64_hexdigest(b"".join(self._digests + rest))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _checksum_entry(checksum: str) -> bytes:
    return f'"header_checksum":"{checksum}"'.encode()


def _header_checksum(header: bytes) -> str:
    """Of a header whose own checksum is zeros."""
    return xxhash.xxh3_64_hexdigest(header)


# -- Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A packed file whose header was checked; its tensors are mapped, but not yet looked at."""

    file: Path
    config: Gemma2Config
    format: str
    """One of `PACKED_FORMATS`."""
    is_calibrated: bool
    """Whether errors of rounding were let make up for each other."""
    entries: Mapping[str, TensorEntry]
    _checksums: Mapping[str, str]
    _mapping: mmap.mmap

    @property
    def has_second_plane(self) -> bool:
        """Whether the head has two planes of 4 bits; see `SECOND_PLANE`."""
        return SECOND_PLANE in self.entries

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(entry.end - entry.start for entry in self.entries.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor → (outputs, inputs) or (width,), in the order of use."""
        shapes = packed_shapes(self.config)
        names = packed_sizes(self.config, self.format, second_plane=self.has_second_plane)
        return {name: shapes[EMBEDDING if name == SECOND_PLANE else name] for name in names}

    @property
    def folder(self) -> Path:
        """Where the file lies."""
        return self.file.parent

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors: one."""
        return (self.file,)

    @property
    def tokenizer_files(self) -> tuple[Path, ...]:
        """The tokenizer's files that lie beside the weights."""
        return tuple(path for name in TOKENIZER_FILES if (path := self.folder / name).is_file())

    def load(self, *, num_threads: int) -> PackedModel:
        """Compares every byte with its checksum and returns the weights as views of the mapped file.

        Raises:
            CheckpointError: the bytes are not those that were written.
        """
        view = memoryview(self._mapping)
        pieces = [
            (start, min(start + _PIECE_BYTES, entry.end))
            for entry in self.entries.values()
            for start in range(entry.start, entry.end, _PIECE_BYTES)
        ]

        def digest(piece: tuple[int, int]) -> bytes:
            return xxhash.xxh3_64_digest(view[piece[0] : piece[1]])  # lets other threads run meanwhile

        with ThreadPoolExecutor(num_threads) as pool:
            digests = dict(zip((start for start, _ in pieces), pool.map(digest, pieces), strict=True))
        for name, entry in self.entries.items():
            starts = range(entry.start, entry.end, _PIECE_BYTES)
            if xxhash.xxh3_64_hexdigest(b"".join(digests[start] for start in starts)) != self._checksums[name]:
                raise CheckpointError(
                    f"{self.file}: is damaged: the bytes of {name} are not those that were written; copy it again, or "
                    + _QUANTIZE_AGAIN
                )
        sizes = packed_sizes(self.config, self.format, second_plane=self.has_second_plane)
        memory = {
            name: np.frombuffer(self._mapping, np.uint8, count=size, offset=self.entries[name].start)
            for name, size in sizes.items()
        }
        return PackedModel(config=self.config, format=self.format, tensors=as_tensors(self.config, memory))


def open_packed_file(file: Path) -> PackedFile:
    """Maps a packed file and checks its header; takes milliseconds at any size.

    Raises:
        CheckpointError: there is none, it is not whole, or not for this version of the CPU engine.
    """
    try:
        with file.open("rb") as stream:
            if stream.seek(0, 2) == 0:
                raise CheckpointError(f"{file}: is truncated: the file is empty; {_QUANTIZE_AGAIN}")
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    metadata = read_metadata(mapping, file)
    _check_kind(metadata, file)
    _check_header_checksum(mapping, metadata, file)
    entries = read_header(mapping, file, dtypes=_DTYPES)
    weight_format = metadata.get("weight_format", "")
    if weight_format not in PACKED_FORMATS or any(
        metadata.get(key) != value for key, value in layout_of(weight_format).items()
    ):
        raise CheckpointError(
            f"{file}: was packed in another layout or with another codebook than this version of gemma2 has; "
            + _QUANTIZE_AGAIN
        )
    try:
        config = Gemma2Config.from_dict(parse_json_object(metadata["config"].encode()))
        checksums = parse_json_object(metadata["checksums"].encode())
    except (KeyError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file}: its header is damaged: {error}; {_QUANTIZE_AGAIN}") from None
    if not _are_those_of(config, weight_format, entries) or set(checksums) != set(entries):
        raise CheckpointError(f"{file}: its tensors are not those of the architecture in its header; {_QUANTIZE_AGAIN}")
    if any(entry.start % ALIGNMENT for entry in entries.values()):
        raise CheckpointError(
            f"{file}: its tensors do not begin at multiples of {ALIGNMENT} bytes, as the kernels need them; "
            + _QUANTIZE_AGAIN
        )
    return PackedFile(
        file=file,
        config=config,
        format=weight_format,
        is_calibrated=metadata.get("calibrated") == "yes",
        entries=entries,
        _checksums=checksums,
        _mapping=mapping,
    )


def _are_those_of(config: Gemma2Config, weight_format: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the entries have the names and sizes that an architecture asks for."""
    if config.num_hidden_layers >= len(entries):  # a layer has several; nobody must list a billion of them
        return False
    try:
        sizes = packed_sizes(config, weight_format, second_plane=weight_format == "q4" and SECOND_PLANE in entries)
    except (ValueError, TypeError):  # axes beyond the kernels', or beyond their integers
        return False
    found = {name: entry.end - entry.start for name, entry in entries.items()}
    return found == {name: _padded(size) for name, size in sizes.items()}


def _check_kind(metadata: Mapping[str, str], file: Path) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{file}: is no file of packed weights, though its name says so; {_QUANTIZE_AGAIN}")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{file}: is of version {version} of the packed format, but this gemma2 reads version {FORMAT_VERSION}; "
            f"update gemma2, or {_QUANTIZE_AGAIN}"
        )


def _check_header_checksum(mapping: mmap.mmap, metadata: Mapping[str, str], file: Path) -> None:
    num_bytes = 8 + int.from_bytes(mapping[:8], "little")
    checksum = metadata.get("header_checksum", "")
    blank = mapping[:num_bytes].replace(_checksum_entry(checksum), _checksum_entry(_NO_CHECKSUM), 1)
    if _header_checksum(blank) != checksum:
        raise CheckpointError(
            f"{file}: is damaged: its header is not the one that was written; copy it again, or {_QUANTIZE_AGAIN}"
        )
