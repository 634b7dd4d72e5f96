"""Rounding that knows its inputs: errors that inputs like each other let cancel.

Rounding a weight on its own makes the weights' error least. What counts is the error of the outputs, x·(W - Ŵ)ᵀ, and
inputs are far from independent: what the rounding at one input loses, the weights of later inputs can make up for. From
the second moments H = Σ xᵀ·x of a matrix's inputs comes how (Frantar et al., GPTQ, arXiv 2210.17323): with U upper
triangular and Uᵀ·U = H⁻¹, an error e at input k takes e · U[k][j] / U[k][k] off each later weight j, and the output
error grows by e² / U[k][k]², whatever came before. The kernels do that row by row; this file makes the factors.

Wide inputs are cut into blocks, which know nothing of each other: that bounds memory and work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels

Floats = npt.NDArray[np.float32]

MAX_BLOCK: Final = 4608
"""Inputs that are rounded together at most; the width of 27B."""
DAMPING: Final = 0.03
"""Is added to the diagonal of the moments, in units of its mean: noise that keeps inputs which the calibration never
saw apart from being free, and the factors small. From 0.001 to 0.1 the outcome is the same."""
_NUM_SAMPLES: Final = 128
_SAMPLES_AT_ONCE: Final = 4


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What the rounding of a matrix needs to know of its inputs."""

    importance: Floats
    """(inputs,): how much an error at each input counts that later inputs cannot make up for."""
    factors: Floats
    """(inputs, block): row k has how much of an error at k is taken off each input of its block."""
    samples: Floats
    """(n, inputs): some inputs, to tell the error of outputs by."""


class Calibration(Protocol):
    """Gives the feedback of a model's matrices, in the order of the forward pass."""

    def feedback(self, name: str) -> Feedback:
        """Returns the feedback of a packed tensor's rounding.

        Args:
            name: of a matrix of `packed_shapes`. Those of the layers come first, in their order, once each; the
                embedding, as the head, last.
        """
        ...


class SecondMoments:
    """Adds up xᵀ·x over the inputs of a matrix, within blocks of inputs.

    Args:
        num_inputs: width of the inputs.
        max_block: inputs of a block, at most.
    """

    def __init__(self, num_inputs: int, *, max_block: int = MAX_BLOCK) -> None:
        group = kernels.GROUP
        num_blocks = -(-num_inputs // max_block)
        self._block = -(-num_inputs // (num_blocks * group)) * group
        self._moments = np.zeros((num_inputs, self._block), np.float32)
        self._samples: list[Floats] = []

    def add(self, x: Floats) -> None:
        """Adds inputs, (rows, inputs)."""
        for first, last in self._blocks():
            part = x[:, first:last]
            self._moments[first:last, : last - first] += part.T @ part
        if len(self._samples) * _SAMPLES_AT_ONCE < _NUM_SAMPLES:
            step = max(1, len(x) // _SAMPLES_AT_ONCE)
            self._samples.append(x[step - 1 :: step][:_SAMPLES_AT_ONCE].copy())

    def feedback(self) -> Feedback:
        """Turns the moments into factors, in their own memory; nothing can be added any more.

        Raises:
            ValueError: the inputs were not finite.
        """
        importance = np.empty(len(self._moments), np.float32)
        for first, last in self._blocks():
            size = last - first
            moments = self._moments[first:last, :size].astype(np.float64)
            mean = np.trace(moments) / size
            if not np.isfinite(mean):
                raise ValueError("the inputs of a matrix are not finite: the model cannot run, or its text is no text")
            moments /= mean or 1.0
            moments[np.diag_indices(size)] += DAMPING
            # With the order reversed twice, the lower triangle of Cholesky is R, upper, with R·Rᵀ = H. So U = R⁻¹.
            upper = _inverse_of_triangle(np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1])
            diagonal = np.diag(upper).copy()
            importance[first:last] = 1 / diagonal**2
            self._moments[first:last, :size] = upper / diagonal[:, None]
        return Feedback(importance=importance, factors=self._moments, samples=np.concatenate(self._samples))

    def _blocks(self) -> list[tuple[int, int]]:
        num_inputs = len(self._moments)
        return [(first, min(first + self._block, num_inputs)) for first in range(0, num_inputs, self._block)]


def _inverse_of_triangle(upper: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Inverts an upper triangle by halves, in matrix products: [A B; 0 C]⁻¹ = [A⁻¹  -A⁻¹·B·C⁻¹; 0 C⁻¹]."""
    size = len(upper)
    if size <= 128:
        return np.linalg.inv(upper)
    half = size // 2
    inverse = np.zeros_like(upper)
    inverse[:half, :half] = _inverse_of_triangle(upper[:half, :half])
    inverse[half:, half:] = _inverse_of_triangle(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    return inverse
