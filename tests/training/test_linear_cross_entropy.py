"""The chunked loss against the whole one, in float64: value and gradients, with the cap and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.training.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy

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


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, embedding, labels = _inputs()
    loss = linear_cross_entropy(hidden, embedding.detach(), labels, cap=CAP)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert embedding.grad is None


def test_no_tensor_of_tokens_by_vocabulary_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 11: neither forward nor backward may hold the logits of all tokens."""
    num_tokens, vocab_size = 512, 2048
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    embedding = torch.randn(vocab_size, 4, requires_grad=True)
    labels = torch.randint(0, vocab_size, (num_tokens,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, embedding, labels, cap=30.0, chunk_size=16).backward()
    largest = max(event.self_cpu_memory_usage / max(1, event.count) for event in profile.key_averages())
    assert largest < num_tokens * vocab_size * 4 / 4


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
