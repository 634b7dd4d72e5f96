"""Every objective against the same one written plainly on transformers' logits: value and gradients in float64.

Both caps bite (scores and logits pass them several times over), the window is shorter than the documents, and three or
four documents share a row, while transformers runs each alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hf_reference import float64_casts
from small_model import batch_of, packed_row, reference_logits, small_model
from torch import Tensor
from torch.nn import functional as F

from gemma2.data import PackedBatch
from gemma2.training import distillation, linear_cross_entropy, linear_log_probs
from gemma2.training.distillation import Divergence, distillation_objective, torch_teacher
from gemma2.training.objectives import Objective, next_token_objective
from gemma2.training.preference import model_reference, preference_objective

PlainLoss = Callable[[Tensor, PackedBatch], Tensor]
F64 = torch.float64


def row() -> PackedBatch:
    """Two pairs of answers after prompts, of which nothing is learned, and padding."""
    packed = packed_row(9, 11, 8, 7, padding=3)
    packed.labels[0, [0, 1, 2, 9, 10, 11, 20, 28]] = -100
    return packed


def worst_difference(objective: Objective, plain: PlainLoss, packed: PackedBatch) -> float:
    """Of loss and gradients, relative to the largest entry of each."""
    model = small_model()
    loss = objective(model, batch_of(packed))
    loss.backward()  # type: ignore[no-untyped-call]
    with float64_casts():
        logits, parameters = reference_logits(model, packed)
        expected = plain(logits, packed)
        expected.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == F64
    worst = abs(loss.item() / expected.item() - 1)
    for name, parameter in model.named_parameters():
        theirs = parameters[name].grad
        assert parameter.grad is not None and theirs is not None and theirs.any()
        worst = max(worst, float((parameter.grad - theirs).abs().max() / theirs.abs().max()))
    return worst


# -- the same objectives, written plainly ---------------------------------------------------------------------------


def next_token(logits: Tensor, packed: PackedBatch) -> Tensor:
    return F.cross_entropy(logits, torch.from_numpy(packed.labels[0]), reduction="sum")


def preference(loss_type: str, beta: float, epsilon: float) -> PlainLoss:
    def loss(logits: Tensor, packed: PackedBatch) -> Tensor:
        with torch.no_grad():
            reference, _ = reference_logits(small_model(seed=1), packed)
        sums = []
        for values in (logits, reference):
            log_probs = torch.log_softmax(values, dim=1)
            for segment in (1, 2, 3, 4):
                places = (packed.segment_ids[0] == segment) & (packed.labels[0] != -100)
                answer = log_probs[places, packed.labels[0][places]]
                sums.append(answer.mean() if loss_type == "ipo" else answer.sum())
        total = torch.zeros((), dtype=F64)
        for chosen, rejected in ((0, 1), (2, 3)):
            margin = sums[chosen] - sums[rejected] - sums[4 + chosen] + sums[4 + rejected]
            probability = torch.sigmoid(beta * margin)
            if loss_type == "sigmoid":
                total = total - (1 - epsilon) * probability.log() - epsilon * (1 - probability).log()
            elif loss_type == "robust":
                right, wrong = -(1 - epsilon) * probability.log(), -epsilon * (1 - probability).log()
                total = total + (right - wrong) / (1 - 2 * epsilon)
            elif loss_type == "hinge":
                total = total + torch.clamp(1 - beta * margin, min=0)
            else:
                total = total + (margin - 1 / (2 * beta)) ** 2
        return total

    return loss


def distilled(divergence: Divergence) -> PlainLoss:
    def loss(logits: Tensor, packed: PackedBatch) -> Tensor:
        with torch.no_grad():
            teacher, _ = reference_logits(small_model(seed=1), packed)
        labels = torch.from_numpy(packed.labels[0])
        rows = labels != -100
        temperature, beta, alpha = divergence.temperature, divergence.beta, divergence.hard_label_weight
        p, q = torch.softmax(teacher[rows] / temperature, dim=1), torch.softmax(logits[rows] / temperature, dim=1)
        middle = beta * p + (1 - beta) * q
        if divergence.kind == "forward_kl":
            soft = (p * (p / q).log()).sum()
        elif divergence.kind == "reverse_kl":
            soft = (q * (q / p).log()).sum()
        else:
            soft = beta * (p * (p / middle).log()).sum() + (1 - beta) * (q * (q / middle).log()).sum()
        return (1 - alpha) * temperature**2 * soft + alpha * next_token(logits, packed)

    return loss


# -- the comparisons ------------------------------------------------------------------------------------------------


def preference_case(loss_type: str, epsilon: float = 0.0) -> tuple[Objective, PlainLoss]:
    beta = 0.02 if loss_type == "hinge" else 0.3
    objective = preference_objective(
        reference=model_reference(small_model(seed=1), compute_dtype=F64),
        beta=beta,
        loss_type=loss_type,  # type: ignore[arg-type]
        label_smoothing=epsilon,
        compute_dtype=F64,
    )
    return objective, preference(loss_type, beta, epsilon)


def distillation_case(divergence: Divergence) -> tuple[Objective, PlainLoss]:
    teacher = torch_teacher(small_model(seed=1), compute_dtype=F64)
    return distillation_objective(teacher=teacher, divergence=divergence, compute_dtype=F64), distilled(divergence)


CASES: dict[str, Callable[[], tuple[Objective, PlainLoss]]] = {
    "next token": lambda: (next_token_objective(compute_dtype=F64, compiled=False), next_token),
    "sigmoid": lambda: preference_case("sigmoid"),
    "sigmoid, some labels wrong": lambda: preference_case("sigmoid", 0.2),
    "robust": lambda: preference_case("robust", 0.2),
    "hinge": lambda: preference_case("hinge"),
    "ipo": lambda: preference_case("ipo"),
    "forward KL": lambda: distillation_case(Divergence()),
    "forward KL, warm": lambda: distillation_case(Divergence(temperature=2.5)),
    "forward KL and labels": lambda: distillation_case(Divergence(temperature=2.0, hard_label_weight=0.3)),
    "reverse KL": lambda: distillation_case(Divergence(kind="reverse_kl", temperature=0.7)),
    "jsd": lambda: distillation_case(Divergence(kind="jsd", beta=0.3)),
    "jsd, warm, and labels": lambda: distillation_case(
        Divergence(kind="jsd", beta=0.9, temperature=1.5, hard_label_weight=0.5)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name: str) -> None:
    objective, plain = CASES[name]()
    assert worst_difference(objective, plain, row()) < 1e-10


@pytest.mark.parametrize("name", ["next token", "sigmoid", "forward KL"])
def test_a_loss_without_the_final_cap_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear_cross_entropy, linear_log_probs, distillation):
        monkeypatch.setattr(module, "widen_and_cap", lambda logits, cap: (logits, None))
    objective, plain = CASES[name]()
    assert worst_difference(objective, plain, row()) > 0.1
