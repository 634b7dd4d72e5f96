"""Frozen linear maps in 4 or 8 bits below an adapter: QLoRA (arXiv 2305.14314), by bitsandbytes, on CPU and GPU.

nf4 keeps a matrix as sixteen values fitted to normal weights, with a scale for each 64 of them, the scales in 8 bits
themselves (double quantization): 4.13 bits a weight. A product first widens the matrix to the dtype of its input; the
gradient flows through to the adapters of earlier layers, none reaches the matrix.

The library packs and widens; the product is ours. Its own nf4 map, once it has been in eval mode on a CPU with
AVX512-BF16, stays with a kernel that gives no gradient, so that after a validation adapters learn something else. Its
own int8 map rounds inputs to 8 bits, on the CPU in validation only, and keeps them where a layer is computed again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.errors import MissingDependencyError


def quantized_linear(kind: str, compute_dtype: str, linear: nn.Linear) -> nn.Module:
    """Returns a frozen linear map with the weights of `linear`, rounded.

    Args:
        kind: "nf4" or "int8".
        compute_dtype: "float32" or "bfloat16", of the products.
        linear: a map without bias, whose weight may be freed afterwards.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "model.quantization needs bitsandbytes, which is not installed; install it: pip install 'gemma2[train]'"
        )
    library: Any = importlib.import_module("bitsandbytes")

    weight = linear.weight.data
    shape = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": False}
    dtype = getattr(torch, compute_dtype)
    module: Any
    if kind == "nf4":
        module = library.nn.Linear4bit(
            **shape, compute_dtype=dtype, quant_type="nf4", compress_statistics=True, device="meta"
        )
        module.weight = library.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
        ).to(weight.device)
    else:
        module = library.nn.Linear8bitLt(**shape, has_fp16_weights=False, device="meta")
        # Rounded here: by itself the library waits for the first product if the weight is on a GPU already.
        values, scales, _ = library.functional.int8_vectorwise_quant(weight.to(torch.float16))
        module.weight = library.nn.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
        module.init_8bit_state()
    module.forward = functools.partial(_forward, module, dtype)
    return module  # type: ignore[no-any-return]


def _forward(module: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    result: Tensor = _WidenedProduct.apply(x.to(dtype), module)  # type: ignore[no-untyped-call]
    return result.to(x.dtype)


class _WidenedProduct(torch.autograd.Function):
    """y = x Wᵀ, dx = g W; W is widened for each of the two and kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return F.linear(x, _widened(module, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (g,) = grad_outputs
        return g @ _widened(ctx.module, g.dtype), None


def _widened(module: Any, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs): the weights of a map."""
    widened: Tensor
    if hasattr(module.weight, "quant_state"):
        functional: Any = importlib.import_module("bitsandbytes.functional")
        widened = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return widened.to(dtype)
    # In place, as the library's own function would take four bytes a weight.
    widened = module.state.CB.to(dtype)
    return widened.mul_(module.state.SCB[:, None] / 127)
