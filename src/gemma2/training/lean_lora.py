"""LoRA's arithmetic for PEFT's plain layers: y = x Wᵀ + scaling · (x Aᵀ) Bᵀ with little copied and little kept.

PEFT widens a bf16 input to float32 for adapters in float32, multiplies and adds in float32, and autograd keeps the wide
input. Here products are in the dtype of the input, the update is added in place, and what is kept is x Aᵀ and, unless
it can be made again, the input itself. A frozen weight gets no gradient, and an input that needs none costs no product.
Modules, parameters and their names stay PEFT's.

Axes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.model.lean_functions import recipe_of
from gemma2.training.packed_base import PackedMatrix


def use_lean_lora(model: nn.Module) -> int:
    """Gives PEFT's plain LoRA layers this arithmetic, in place, and returns how many.

    Left alone are layers of other kinds (over quantized weights, other adapters than LoRA). A layer that is asked for
    something else than plain LoRA, such as DoRA, dropout, more than one adapter, merged weights, mixed precision by
    autocast, or a product that several processes share, computes as PEFT does.

    Args:
        model: with adapters.
    """
    layers = sys.modules.get("peft.tuners.lora.layer")  # where PEFT was not imported, there are no layers of its
    if layers is None:
        return 0
    count = 0
    layer: Any
    for layer in model.modules():
        if type(layer) is layers.Linear and _is_known(layer.get_base_layer()):
            layer.forward = functools.partial(_forward, layer)
            count += 1
    return count


def _is_known(base: nn.Module) -> bool:
    """Whether it is an ordinary linear map, or one over a `PackedMatrix`."""
    return type(base) is nn.Linear or isinstance(getattr(base, "matrix", None), PackedMatrix)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _plain_adapter(layer)
    weight_OI: Tensor = layer.get_base_layer().weight
    is_plain = type(weight_OI) is nn.Parameter  # and no DTensor, which is multiplied with DTensors only
    if name is None or not is_plain or weight_OI.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    product = getattr(layer.get_base_layer(), "matrix", weight_OI)
    result = _LoraProduct.apply(  # type: ignore[no-untyped-call]
        x, product, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )
    return result


def _plain_adapter(layer: Any) -> str | None:
    """The only adapter at work in a layer, if it is plain LoRA beside a frozen weight without bias."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    if layer.training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    base: nn.Linear = layer.get_base_layer()
    return None if base.bias is not None or base.weight.requires_grad else name


class _LoraProduct(torch.autograd.Function):
    """With u = scaling · x Aᵀ and v = scaling · g B:  y = x Wᵀ + u Bᵀ, dx = g W + v A, dA = vᵀ x, dB = gᵀ u.

    An input that can be made again (a norm's result, or GeGLU's) is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor | PackedMatrix, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        u = F.linear(x, a_RI.to(x.dtype)).mul_(scaling)
        ctx.recipe, kept = recipe_of(x) or (None, (x,))
        if ctx.recipe is not None:
            ctx.recipe.promise_use()
        ctx.scaling = scaling
        if isinstance(weight_OI, Tensor):
            ctx.matrix = None
            ctx.save_for_backward(u, a_RI, b_OR, weight_OI, *kept)
            y = F.linear(x, weight_OI)
        else:
            ctx.matrix = weight_OI
            ctx.save_for_backward(u, a_RI, b_OR, *kept)
            y = weight_OI.outputs(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        y.flatten(0, -2).addmm_(u.flatten(0, -2).to(y.dtype), b_OR.to(y.dtype).t())
        return y if ctx.matrix is None else y.to(x.dtype, copy=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        u, a_RI, b_OR, *kept = ctx.saved_tensors
        weight_OI = kept.pop(0) if ctx.matrix is None else None
        (g,) = grad_outputs
        g_TO = g.flatten(0, -2)
        v_TR = torch.mm(g_TO, b_OR.to(g.dtype)).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx_TI = ctx.matrix.inputs(g_TO) if weight_OI is None else torch.mm(g_TO, weight_OI)
            dx_TI.addmm_(v_TR.to(dx_TI.dtype), a_RI.to(dx_TI.dtype))
            dx = (dx_TI if ctx.matrix is None else dx_TI.to(g.dtype, copy=True)).view(*g.shape[:-1], -1)
        x = kept[0] if ctx.recipe is None else ctx.recipe.make_again(*kept)
        da_RI = torch.mm(v_TR.t(), x.flatten(0, -2)).to(a_RI.dtype)
        db_OR = torch.mm(g_TO.t(), u.flatten(0, -2)).to(b_OR.dtype)
        return dx, None, da_RI, db_OR, None
