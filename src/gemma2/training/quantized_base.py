"""Frozen linear maps in 4 or 8 bits below an adapter: QLoRA (arXiv 2305.14314), by bitsandbytes, on CPU and GPU.

nf4 keeps a matrix as sixteen values fitted to normal weights, with a scale for each 64 of them, the scales in 8 bits
themselves (double quantization): 4.13 bits a weight. A product first widens the matrix to the dtype of its input; the
gradient flows through to the adapters of earlier layers, none reaches the matrix.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

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
    library: Any = importlib.import_module("bitsandbytes.nn")

    weight = linear.weight.data
    shape = {"input_features": linear.in_features, "output_features": linear.out_features, "bias": False}
    module: Any
    if kind == "nf4":
        module = library.Linear4bit(
            **shape,
            compute_dtype=getattr(torch, compute_dtype),
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        module.weight = library.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
        ).to(weight.device)
    else:
        module = library.Linear8bitLt(**shape, has_fp16_weights=False, device="meta")
        module.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    return module  # type: ignore[no-any-return]
