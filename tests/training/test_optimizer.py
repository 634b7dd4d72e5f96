"""Learning rate and parameter groups."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gemma2.errors import ConfigError
from gemma2.training.optimizer import MuonAndAdamW, check_optimizer, learning_rate_at, make_optimizer
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


def a_step_with_muon(seed: int) -> tuple[nn.ModuleDict, MuonAndAdamW]:
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(6, 8), "wide": nn.Linear(8, 16, bias=False), "norm": nn.LayerNorm(8)}
    )
    optimizer = make_optimizer(model, SETTINGS.model_copy(update={"kind": "muon", "weight_decay": 0.0}))
    assert isinstance(optimizer, MuonAndAdamW)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, optimizer


def test_muon_moves_matrices_of_layers_by_orthogonal_steps_and_adamw_all_else() -> None:
    model, optimizer = a_step_with_muon(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    singular = torch.linalg.svdvals(moved["wide.weight"])
    assert singular.max() / singular.min() < 2  # those of the gradient are farther apart
    assert (
        torch.linalg.svdvals(model["wide"].weight.grad).max()
        > 2.5 * torch.linalg.svdvals(model["wide"].weight.grad).min()
    )
    assert moved["wide.weight"].square().mean().sqrt() == pytest.approx(0.2, rel=0.25)  # of AdamW's usual step
    for name in ("embed_tokens.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(moved[name].abs(), torch.ones_like(moved[name]), rtol=1e-3, atol=0)


def test_muon_goes_on_from_a_saved_state() -> None:
    model, optimizer = a_step_with_muon(0)
    optimizer.step()
    other, again = a_step_with_muon(1)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        mine.grad = torch.ones_like(mine)
        its.grad = torch.ones_like(its)
    optimizer.step()
    again.step()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_muon_is_for_one_process() -> None:
    check_optimizer(SETTINGS.model_copy(update={"kind": "muon"}), 1)
    with pytest.raises(ConfigError, match=r"optimizer.kind is muon, .*there are 2 processes; set it to adamw"):
        check_optimizer(SETTINGS.model_copy(update={"kind": "muon"}), 2)
