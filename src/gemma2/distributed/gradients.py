"""Gradients over many processes: those that FSDP does not sum, and the norm of all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gemma2.distributed.placement import own_part
from gemma2.distributed.ranks import DATA, TENSOR, Ranks


@torch.no_grad()
def sum_whole_gradients(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """Sums the gradients of parameters that every process holds whole, in one message.

    Args:
        parameters: all that are trained; DTensors among them are left alone, since FSDP has summed theirs.
        ranks: the processes. Those that see the same rows have the same gradients up to rounding, and get their mean,
            so that the parameters stay the same bits everywhere.
    """
    whole = [parameter for parameter in parameters if not hasattr(parameter, "to_local")]
    if ranks.world_size == 1 or not whole:
        return
    for parameter in whole:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in whole])  # type: ignore[union-attr]
    torch.distributed.all_reduce(flat)
    flat /= ranks.tensor
    for parameter, gradient in zip(whole, torch.split(flat, [p.numel() for p in whole]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))  # type: ignore[union-attr]


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], max_norm: float | None, ranks: Ranks) -> Tensor:
    """Scales all gradients down so that their norm over all processes is at most `max_norm`, and returns what it was.

    Args:
        parameters: all that are trained.
        max_norm: None to leave them as they are.
        ranks: the processes.
    """
    limit = math.inf if max_norm is None else max_norm
    if ranks.world_size == 1:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = torch.zeros((), device=ranks.device)
    for gradient in gradients:
        square = torch.linalg.vector_norm(own_part(gradient)).square()
        squares += square / _num_copies(gradient, ranks)
    torch.distributed.all_reduce(squares)
    norm = squares.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)
    return norm


def _num_copies(tensor: Tensor, ranks: Ranks) -> int:
    """In how many processes each value of a tensor is."""
    copies = {DATA: ranks.data, TENSOR: ranks.tensor}
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        for axis, placement in zip(mesh.mesh_dim_names, tensor.placements, strict=True):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                copies[axis] = 1
    return math.prod(copies.values())
