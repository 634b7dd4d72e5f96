"""Learning rate and parameter groups."""

from __future__ import annotations

import pytest
from torch import nn

from gemma2.training.optimizer import learning_rate_at, make_optimizer
from gemma2.training.settings import OptimizerSettings

SETTINGS = OptimizerSettings(learning_rate=1.0, final_learning_rate_ratio=0.1, warmup_steps=4, weight_decay=0.3)


def test_warm_up_then_cosine() -> None:
    rates = [learning_rate_at(step, 14, SETTINGS) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down after 5 of 10 steps
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decaying, rest = make_optimizer(model, SETTINGS).param_groups
    assert decaying["weight_decay"] == 0.3 and [p.ndim for p in decaying["params"]] == [2]
    assert rest["weight_decay"] == 0.0 and {p.ndim for p in rest["params"]} == {1}


def test_what_is_frozen_is_not_trained() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.requires_grad_(False)
    (group,) = make_optimizer(model, SETTINGS).param_groups
    assert group["params"] == [model[1].weight]
