"""Packs the weights of a checkpoint for the CPU engine, a range of rows at a time, however large a tensor is.

Rows are read from the files and not from mapped pages, so that the memory in use stays that of a few ranges; while one
is rounded the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2.checkpoints.checkpoint import Checkpoint, LazyTensor
from gemma2.checkpoints.safetensors_format import DTYPES
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError
from gemma2.quantization import SECOND_PLANE, PackedModel, packed_shapes
from gemma2.quantization.feedback import Calibration, Feedback
from gemma2.quantization.packing import (
    ALIGNMENT,
    EMBEDDING,
    TILE,
    Packer,
    RoundingError,
    aligned_memory,
    bfloat16_to_float32,
    packed_parts,
    packed_sizes,
    with_second_plane,
)

Progress = Callable[[int, int], None]
"""Is told (bytes of the checkpoint that are done, bytes in all)."""

_RANGE_BYTES: Final = 32 << 20
"""Of a tensor's stored values, read and rounded at a time: many tiles for every thread, and little beside a model."""


@dataclass(frozen=True, kw_only=True)
class PackedPiece:
    """Some bytes of a packed tensor."""

    name: str
    first_byte: int
    data: npt.NDArray[np.uint8]
    error: RoundingError


def packed_pieces(
    checkpoint: Checkpoint,
    weight_format: str,
    *,
    num_threads: int,
    second_plane: bool | None = None,
    calibration: Calibration | None = None,
    names: Iterable[str] | None = None,
    memory: Mapping[str, npt.NDArray[np.uint8]] | None = None,
    progress: Progress | None = None,
) -> Iterator[PackedPiece]:
    """Packs all weights, or some.

    Args:
        checkpoint: an opened model folder.
        weight_format: one of `PACKED_FORMATS`.
        num_threads: threads that round; one more reads.
        second_plane: whether to make `SECOND_PLANE` too; None: in q4, the one format that has it.
        calibration: what tells how errors make up for each other, for q8 and q4; left out, weights are rounded each on
            its own.
        names: which packed tensors, in this order; left out, all in the order of use, but with a calibration the
            embedding last.
        memory: where to put each tensor, in the sizes of `packed_sizes`; left out, each piece gets memory of its own.
        progress: is told of the bytes that are done.

    Yields:
        The pieces of every tensor, from its first byte to its last. A piece of the second plane comes after each piece
        of the embedding, and its error is that of both planes. With a calibration, errors are those of outputs.

    Raises:
        CheckpointError: a weight is NaN, infinite or too large for the format, or a file cannot be read.
    """
    packer = Packer(weight_format, num_threads)
    has_plane = with_second_plane(weight_format, second_plane)
    if calibration is not None and weight_format not in ("q8", "q4"):
        raise ValueError(f"a calibration is for q8 and q4, but the format is {weight_format}")
    if names is None:
        names = list(packed_parts(checkpoint.config))
        if calibration is not None:
            names = [*(name for name in names if name != EMBEDDING), EMBEDDING]
    num_bytes, num_done = checkpoint.num_bytes, 0
    feedback: Feedback | None = None
    for part, values in _read_ahead(_ranges(checkpoint, names)):
        if calibration is not None and values.ndim == 2 and part.first_row == 0:
            feedback = None  # goes before the next comes
            feedback = calibration.feedback(part.name)
        yield from _pack(packer, part, values, memory, feedback, second_plane=has_plane)
        num_done += part.num_stored_bytes
        if progress is not None:
            progress(num_done, num_bytes)


def pack_model(
    checkpoint: Checkpoint,
    weight_format: str,
    *,
    num_threads: int,
    second_plane: bool | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> PackedModel:
    """Packs all weights in memory; arguments and errors as those of `packed_pieces`."""
    sizes = packed_sizes(checkpoint.config, weight_format, second_plane=second_plane)
    whole = aligned_memory(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values()))
    memory = {}
    start = 0
    for name, size in sizes.items():
        memory[name] = whole[start : start + size]
        start += -(-size // ALIGNMENT) * ALIGNMENT
    for _ in packed_pieces(
        checkpoint,
        weight_format,
        num_threads=num_threads,
        second_plane=second_plane,
        calibration=calibration,
        memory=memory,
        progress=progress,
    ):
        pass
    return PackedModel(config=checkpoint.config, format=weight_format, tensors=as_tensors(checkpoint.config, memory))


def as_tensors(
    config: Gemma2Config, memory: Mapping[str, npt.NDArray[np.uint8]]
) -> dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.float32]]:
    """Views the bytes of packed tensors as `PackedModel` has them: norms as float32."""
    norms = {name for name, shape in packed_shapes(config).items() if len(shape) == 1}
    return {name: array.view(np.float32) if name in norms else array for name, array in memory.items()}


# -- Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one stored tensor; a norm is one row."""

    tensor: LazyTensor
    first: int
    count: int

    @property
    def row_bytes(self) -> int:
        return self.tensor.num_bytes // (self.tensor.shape[0] if len(self.tensor.shape) == 2 else 1)


@dataclass(frozen=True)
class _Range:
    """Consecutive rows of a packed tensor, from the stored tensors that it is made of."""

    name: str
    first_row: int
    rows: tuple[_Rows, ...]

    @property
    def num_stored_bytes(self) -> int:
        return sum(rows.count * rows.row_bytes for rows in self.rows)

    def read(self) -> npt.NDArray[Any]:
        """Returns (rows, inputs) or (width,): the bits of bfloat16 as uint16 if all are stored so, else float32."""
        stored = [_read_rows(rows) for rows in self.rows]
        if any(array.dtype != np.uint16 for array in stored) or stored[0].ndim == 1:
            stored = [bfloat16_to_float32(array) if array.dtype == np.uint16 else array for array in stored]
        return stored[0] if len(stored) == 1 else np.concatenate(stored)


def _read_rows(rows: _Rows) -> npt.NDArray[Any]:
    bits = np.empty(rows.count * rows.row_bytes, np.uint8)
    rows.tensor.read_into(bits, first_byte=rows.first * rows.row_bytes)
    dtype = np.dtype(np.uint16) if rows.tensor.dtype == "BF16" else DTYPES[rows.tensor.dtype]
    array = bits.view(dtype)
    if len(rows.tensor.shape) == 2:
        array = array.reshape(rows.count, rows.tensor.shape[1])
    return array.astype(np.float32) if rows.tensor.dtype == "F16" else array


def _ranges(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[_Range]:
    parts = packed_parts(checkpoint.config)
    for name in names:
        tensors = [checkpoint.tensors[part] for part in parts[name]]
        if len(tensors[0].shape) == 1:
            yield _Range(name, 0, (_Rows(tensors[0], 0, 1),))
            continue
        row_bytes = max(tensor.num_bytes // tensor.shape[0] for tensor in tensors)
        step = max(1, _RANGE_BYTES // row_bytes // TILE) * TILE
        num_rows = sum(tensor.shape[0] for tensor in tensors)
        for first in range(0, num_rows, step):
            yield _Range(name, first, tuple(_rows_within(tensors, first, min(first + step, num_rows))))


def _rows_within(tensors: list[LazyTensor], first: int, last: int) -> Iterator[_Rows]:
    """The rows from `first` to before `last` of the tensors put after each other."""
    start = 0
    for tensor in tensors:
        begin, end = max(first, start), min(last, start + tensor.shape[0])
        if begin < end:
            yield _Rows(tensor, begin - start, end - begin)
        start += tensor.shape[0]


def _read_ahead(ranges: Iterator[_Range]) -> Iterator[tuple[_Range, npt.NDArray[Any]]]:
    """Reads each range while the one before it is in use."""
    with ThreadPoolExecutor(1) as reader:
        ahead = [(part, reader.submit(part.read)) for part in (next(ranges),)]
        for following in (*ranges, None):
            part, values = ahead.pop()
            array = values.result()
            if following is not None:
                ahead.append((following, reader.submit(following.read)))
            yield part, array


# -- Rounding ---------------------------------------------------------------------------------------------------------


def _pack(
    packer: Packer,
    part: _Range,
    values: npt.NDArray[Any],
    memory: Mapping[str, npt.NDArray[np.uint8]] | None,
    feedback: Feedback | None,
    *,
    second_plane: bool,
) -> Iterator[PackedPiece]:
    """Yields what a range becomes: its packed rows and, if it is the embedding's, those of the second plane."""
    if values.ndim == 1:
        if not np.isfinite(values).all():
            raise CheckpointError(_explain_unfit(part, values[None], packer.format))
        data = values.view(np.uint8)
        if memory is not None:
            memory[part.name][:] = data
        yield PackedPiece(name=part.name, first_byte=0, data=data, error=RoundingError())
        return
    first, size = packer.num_bytes(part.first_row, values.shape[1]), packer.num_bytes(*values.shape)
    names = [part.name, SECOND_PLANE] if second_plane and part.name == EMBEDDING else [part.name]
    places = [aligned_memory(size) if memory is None else memory[name][first : first + size] for name in names]
    try:
        error = packer.pack(values, places[0], feedback=feedback)
    except ValueError:
        raise CheckpointError(_explain_unfit(part, values, packer.format)) from None
    if feedback is not None:
        error = packer.output_error(values, places[:1], feedback.samples)
    yield PackedPiece(name=part.name, first_byte=first, data=places[0], error=error)
    if len(places) == 2:
        both = packer.pack_lost(values, places[0], places[1])
        if feedback is not None:
            both = packer.output_error(values, places, feedback.samples)
        yield PackedPiece(name=SECOND_PLANE, first_byte=first, data=places[1], error=both)


def _explain_unfit(part: _Range, values: npt.NDArray[Any], weight_format: str) -> str:
    """Says which weight it is that does not fit."""
    floats = bfloat16_to_float32(values) if values.dtype == np.uint16 else values
    row, column = (int(index) for index in np.unravel_index(np.argmax(np.abs(floats)), floats.shape))
    value = float(floats[row, column])  # argmax takes NaN for the largest
    for rows in part.rows:
        if row < rows.count:
            break
        row -= rows.count
    where = f"row {rows.first + row}, column {column}" if len(rows.tensor.shape) == 2 else f"value {column}"
    why = (
        f"too large for {weight_format} weights"
        if np.isfinite(value)
        else "which no model can run with; the file is damaged, or its training failed"
    )
    return f"{rows.tensor.file}: {rows.tensor.name} holds {value:g} in {where}, {why}"
