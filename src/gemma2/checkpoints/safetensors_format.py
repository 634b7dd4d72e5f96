"""The safetensors format itself: 8 bytes of header length, a JSON header, the tensors end to end.

A header is `{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …, "__metadata__": {…}}`; offsets
count from the end of the header. The rules checked here are those of the `safetensors` library (names once, bytes
without gap or overlap, nothing after the last). The library is not asked, because a reader that maps the file needs
the offsets, which it keeps to itself, and because its errors name neither file nor tensor.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np

from gemma2.errors import CheckpointError

DTYPES: Final[Mapping[str, np.dtype[Any]]] = MappingProxyType(
    {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
)
"""What can be read. float16 is a fit way to *store* weights: every value widens to float32 exactly. To compute in it is
another matter, as Gemma 2's residual stream overflows it; backends convert first."""

MAX_HEADER_BYTES: Final = 100_000_000  # the library's own limit; Gemma 2 27B needs 70 KB
_LENGTH_BYTES: Final = 8
_FOR_TRANSFORMERS: Final[Mapping[str, str]] = MappingProxyType({"format": "pt"})  # which refuses a file without it

_KNOWN_BEGINNINGS: Final = (
    (b"version https://git-lfs", "is a Git LFS pointer and not the weights; run `git lfs pull` in its folder"),
    (b"GGUF", "is a GGUF file under another name, which is not read yet"),
    (b"PK\x03\x04", "is a PyTorch file (zip) under another name; convert it to safetensors"),
    (b"<!DOCTYPE", "is a web page, so the download went wrong; download the file again"),
    (b"<html", "is a web page, so the download went wrong; download the file again"),
)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in its file."""

    name: str
    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte, from the beginning of the file."""
    end: int
    """Offset after the last byte."""


def read_header(
    data: mmap | bytes, source: Path, *, dtypes: Mapping[str, np.dtype[Any]] = DTYPES
) -> dict[str, TensorEntry]:
    """Parses and checks the header of one safetensors file; reads nothing after it.

    Args:
        data: the whole file, mapped.
        source: what to call the file in errors.
        dtypes: those that may be in it.

    Returns:
        Name → entry, in the order of the bytes.

    Raises:
        CheckpointError: the file is not safetensors, is damaged or cut off, or holds a dtype that is not read.
    """
    values, data_start = _read_values(data, source)
    entries = [
        _read_entry(name, value, data_start, source, dtypes) for name, value in values.items() if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_coverage(entries, data_start, len(data), source)
    return {entry.name: entry for entry in entries}


def read_metadata(data: mmap | bytes, source: Path) -> dict[str, str]:
    """Returns the header's `__metadata__`, empty if it has none; raises as `read_header`."""
    values, _ = _read_values(data, source)
    metadata: dict[str, str] = values.get("__metadata__", {})
    return metadata


def _read_values(data: mmap | bytes, source: Path) -> tuple[dict[str, Any], int]:
    """Parses the header; returns it, and where the data begin."""
    size = len(data)
    for beginning, meaning in _KNOWN_BEGINNINGS:
        if data[: len(beginning)] == beginning:
            raise CheckpointError(f"{source}: {meaning}")
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{source}: is truncated or no safetensors file: it has only {size} bytes")
    header_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    data_start = _LENGTH_BYTES + header_bytes
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{source}: is not a safetensors file: it claims a header of {header_bytes} bytes, but a header has "
            f"2 to {MAX_HEADER_BYTES}"
        )
    if data_start > size:
        raise CheckpointError(
            f"{source}: is truncated: its header needs {data_start} bytes, but the file has {size}; copy it again"
        )
    return _parse(data[_LENGTH_BYTES:data_start], source), data_start


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] = _FOR_TRANSFORMERS,
    alignment: int = 8,
    dtypes: Mapping[str, np.dtype[Any]] = DTYPES,
) -> tuple[bytes, list[TensorEntry]]:
    """Builds the beginning of a file whose tensors follow in the given order.

    Args:
        tensors: (name, key of `dtypes`, shape) of each.
        metadata: what to write beside them.
        alignment: what the offset of the first tensor is a multiple of.
        dtypes: sizes of the values.

    Returns:
        Length and header, padded so that the data begin aligned, and where each tensor's bytes go.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    plan = []
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtypes[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        plan.append((name, dtype, shape, position, end))
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % alignment)
    data_start = _LENGTH_BYTES + len(text)
    entries = [
        TensorEntry(name=name, dtype=dtype, shape=shape, start=data_start + start, end=data_start + end)
        for name, dtype, shape, start, end in plan
    ]
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object, refusing a key that comes twice, which `json` would let the last one win.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, or a key comes twice.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, but it is a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} comes twice")
            seen.add(name)
    return values


def _parse(header: bytes, source: Path) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise CheckpointError(f"{source}: is not a safetensors file: its header does not begin with '{{'")
    try:
        values = parse_json_object(header)
    except ValueError as error:
        raise CheckpointError(f"{source}: the safetensors header is damaged: {error}") from None
    metadata = values.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{source}: the safetensors header is damaged: __metadata__ must map text to text")
    return values


def _read_entry(
    name: str, value: object, data_start: int, source: Path, dtypes: Mapping[str, np.dtype[Any]]
) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{source}: the header's entry of {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(
            f"{source}: {name} is stored as {dtype}, but only {', '.join(dtypes)} are read; integers and 8-bit floats "
            "are quantized weights, for which the unquantized model is needed"
        )
    if not _are_counts(shape):
        raise CheckpointError(f"{source}: the shape of {name} must be a list of whole numbers, but is {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{source}: the data_offsets of {name} must be [begin, end], but are {offsets!r:.80}")
    needed = math.prod(shape) * dtypes[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{source}: {name} of shape {tuple(shape)} in {dtype} takes {needed} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    start, end = (data_start + offset for offset in offsets)
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), start=start, end=end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(entries: list[TensorEntry], data_start: int, size: int, source: Path) -> None:
    """Checks that the tensors follow each other from the header to the end of the file."""
    position = data_start
    before = "the header"
    for entry in entries:
        if entry.start < position:
            raise CheckpointError(f"{source}: the bytes of {entry.name} overlap those of {before}; the file is damaged")
        if entry.start > position:
            raise CheckpointError(
                f"{source}: {entry.start - position} bytes between {before} and {entry.name} belong to no tensor; the "
                "file is damaged"
            )
        if entry.end > size:
            raise CheckpointError(
                f"{source}: is truncated: {entry.name} ends at byte {entry.end}, but the file has {size}; copy it again"
            )
        position, before = entry.end, entry.name
    if position != size:
        raise CheckpointError(
            f"{source}: {size - position} bytes after {before} belong to no tensor; the file is damaged"
        )
