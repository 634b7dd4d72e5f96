"""AdamW and its learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gemma2.training.settings import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained; weight decay on matrices, none on norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
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
