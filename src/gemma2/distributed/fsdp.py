"""Weights shared among the processes of the axis "data" (FSDP2, `torch.distributed.fsdp.fully_shard`).

Each process holds a part of every matrix, with its gradient and its moments. A layer's matrices are put together before
the layer runs, forward and backward, and let go after it; its gradients are summed and cut up again. The embedding,
which begins and ends a pass, is put together once around both.

Norms are left out: all of them together are a few megabytes, they stay float32 where matrices are gathered as bf16, and
each process holds them whole. `gradients` sums their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from torch import nn

from gemma2.distributed.ranks import DATA, Ranks
from gemma2.model.modeling import Gemma2ForCausalLM, Gemma2RMSNorm

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

P = ParamSpec("P")
R = TypeVar("R")


def share_weights(model: Gemma2ForCausalLM, ranks: Ranks, *, gather_dtype: torch.dtype | None) -> GatheredModel:
    """Cuts a model's matrices among the processes of the axis "data", in place.

    Args:
        model: usually on "meta", so that no process ever holds all of it; adapters, tensor parallelism and activation
            checkpointing were applied before.
        ranks: the processes.
        gather_dtype: in which dtype layers are put together; None for that of their weights. bfloat16 halves what
            travels where float32 weights are multiplied in bf16 anyway; gradients are summed in float32.

    Returns:
        What the model must be run through, so that the embedding is there.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    gathered = GatheredModel(model)
    if ranks.data == 1:
        return gathered
    assert ranks.mesh is not None
    mesh = ranks.mesh[DATA]
    norms = {module.weight for module in model.modules() if isinstance(module, Gemma2RMSNorm)}
    policy = MixedPrecisionPolicy(
        param_dtype=gather_dtype, reduce_dtype=torch.float32 if gather_dtype else None, cast_forward_inputs=False
    )
    for layer in model.model.layers:
        _sum_gradients(fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=norms))
    _sum_gradients(fully_shard(gathered, mesh=mesh, ignored_params=norms))
    gathered.is_shared = True
    return gathered


class GatheredModel(nn.Module):
    """A model whose embedding is whole while a function of it runs, and until the function's backward pass is done."""

    def __init__(self, model: Gemma2ForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.is_shared = False
        """Whether FSDP stands around it."""

    def forward(self, function: Callable[[], Any]) -> Any:
        """Calls the function; FSDP's hooks stand around this call."""
        return function()

    def around(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, with the embedding whole while it runs."""

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            result: R = self(lambda: function(*args, **kwargs))
            if self.is_shared and not getattr(result, "requires_grad", False):
                cast("FSDPModule", self).reshard()  # what a backward pass would do
            return result

        return run


def _sum_gradients(module: FSDPModule) -> None:
    """Sums gradients, where FSDP would take their mean: the loop has divided by all labels already."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
