"""AdamW or Muon, and the learning rate over a run.

Muon (Jordan et al. 2024; arXiv 2502.16982) takes the momentum of a matrix, makes all its singular values about equal by
five steps of a Newton-Schulz iteration, and moves the matrix along the result. So rare directions move as fast as
common ones. Its steps are scaled to the size of AdamW's, so that one learning rate serves both. The embedding, whose
rows are words, and norms are left to AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.errors import ConfigError
from gemma2.training.settings import OptimizerSettings


class MuonAndAdamW:
    """Two optimizers that are used like one."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer | None) -> None:
        self._parts = {"muon": muon} if adamw is None else {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return [group for part in self._parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Moves every parameter that has a gradient."""
        for part in self._parts.values():
            part.step()

    def zero_grad(self, *, set_to_none: bool) -> None:
        """Forgets all gradients."""
        for part in self._parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by its name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def check_optimizer(settings: OptimizerSettings, world_size: int) -> None:
    """Checks that an optimizer can be had here.

    Raises:
        ConfigError: Muon with several processes, or with a PyTorch that lacks it.
    """
    if settings.kind != "muon":
        return
    if world_size > 1:
        raise ConfigError(
            f"optimizer.kind is muon, whose steps need whole matrices in one process, but there are {world_size} "
            "processes; set it to adamw"
        )
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer.kind is muon, which PyTorch {torch.__version__} lacks; use 2.9 or newer, or set it to adamw"
        )


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW | MuonAndAdamW:
    """The optimizer of the parameters that are trained; weight decay on matrices, none on norms.

    Args:
        model: with `requires_grad` set on what is trained.
        settings: for which `check_optimizer` was asked.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    by_muon = [p for name, p in trained if settings.kind == "muon" and p.ndim == 2 and "embed_tokens" not in name]
    taken = {id(parameter) for parameter in by_muon}
    rest = [parameter for _, parameter in trained if id(parameter) not in taken]
    adamw = _adamw(rest, settings) if rest else None
    if not by_muon:
        assert adamw is not None
        return adamw
    muon = torch.optim.Muon(
        by_muon,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, adamw)


def _adamw(parameters: Sequence[Tensor], settings: OptimizerSettings) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def learning_rate_at(step: int, num_steps: int, settings: OptimizerSettings) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then half a cosine down to its final ratio."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    decay_steps = max(1, num_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps + 1) / decay_steps)
    ratio = settings.final_learning_rate_ratio
    return settings.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def begin_moments(optimizer: torch.optim.AdamW, saved: Mapping[str, Any]) -> None:
    """Gives every parameter moments, all zero, to be filled, and the count of steps that is saved for it.

    Args:
        optimizer: new.
        saved: the `state_dict` of one over the same parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        parameter = parameters[index]
        optimizer.state[parameter] = {
            "step": values["step"].to(parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
