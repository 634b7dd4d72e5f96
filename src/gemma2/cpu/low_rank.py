"""A LoRA adapter on top of packed weights: y = W x + s · B (A x), with W as it is.

A and B go through the same kernels as W, so a row's result still depends on nothing but the row: beside q8 and q4
weights they are kept in q8, whose rounding is far below the adapter's own share of the result. Maps that are one matrix
in the engine (q, k and v; gate and up) have their A's one under the other, and their B's on the diagonal of one matrix.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.checkpoints import LowRankUpdate
from gemma2.quantization.packing import TILE, Packer, aligned_memory

Floats = npt.NDArray[np.float32]

_ROWS_AT_ONCE: Final = 32 * TILE  # of W, widened to float32 to measure its rows


class LowRankMap:
    """What an adapter adds to one matrix of the engine.

    Args:
        runtime: threads and instruction set.
        matrix: W, packed.
        data: the bytes of W.
        parts: the maps that W is made of, as (outputs, update or None) in the order of their rows.
        max_rows: rows of activations that come at once, at most.
    """

    def __init__(
        self,
        runtime: kernels.Runtime,
        matrix: kernels.Matrix,
        data: npt.NDArray[np.uint8],
        parts: list[tuple[int, LowRankUpdate | None]],
        max_rows: int,
    ) -> None:
        rank = sum(len(update.a) for _, update in parts if update is not None)
        a, b = np.zeros((rank, matrix.inputs), np.float32), np.zeros((matrix.outputs, rank), np.float32)
        magnitude: Floats | None = None
        row = column = 0
        for outputs, update in parts:
            if update is not None:
                width = len(update.a)
                a[column : column + width] = update.a
                b[row : row + outputs, column : column + width] = update.scale * update.b
                column += width
                if update.magnitude is not None:
                    magnitude = np.full(matrix.outputs, np.nan, np.float32) if magnitude is None else magnitude
                    magnitude[row : row + outputs] = update.magnitude
            row += outputs
        weight_format = matrix.format if matrix.format in ("float32", "bfloat16") else "q8"
        self._a = _packed(runtime, a, weight_format)
        self._b = _packed(runtime, b, weight_format)
        self._stretch = None if magnitude is None else _stretch(runtime, matrix, data, a, b, magnitude)
        self._narrow = np.empty((max_rows, rank), np.float32)
        self._inputs = kernels.Activations(self._b.activation_format, max_rows, rank)

    def add(self, runtime: kernels.Runtime, x: kernels.Activations, out: Floats) -> None:
        """out += s · B (A x), and with DoRA each output times its stretch; x: (T, inputs), out: (T, outputs)."""
        narrow = self._narrow[: len(out)]
        kernels.matmul(runtime, x, self._a, narrow)
        kernels.write_activations(runtime, narrow, self._inputs)
        wide = np.empty_like(out)
        kernels.matmul(runtime, self._inputs, self._b, wide)
        out += wide
        if self._stretch is not None:
            out *= self._stretch


def _packed(runtime: kernels.Runtime, rows: Floats, weight_format: str) -> kernels.Matrix:
    packer = Packer(weight_format, runtime.num_threads)
    data = aligned_memory(packer.num_bytes(*rows.shape))
    packer.pack(rows, data)
    return kernels.Matrix(weight_format, rows.shape[0], rows.shape[1], data)


def _stretch(
    runtime: kernels.Runtime,
    matrix: kernels.Matrix,
    data: npt.NDArray[np.uint8],
    a: Floats,
    b: Floats,
    magnitude: Floats,
) -> Floats:
    """m / ‖W + s B A‖ for each row; 1 where m is NaN, in maps without DoRA."""
    stretch = np.ones(matrix.outputs, np.float32)
    for first in range(0, matrix.outputs, _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, matrix.outputs))
        count = rows.stop - first
        start = kernels.matrix_bytes(matrix.format, first, matrix.inputs) if first else 0
        end = start + kernels.matrix_bytes(matrix.format, count, matrix.inputs)
        weight = kernels.unpack_matrix(runtime, kernels.Matrix(matrix.format, count, matrix.inputs, data[start:end]))
        stretch[rows] = magnitude[rows] / np.linalg.norm(weight + b[rows] @ a, axis=1)
    return np.where(np.isnan(magnitude), np.float32(1), stretch)
