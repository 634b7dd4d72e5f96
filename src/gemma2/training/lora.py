"""LoRA: frozen weights W with a trained update of low rank beside them, y = x Wᵀ + scaling · (x Aᵀ) Bᵀ.

Modules, parameters and their initialization are those of PEFT (`base_layer.weight`, `lora_A.default.weight`,
`lora_B.default.weight`), so that adapters go from one to the other by name. What differs is the arithmetic: PEFT widens
the inputs to float32 for adapters in float32, and autograd keeps those and the outputs of both products. Here products
are in the dtype of the inputs, the update is added in place, and what is kept is x Aᵀ and, unless it can be made again,
the input. A frozen weight gets no gradient, and an input that needs none costs no product.

Axes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.errors import ConfigError, nearest_name
from gemma2.memory import ADAPTABLE_MODULES
from gemma2.model.lean_functions import recipe_of
from gemma2.model.modeling import Gemma2ForCausalLM

ADAPTER_NAME = "default"
"""PEFT's name for the only adapter."""


class LoraLinear(nn.Module):
    """A linear map with an adapter.

    Args:
        base_layer: the map, whose weight is frozen.
        rank: r, the adapter's width.
        alpha: what the update is multiplied with, times its rank.
        use_rslora: whether the update is divided by the root of the rank in place of the rank (arXiv 2312.03732).
        dropout: probability that an input of the adapter is left out in training.
        generator: for the random half of the adapter; None for PyTorch's own.

    A is drawn as PEFT draws it, uniformly within ±1 / √inputs; B is zero, so that the update is.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        rank: int,
        alpha: float,
        use_rslora: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = dropout
        self.is_enabled = True
        device = base_layer.weight.device
        a, b = (
            nn.Linear(*shape, bias=False, device="meta")
            for shape in ((self.in_features, rank), (rank, self.out_features))
        )
        a.weight = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        b.weight = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(a.weight, -bound, bound, generator=generator)
        self.lora_A, self.lora_B = nn.ModuleDict({ADAPTER_NAME: a}), nn.ModuleDict({ADAPTER_NAME: b})

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) to (…, O) in the dtype of x."""
        if not self.is_enabled:
            return self.base_layer(x)  # type: ignore[no-any-return]
        a_RI: Tensor = self.lora_A[ADAPTER_NAME].weight  # type: ignore[assignment]
        b_OR: Tensor = self.lora_B[ADAPTER_NAME].weight  # type: ignore[assignment]
        if self.dropout > 0 and self.training:
            update = F.linear(F.linear(F.dropout(x, self.dropout), a_RI.to(x.dtype)), b_OR.to(x.dtype))
            return self.base_layer(x) + self.scaling * update  # type: ignore[no-any-return]
        result: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
            x, self.base_layer.weight, a_RI, b_OR, self.scaling
        )
        return result

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}, dropout={self.dropout:g}"


class _LoraProduct(torch.autograd.Function):
    """With u = scaling · x Aᵀ and v = scaling · g B:  y = x Wᵀ + u Bᵀ, dx = g W + v A, dA = vᵀ x, dB = gᵀ u.

    An input that can be made again (a norm's result, or GeGLU's) is not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        u = F.linear(x, a_RI.to(x.dtype)).mul_(scaling)
        y = F.linear(x, weight_OI)
        y.flatten(0, -2).addmm_(u.flatten(0, -2), b_OR.to(x.dtype).t())
        ctx.recipe, kept = recipe_of(x) or (None, (x,))
        if ctx.recipe is not None:
            ctx.recipe.promise_use()
        ctx.save_for_backward(u, weight_OI, a_RI, b_OR, *kept)
        ctx.scaling = scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        u, weight_OI, a_RI, b_OR, *kept = ctx.saved_tensors
        (g,) = grad_outputs
        g_TO = g.flatten(0, -2)
        v_TR = torch.mm(g_TO, b_OR.to(g.dtype)).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx_TI = torch.mm(g_TO, weight_OI)
            dx = dx_TI.addmm_(v_TR, a_RI.to(g.dtype)).view(*g.shape[:-1], -1)
        x = kept[0] if ctx.recipe is None else ctx.recipe.make_again(*kept)
        da_RI = torch.mm(v_TR.t(), x.flatten(0, -2)).to(a_RI.dtype)
        db_OR = torch.mm(g_TO.t(), u.flatten(0, -2)).to(b_OR.dtype)
        return dx, None, da_RI, db_OR, None


def add_lora(
    model: Gemma2ForCausalLM,
    *,
    rank: int,
    alpha: float,
    modules: Iterable[str] = ADAPTABLE_MODULES,
    use_rslora: bool = False,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Freezes a model and gives each layer's linear maps of these names an adapter in float32.

    Args:
        model: changed in place.
        rank: r, the adapters' width.
        alpha: what an update is multiplied with, times its rank.
        modules: some of `ADAPTABLE_MODULES`.
        use_rslora: whether updates are divided by the root of the rank in place of the rank.
        dropout: probability that an input of an adapter is left out in training.
        generator: for the random half of each adapter, drawn in the order of the layers; None for PyTorch's own.

    Raises:
        ConfigError: there is no such module, or a number is out of range.
    """
    modules = tuple(dict.fromkeys(modules))
    for name in modules:
        if name not in ADAPTABLE_MODULES:
            raise ConfigError(
                f"there is no linear map {name!r} in a layer; they are {', '.join(ADAPTABLE_MODULES)}."
                + nearest_name(name, ADAPTABLE_MODULES)
            )
    if rank < 1:
        raise ConfigError(f"the rank of an adapter must be at least 1, but is {rank}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be from 0 to below 1, but is {dropout}")
    model.requires_grad_(False)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, child in list(owner.named_children()):  # type: ignore[union-attr]
                if name in modules:
                    adapted = LoraLinear(
                        child, rank=rank, alpha=alpha, use_rslora=use_rslora, dropout=dropout, generator=generator
                    )
                    setattr(owner, name, adapted)


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """While it is open the model computes as if it had no adapters: the reference of preference learning."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear) and module.is_enabled]
    for module in adapted:
        module.is_enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.is_enabled = True
