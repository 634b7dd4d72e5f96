"""Which part of a tensor this process holds; filling the parts, and putting tensors together again."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from gemma2.checkpoints import Checkpoint, LazyTensor
from gemma2.distributed.ranks import DATA, TENSOR
from gemma2.model.modeling import Gemma2ForCausalLM, Gemma2RMSNorm

Region = tuple[slice, ...]
"""A slice for each axis of a tensor."""


def own_region(tensor: Tensor) -> Region:
    """The part of a whole tensor that this process holds; all of one that is no DTensor."""
    bounds = [(0, size) for size in tensor.shape]
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tuple(slice(*bound) for bound in bounds)
    # Tensor parallelism cuts first; FSDP cuts what it left.
    for axis in (TENSOR, DATA):
        if axis not in mesh.mesh_dim_names:
            continue
        placement = tensor.placements[mesh.mesh_dim_names.index(axis)]  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        first, last = bounds[placement.dim]
        size = -(-(last - first) // mesh[axis].size())  # as torch.chunk: the last parts may be smaller, or empty
        first = min(last, first + mesh[axis].get_local_rank() * size)
        bounds[placement.dim] = (first, min(last, first + size))
    return tuple(slice(*bound) for bound in bounds)


def own_part(tensor: Tensor) -> Tensor:
    """The values that this process holds, sharing their memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """All values, put together from all processes; all of them must ask. Not differentiable."""
    if not hasattr(tensor, "full_tensor"):
        return tensor.detach()
    from torch.distributed.tensor import Replicate

    # What FSDP cut first, as tensor parallelism cut before it.
    placements = list(tensor.placements)  # type: ignore[attr-defined]
    for axis in (DATA, TENSOR):
        if axis in tensor.device_mesh.mesh_dim_names:  # type: ignore[attr-defined]
            placements[tensor.device_mesh.mesh_dim_names.index(axis)] = Replicate()  # type: ignore[attr-defined]
            tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    whole: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return whole.detach()


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor | LazyTensor]) -> None:
    """Writes this process's part of whole values into parameters.

    Args:
        parameters: name → parameter.
        values: name → value of each of them, the same in all processes. Of a tensor on disk only the part is read.
    """
    for name, parameter in parameters.items():
        region, part = own_region(parameter), own_part(parameter)
        value = values[name]
        piece = _read(value, region) if isinstance(value, LazyTensor) else value[region]
        assert piece.shape == part.shape, (name, piece.shape, part.shape)
        part.copy_(piece)


def fill_from_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Writes this process's part of a checkpoint into a model; adapters are left as they are."""
    parameters = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    fill(parameters, checkpoint.tensors)


def _read(tensor: LazyTensor, region: Region) -> Tensor:
    piece = np.array(tensor.numpy()[region])  # a copy: PyTorch warns of memory that may not be written to
    if piece.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(piece.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(piece)


@torch.no_grad()
def initialize(model: Gemma2ForCausalLM, generator: torch.Generator) -> None:
    """`Gemma2ForCausalLM.initialize` with the same values: each process draws every matrix and keeps its part."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module is not model.lm_head:
            whole = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=generator.device)
            whole.normal_(0.0, model.config.initializer_range, generator=generator)
            own_part(module.weight).copy_(whole[own_region(module.weight)])
        elif isinstance(module, Gemma2RMSNorm):
            own_part(module.weight).zero_()
