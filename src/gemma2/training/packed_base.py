"""Frozen maps below an adapter whose products run on the CPU engine's 8-bit kernels, forward and backward.

The engine multiplies rows of activations, rounded to 8 bits with a scale for each group of 32, with weights in 8 or 4
bits. A processor that does this at all does it at twice the rate of bf16. Training through it needs two products of
each matrix W: x Wᵀ, which sums over inputs, and g W, which sums over outputs. Groups lie along the sum, so W is packed
twice, by rows and by columns.

    x Wᵀ      W in the wanted format: of a layer, the very numbers that the engine runs
    g W       these numbers once more, transposed, in q8

The embedding is in q8 in either format; the engine's q4 has a second plane of it, for as much precision.

What is trained, and all else between the products, stays as it is. A weight that is asked for as a tensor is NaN all
over, without memory: nothing can quietly compute with numbers that are not there.

Axes: T tokens, I inputs, O outputs, V vocabulary, D width, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from gemma2 import _kernels as kernels
from gemma2.checkpoints import Checkpoint
from gemma2.errors import CheckpointError
from gemma2.model.loading import load_model
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.quantization.packing import Packer, aligned_memory
from gemma2.runtime import make_runtime

_COLUMNS_FORMAT: Final = "q8"
_COLUMNS_AT_ONCE: Final = 1024
"""Of a matrix while it is packed by columns; a multiple of `TILE`."""


def load_packed(
    checkpoint: Checkpoint, weight_format: str, *, dtype: torch.dtype, num_threads: int
) -> Gemma2ForCausalLM:
    """Opens a model with its matrices packed one after the other, so it is never there in another form.

    Args:
        checkpoint: an opened model folder.
        weight_format: "q8" or "q4", of the layers' matrices.
        dtype: of all that is not packed and of what flows between products, float32 or bfloat16.
        num_threads: of the products.

    Raises:
        CheckpointError: a file cannot be read, or a weight cannot be rounded.
    """
    products = EngineProducts(num_threads)

    def packed_linear(linear: nn.Linear) -> nn.Module:
        return PackedLinear(products.pack(linear.weight, weight_format), dtype)

    def packed_embedding(embedding: nn.Embedding) -> tuple[nn.Module, nn.Module]:
        matrix = products.pack(embedding.weight, "q8")
        return PackedEmbedding(matrix, dtype), PackedLinear(matrix, dtype)

    try:
        return load_model(checkpoint, dtype=dtype, replace_linear=packed_linear, replace_embedding=packed_embedding)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}: cannot be packed as {weight_format}: {error}") from error


class EngineProducts:
    """Threads, and room for the rows that products of all matrices read, made when it is first needed.

    Args:
        num_threads: of the products.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.runtime = make_runtime(num_threads)
        self._rows: dict[int, kernels.Activations] = {}
        self._results = torch.empty(0)

    def pack(self, weight_OI: Tensor, weight_format: str) -> PackedMatrix:
        """Rounds a matrix on the CPU, bf16 or float32, to "q8" or "q4"; it may be freed afterwards."""
        return PackedMatrix(self, weight_OI, weight_format)

    def multiply(self, x_TI: Tensor, matrix: kernels.Matrix, out_TO: Tensor | None = None) -> Tensor:
        """x · matrixᵀ in float32, for x of any float dtype; in memory of the next result's if `out` is left out."""
        num_rows, width = x_TI.shape
        rows = self._rows.get(width)
        if rows is None or rows.capacity < num_rows:
            self._rows[width] = rows = kernels.Activations(matrix.activation_format, num_rows, width)
        kernels.write_activations(self.runtime, x_TI.detach().float().contiguous().numpy(), rows)
        if out_TO is None:
            size = num_rows * matrix.outputs
            if self._results.numel() < size:
                self._results = torch.empty(size)
            out_TO = self._results[:size].view(num_rows, -1)
        kernels.matmul(self.runtime, rows, matrix, out_TO.numpy())
        return out_TO


class PackedMatrix:
    """A frozen matrix (O, I), packed by rows and by columns; see `EngineProducts.pack`."""

    def __init__(self, products: EngineProducts, weight_OI: Tensor, weight_format: str) -> None:
        self._products = products
        self.num_outputs, self.num_inputs = weight_OI.shape
        self._rows = _packed(products, weight_OI, weight_format)
        self._columns = _packed_columns(products, self._rows)

    def outputs(self, x_TI: Tensor, out_TO: Tensor | None = None) -> Tensor:
        """x Wᵀ: (T, O) float32; where `out` is left out, it holds until the next product of any matrix."""
        return self._products.multiply(x_TI, self._rows, out_TO)

    def inputs(self, grad_TO: Tensor) -> Tensor:
        """g W, the gradient of the inputs: (T, I) float32; it holds until the next product of any matrix."""
        return self._products.multiply(grad_TO, self._columns)

    def look_up(self, ids_T: Tensor) -> Tensor:
        """The rows `ids`: (T, I) float32."""
        out_TI = torch.empty((ids_T.shape[0], self.num_inputs), dtype=torch.float32)
        kernels.embed(self._products.runtime, self._rows, ids_T.to(torch.int32).numpy(), 1.0, out_TI.numpy())
        return out_TI

    def dequantized(self) -> Tensor:
        """The numbers that products are made with: (O, I) float32."""
        return torch.from_numpy(kernels.unpack_matrix(self._products.runtime, self._rows))


def _packed(products: EngineProducts, weight_OI: Tensor, weight_format: str) -> kernels.Matrix:
    packer = Packer(weight_format, products.num_threads)
    data = aligned_memory(packer.num_bytes(*weight_OI.shape))
    weight_OI = weight_OI.detach().contiguous()
    if weight_OI.dtype == torch.bfloat16:
        packer.pack(weight_OI.view(torch.int16).numpy().view(np.uint16), data)
    else:
        packer.pack(weight_OI.float().numpy(), data)
    return kernels.Matrix(weight_format, weight_OI.shape[0], weight_OI.shape[1], data)


def _packed_columns(products: EngineProducts, rows: kernels.Matrix) -> kernels.Matrix:
    """The numbers of a packed matrix, transposed and packed anew."""
    packer = Packer(_COLUMNS_FORMAT, products.num_threads)
    weights = kernels.unpack_matrix(products.runtime, rows)
    data = aligned_memory(packer.num_bytes(rows.inputs, rows.outputs))
    position = 0
    for first in range(0, rows.inputs, _COLUMNS_AT_ONCE):
        part = np.ascontiguousarray(weights[:, first : first + _COLUMNS_AT_ONCE].T)
        size = packer.num_bytes(*part.shape)
        packer.pack(part, data[position : position + size])
        position += size
    return kernels.Matrix(_COLUMNS_FORMAT, rows.inputs, rows.outputs, data)


class PackedLinear(nn.Linear):
    """A frozen linear map without bias over a packed matrix.

    Args:
        matrix: its weight.
        dtype: of its inputs and outputs.
    """

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        super().__init__(matrix.num_inputs, matrix.num_outputs, bias=False, device="meta")
        self.weight = _no_numbers(matrix, dtype)
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Product.apply(x, self.matrix)  # type: ignore[no-untyped-call]
        return result


class PackedEmbedding(nn.Module):
    """A frozen embedding over a packed matrix; arguments as for `PackedLinear`."""

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _no_numbers(matrix, dtype)
        self.matrix = matrix

    def forward(self, input_ids: Tensor) -> Tensor:
        found = self.matrix.look_up(input_ids.flatten()).to(self.weight.dtype)
        return found.view(*input_ids.shape, -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.outputs(x.flatten(0, -2)).to(x.dtype, copy=True).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.matrix.inputs(grad.flatten(0, -2)).to(grad.dtype, copy=True).view(*grad.shape[:-1], -1), None


def _no_numbers(matrix: PackedMatrix, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of a matrix's shape that takes no memory."""
    nan = torch.full((), float("nan"), dtype=dtype)
    return nn.Parameter(nan.expand(matrix.num_outputs, matrix.num_inputs), requires_grad=False)
