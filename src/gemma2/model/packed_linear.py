"""Linear maps whose bf16 weights lie in the order in which the processor's products read them.

For one token, PyTorch's bf16 product rearranges the whole matrix on its way, every time, and that takes longer than
reading it. oneDNN, which computes the product, also takes matrices that were rearranged once and for all. The sums are
the same ones. `benchmarks/compare_transformers.py --no-pack` shows the difference.

The operations are PyTorch's own, though without documentation; `torch.compile` uses them in the same way. Where they
are missing, or answer otherwise than expected, nothing is packed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.model.modeling import Gemma2ForCausalLM


class PackedLinear(nn.Module):
    """A linear map without bias, for inference only: what it holds is no parameter, and cannot be moved or saved.

    Args:
        linear: a map with a bf16 weight on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return result

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias=False"


def pack_linear_layers(model: Gemma2ForCausalLM) -> bool:
    """Replaces the linear maps of all layers by packed ones, each matrix freed as its successor is made.

    The head stays as it is: it is the embedding, whose rows are looked up. The model can then only be run: it can no
    longer be trained, saved or moved to another device.

    Args:
        model: any; it is left alone unless it is bf16 on a CPU whose PyTorch can do this.

    Returns:
        Whether the maps were packed.
    """
    weight: Tensor = model.model.embed_tokens.weight
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not _can_pack():
        return False
    for module in model.model.layers.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return True


@cache
def _can_pack() -> bool:
    """Whether a small product through these operations gives what the ordinary one does."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 3, 96), (80, 96)))
    linear = nn.Linear(96, 80, bias=False, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight)
    with torch.inference_mode():
        try:
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            packed: Tensor = PackedLinear(linear)(x)
        except (AttributeError, RuntimeError, NotImplementedError, TypeError):
            return False
        expected = F.linear(x.double(), weight.double())
        return packed.shape == expected.shape and bool(
            torch.allclose(packed.double(), expected, rtol=2**-7, atol=2**-4)
        )
