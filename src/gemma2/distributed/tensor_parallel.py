"""Matrix products shared among the processes of the axis "tensor" (DTensor, `parallelize_module`).

Every process of a row of the grid sees the same tokens, and has some of the heads, some of the MLP's inner units and
some of the words:

    q, k, v, gate, up      rows of the matrix: each process computes its heads, its units
    o, down                columns: each computes a part of the sum, which is then added up
    embedding              rows: each looks up the words that it has; the others' are zero, and are added up
    head                   the same rows: each computes its words' logits; see `VocabularyPart`
    norms, residual        whole in each process

So a layer adds up twice in the forward pass and twice in the backward pass; more often with adapters. LoRA follows its
map: where the map is cut by rows, so is B, and A is whole; where it is cut by columns, so is A, and B is whole.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.config import Gemma2Config
from gemma2.distributed.ranks import TENSOR, Ranks
from gemma2.errors import ConfigError
from gemma2.memory.training import uneven_sizes
from gemma2.model.modeling import Gemma2ForCausalLM

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BY_ROWS: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_BY_COLUMNS: Final = ("self_attn.o_proj", "mlp.down_proj")


def check_split(config: Gemma2Config, tensor: int) -> None:
    """Checks that an architecture can be cut into `tensor` parts.

    Raises:
        ConfigError: heads, units of the MLP or words do not divide evenly.
    """
    if uneven := uneven_sizes(config, tensor):
        raise ConfigError(
            f"parallel.tensor is {tensor}, which must divide the model evenly, but it has {' and '.join(uneven)}; "
            "lower it, and let parallel.data take the other processes"
        )


def split_products(model: Gemma2ForCausalLM, ranks: Ranks) -> None:
    """Cuts a model's matrices among the processes of the axis "tensor", in place.

    Args:
        model: with adapters, if it is to have any; usually on "meta". Where it has weights, they must be the same in
            all processes.
        ranks: the processes.

    Raises:
        ConfigError: see `check_split`.
    """
    if ranks.tensor == 1:
        return
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    check_split(model.config, ranks.tensor)
    assert ranks.mesh is not None
    mesh = ranks.mesh[TENSOR]
    own_config = model.config.replace(
        num_attention_heads=model.config.num_attention_heads // ranks.tensor,
        num_key_value_heads=model.config.num_key_value_heads // ranks.tensor,
    )
    for layer in model.model.layers:
        parallelize_module(layer, mesh, _layer_plan(layer), src_data_rank=None)
        layer.self_attn.config = own_config  # type: ignore[union-attr]
    embedding = model.model.embed_tokens
    embedding.weight = nn.Parameter(
        distribute_tensor(embedding.weight, mesh, [Shard(0)], src_data_rank=None),
        requires_grad=embedding.weight.requires_grad,
    )
    embedding.forward = functools.partial(_embed, embedding)
    model.lm_head.weight = embedding.weight


def _layer_plan(layer: nn.Module) -> dict[str, Any]:
    """`parallelize_module`'s plan of a layer, whose maps may have adapters."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

    plan: dict[str, Any] = {}
    for block, num_inputs in (("self_attn", 3), ("mlp", 1)):
        maps = [layer.get_submodule(name) for name in _BY_ROWS if name.startswith(block)]
        if all(isinstance(module, nn.Linear) for module in maps):
            # The maps then share one input, whose gradient is added up once and not for each of them.
            layouts = (Replicate(), *[None] * (num_inputs - 1))
            plan[block] = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
    for names, style in ((_BY_ROWS, ColwiseParallel), (_BY_COLUMNS, RowwiseParallel)):
        for name in names:
            module = layer.get_submodule(name)
            if isinstance(module, nn.Linear):
                plan[name] = style()
                continue
            plan[f"{name}.base_layer"] = style()
            cut, whole = ("lora_B", "lora_A") if style is ColwiseParallel else ("lora_A", "lora_B")
            for adapter in module.get_submodule("lora_A")._modules:
                plan[f"{name}.{cut}.{adapter}"] = style()
                plan[f"{name}.{whole}.{adapter}"] = _whole_style()
    return plan


def _whole_style() -> Any:
    """The style of a map that every process computes whole, though its weight is a DTensor like its neighbours'."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import ParallelStyle

    def take_in(_module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)

    def give_out(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
        return output.to_local()

    class Whole(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            return distribute_module(
                module,
                device_mesh,
                None,
                take_in,
                give_out,
            )

    return Whole()


# -- the embedding and the head -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """The words that this process has of the embedding, and the processes that have the others."""

    first: int
    """The id of the first of them."""
    group: ProcessGroup

    def add(self, values: Tensor) -> None:
        """Replaces values by their sum over the processes."""
        torch.distributed.all_reduce(values, group=self.group)

    def raise_to_highest(self, values: Tensor) -> None:
        """Replaces values by their maximum over the processes."""
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=self.group)


def own_rows(embedding_VD: Tensor) -> tuple[Tensor, VocabularyPart | None]:
    """The rows of an embedding that this process has, differentiable, and which they are; None if it has all."""
    if not _is_split(embedding_VD):
        return embedding_VD, None
    mesh = embedding_VD.device_mesh  # type: ignore[attr-defined]
    rows: Tensor = embedding_VD.to_local()  # type: ignore[attr-defined]
    return rows, VocabularyPart(first=mesh.get_local_rank() * rows.shape[0], group=mesh.get_group())


def all_rows(embedding_VD: Tensor) -> Tensor:
    """The whole embedding, differentiable, put together from the parts that the processes have.

    For losses that need all logits of a token in one process; each process of a row then computes the same.
    """
    if not _is_split(embedding_VD):
        return embedding_VD
    whole: Tensor = embedding_VD.full_tensor()  # type: ignore[attr-defined]
    return whole


def _is_split(tensor: Tensor) -> bool:
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "full_tensor")


def _embed(module: nn.Embedding, input_ids_BL: Tensor) -> Tensor:
    """nn.Embedding.forward where each process has some of the rows.

    Not DTensor's own, which takes `padding_idx` for the place in each process's rows: the gradient of an ordinary word
    would be lost.
    """
    rows, part = own_rows(module.weight)
    assert part is not None
    places_BL = input_ids_BL - part.first
    elsewhere_BL = (places_BL < 0) | (places_BL >= rows.shape[0])
    padding = None if module.padding_idx is None else module.padding_idx - part.first
    found_BLD = F.embedding(
        places_BL.masked_fill(elsewhere_BL, 0),
        rows,
        padding_idx=padding if padding is not None and 0 <= padding < rows.shape[0] else None,
    )
    found_BLD = found_BLD.masked_fill(elsewhere_BL[..., None], 0.0)
    result: Tensor = _AddUp.apply(found_BLD, part)  # type: ignore[no-untyped-call]
    return result


class _AddUp(torch.autograd.Function):
    """The sum over the processes of a row; all of them then do the same with it, so each has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, part: VocabularyPart) -> Tensor:
        total = values.clone()
        part.add(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
