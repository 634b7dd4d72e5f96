"""Log-probabilities in chunks against the whole, in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from small_model import LargestTensor
from torch import Tensor

from gemma2.training.head_loss import IGNORE_INDEX
from gemma2.training.linear_log_probs import linear_log_probs

CAP = 3.0


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, dtype=torch.float64, generator=generator).requires_grad_()
    embedding = torch.randn(37, 8, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 37, (23,), generator=generator)
    labels[[0, 7, 22]] = IGNORE_INDEX
    weights = torch.randn(23, dtype=torch.float64, generator=generator)
    return hidden, embedding, labels, weights


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_equals_the_whole(cap: float | None, chunk_size: int, is_frozen: bool) -> None:
    hidden, embedding, labels, weights = inputs()
    logits = hidden @ embedding.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = torch.log_softmax(logits, dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0)
    expected_gradients = torch.autograd.grad(expected @ weights, [hidden, embedding])
    head = embedding.detach() if is_frozen else embedding
    log_probs = linear_log_probs(hidden, head, labels, cap=cap, chunk_size=chunk_size)
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    assert not log_probs[labels < 0].any()
    gradients = torch.autograd.grad(log_probs @ weights, [hidden] if is_frozen else [hidden, embedding])
    torch.testing.assert_close(gradients, expected_gradients[: len(gradients)], rtol=1e-10, atol=1e-12)


def test_only_labelled_tokens_are_multiplied() -> None:
    hidden, embedding, labels, _ = inputs()
    with LargestTensor(37) as largest:
        linear_log_probs(hidden, embedding, labels, cap=CAP, chunk_size=100).sum().backward()  # type: ignore[no-untyped-call]
    assert largest.num_rows == 20


def test_no_labels_give_zeros_and_no_gradient() -> None:
    hidden, embedding, labels, weights = inputs()
    log_probs = linear_log_probs(hidden, embedding, torch.full_like(labels, IGNORE_INDEX), cap=CAP)
    assert not log_probs.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(log_probs @ weights, [hidden, embedding]))


def test_bfloat16_stays_near() -> None:
    hidden, embedding, labels, weights = (tensor.detach() for tensor in inputs())
    hidden, embedding = hidden.bfloat16().requires_grad_(), embedding.bfloat16()
    log_probs = linear_log_probs(hidden, embedding, labels, cap=30.0)
    assert log_probs.dtype == torch.float32
    exact = linear_log_probs(hidden.double(), embedding.double(), labels, cap=30.0)
    assert (log_probs - exact).abs().max() < 0.05  # logits of size 8 move by 2⁻⁶ at most
    (gradient,) = torch.autograd.grad(log_probs @ weights.float(), [hidden])
    assert gradient.dtype == torch.bfloat16
