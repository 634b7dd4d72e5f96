"""RMSNorm and GeGLU with backward passes written out: they keep their inputs, and autograd's steps between are gone.

Left to autograd, a norm keeps its input and its normed values in float32, and GeGLU the activated gate beside gate and
up. Here the backward pass computes such values again, which costs less than writing and reading them. Both go over
their rows in blocks that stay in the processor's cache from one step to the next. `attention` does likewise.

Without gradients the same steps run; results are the same, bit for bit.

What a linear map keeps of such a result for the gradient of its weight (or of an adapter beside it) can be spared, too:
a result knows how it is made again from what is kept anyway, its `Recipe`.

Axes: … any, D width, R rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gemma2.memory.running import BLOCK_VALUES


class Recipe:
    """How a result is made again in the backward pass, from tensors that its own backward pass keeps.

    It holds none of these: whoever uses it keeps them as autograd keeps tensors, which activation checkpointing relies
    on. Several users share one result.

    Args:
        make: makes the result of the kept tensors.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._uses_left = 0
        self._made: Tensor | None = None

    def promise_use(self) -> None:
        """Announces one call of `make_again`."""
        self._uses_left += 1

    def make_again(self, *kept: Tensor) -> Tensor:
        """The result, bit for bit. It is held until the last of the uses that were announced."""
        made = self._make(*kept) if self._made is None else self._made
        self._uses_left -= 1
        self._made = made if self._uses_left > 0 else None
        return made


def recipe_of(tensor: Tensor) -> tuple[Recipe, tuple[Tensor, ...]] | None:
    """The recipe of a tensor and what it needs; None unless the tensor itself is a result of this file."""
    found: tuple[Recipe, tuple[Tensor, ...]] | None = getattr(tensor, "_gemma2_recipe", None)
    return found


def _with_recipe(tensor: Tensor, make: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    tensor._gemma2_recipe = (Recipe(make), kept)  # type: ignore[attr-defined]
    return tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) · (1 + weight) over the last axis, in float32 (or float64), rounded once; differentiable once."""
    if _is_distributed(x):
        return _rms_norm_of_block(x, weight_D, eps)[0]
    if not torch.is_grad_enabled():
        return _rms_norm(x, weight_D, eps)[0]
    result: Tensor
    result, inverse = _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return _with_recipe(result, _scale_rows, x, weight_D, inverse)


def _rms_norm_of_block(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and 1 / rms(x)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * (1.0 + weight_D.to(wide.dtype))).to(x.dtype), inverse


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _is_one_block(x):
        return _rms_norm_of_block(x, weight_D, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inverse = out.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
    for x_RD, out_RD, inverse_R1 in _blocks(x, out, inverse):
        normed_RD, block_inverse_R1 = _rms_norm_of_block(x_RD, weight_D, eps)
        out_RD.copy_(normed_RD)
        inverse_R1.copy_(block_inverse_R1)
    return out, inverse


def _scale_rows(x: Tensor, weight_D: Tensor, inverse: Tensor) -> Tensor:
    """The norm's result once more."""
    factor_D = 1.0 + weight_D.to(inverse.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for x_RD, inverse_R1, out_RD in _blocks(x, inverse, out):
        out_RD.copy_((x_RD.to(inverse.dtype) * inverse_R1).mul_(factor_D))
    return out


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x), g the gradient and f = g · (1 + w):  dx = (f - n · mean(f · n)) / rms(x), dw = Σ g · n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse = _rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.mark_non_differentiable(inverse)
        return out, inverse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        grad = grad_outputs[0]
        factor_D = 1.0 + weight_D.to(inverse.dtype)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if ctx.needs_input_grad[0] else None
        dw_D = torch.zeros_like(factor_D) if ctx.needs_input_grad[1] else None
        for x_RD, grad_RD, inverse_R1, dx_RD in _blocks(x, grad, inverse, dx if dx is not None else x):
            normed_RD = x_RD.to(inverse.dtype) * inverse_R1
            wide_RD = grad_RD.to(inverse.dtype)
            if dw_D is not None:
                dw_D += (wide_RD * normed_RD).sum(0)
            if dx is not None:
                scaled_RD = wide_RD * factor_D
                mean_R1 = (scaled_RD * normed_RD).mean(-1, keepdim=True)
                dx_RD.copy_(scaled_RD.sub_(normed_RD.mul_(mean_R1)).mul_(inverse_R1))
        return dx, None if dw_D is None else dw_D.to(weight_D.dtype), None


def geglu(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) · up, in their dtype; differentiable once."""
    if not torch.is_grad_enabled():
        return activation(gate).mul_(up)  # in place: gate is still held by the caller
    if _is_distributed(gate):
        return activation(gate) * up
    result: Tensor = _GeGLU.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return _with_recipe(result, lambda gate, up: _geglu(gate, up, activation), gate, up)


def _geglu(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for gate_RI, up_RI, out_RI in _blocks(gate, up, out):
        torch.mul(activation(gate_RI), up_RI, out=out_RI)
    return out


class _GeGLU(torch.autograd.Function):
    """d up = gradient · activation(gate), d gate = gradient · up · activation'(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _geglu(gate, up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        for gate_RI, up_RI, grad_RI, d_gate_RI, d_up_RI in _blocks(gate, up, grad_outputs[0], d_gate, d_up):
            with torch.enable_grad():
                gate_RI = gate_RI.detach().requires_grad_()
                activated_RI = ctx.activation(gate_RI)
            torch.mul(grad_RI, activated_RI.detach(), out=d_up_RI)
            d_gate_RI.copy_(torch.autograd.grad(activated_RI, gate_RI, grad_RI * up_RI)[0])
        return d_gate, d_up, None


def _is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor or another kind of its own, whose operations autograd had better see one by one."""
    return type(tensor) is not Tensor


def _is_one_block(tensor: Tensor) -> bool:
    return tensor.numel() <= BLOCK_VALUES or tensor.device.type != "cpu"


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some rows of each of several tensors, all rows in turn; rows are all axes but the last."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    num_rows, width = flat[0].shape
    size = num_rows if _is_one_block(tensors[0]) else max(1, BLOCK_VALUES // width)
    for first in range(0, num_rows, max(1, size)):
        yield tuple(tensor[first : first + size] for tensor in flat)
