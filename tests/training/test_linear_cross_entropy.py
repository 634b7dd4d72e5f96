"""The chunked loss against the whole one, in float64: value and gradients, with the cap and without."""

from __future__ import annotations

import pytest
import torch
from small_model import LargestTensor
from torch import Tensor
from torch.nn import functional as F

from gemma2.training.head_loss import IGNORE_INDEX
from gemma2.training.linear_cross_entropy import linear_cross_entropy

CAP = 3.0  # low, so that logits of a few units saturate it


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, dtype=dtype, generator=generator).requires_grad_()
    embedding = torch.randn(37, 8, dtype=dtype, generator=generator).requires_grad_()
    labels = torch.randint(0, 37, (23,), generator=generator)
    labels[[0, 7, 22]] = IGNORE_INDEX
    return hidden, embedding, labels


def _whole(hidden: Tensor, embedding: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    logits = hidden @ embedding.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 10**9])
def test_equals_the_whole_loss_and_its_gradients(cap: float | None, chunk_size: int) -> None:
    hidden, embedding, labels = _inputs()
    expected = _whole(hidden, embedding, labels, cap)
    expected_gradients = torch.autograd.grad(expected * 0.7, [hidden, embedding])
    loss = linear_cross_entropy(hidden, embedding, labels, cap=cap, chunk_size=chunk_size)
    gradients = torch.autograd.grad(loss * 0.7, [hidden, embedding])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


def test_the_cap_is_in_loss_and_gradient() -> None:
    hidden, embedding, labels = _inputs()
    capped = linear_cross_entropy(hidden, embedding, labels, cap=CAP)
    uncapped = linear_cross_entropy(hidden, embedding, labels, cap=None)
    assert abs(capped.item() - uncapped.item()) > 1.0
    (gradient,) = torch.autograd.grad(capped, [hidden])
    (without,) = torch.autograd.grad(uncapped, [hidden])
    assert (gradient - without).abs().max() > 0.1


def test_ignored_labels_give_no_loss_and_no_gradient() -> None:
    hidden, embedding, labels = _inputs()
    loss = linear_cross_entropy(hidden, embedding, torch.full_like(labels, IGNORE_INDEX), cap=CAP)
    gradients = torch.autograd.grad(loss, [hidden, embedding])
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients)


def test_ignored_tokens_are_not_multiplied() -> None:
    hidden, embedding, labels = _inputs()
    labels[5:20] = IGNORE_INDEX
    with LargestTensor(37) as largest:
        linear_cross_entropy(hidden, embedding, labels, cap=CAP, chunk_size=100).backward()  # type: ignore[no-untyped-call]
    assert largest.num_rows == (labels != IGNORE_INDEX).sum() == 6


def test_a_frozen_embedding_gets_no_gradient_and_none_is_formed() -> None:
    hidden, embedding, labels = _inputs()
    frozen = embedding.detach()
    with LargestTensor(8) as largest:  # the width of hidden states and of the embedding
        linear_cross_entropy(hidden, frozen, labels, cap=CAP).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert largest.num_rows == len(labels)


def test_bfloat16_products_stay_near_float32() -> None:
    hidden, embedding, labels = _inputs(torch.float32)
    exact = linear_cross_entropy(hidden, embedding, labels, cap=30.0)
    rounded = linear_cross_entropy(hidden, embedding, labels, cap=30.0, compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    # A logit of size 10 moves by at most 2⁻⁸ of itself.
    assert abs(rounded.item() - exact.item()) / 20 < 0.05


def test_measuring_computes_no_gradient() -> None:
    hidden, embedding, labels = _inputs()
    embedding_parameter = torch.nn.Parameter(embedding.detach())
    with torch.no_grad(), torch.profiler.profile() as profile:
        linear_cross_entropy(hidden, embedding_parameter, labels, cap=CAP, chunk_size=100)
    products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    assert products == 1, "the logits, and nothing for a gradient"
