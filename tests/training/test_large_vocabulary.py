"""Trap 11 at 256,000 words: no objective builds the logits of more than a chunk of tokens, forward or backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_model import LargestTensor
from torch import Tensor

from gemma2.memory.training import loss_chunk_tokens
from gemma2.training.distillation import (
    Divergence,
    TeacherTopK,
    linear_divergence,
    most_probable,
    teacher_from_hidden,
)
from gemma2.training.linear_cross_entropy import linear_cross_entropy
from gemma2.training.linear_log_probs import linear_log_probs

NUM_TOKENS, WIDTH, VOCAB = 300, 4, 256_000

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, embedding, labels, cap=30.0)


def log_probs(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    return linear_log_probs(hidden, embedding, labels, cap=30.0).sum()


def divergence(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    teacher = teacher_from_hidden(hidden.roll(1), embedding, cap=30.0)
    return linear_divergence(hidden, embedding, labels, teacher, cap=30.0, divergence=Divergence(kind="jsd"))


def stored_divergence(hidden: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    teacher = teacher_from_hidden(hidden.roll(1), embedding, cap=30.0)
    words = most_probable(teacher, torch.arange(NUM_TOKENS), 8, vocab_size=VOCAB)
    stored = TeacherTopK(ids_TK=words[0], log_probs_TK=words[1], rest_T=words[2])
    return linear_divergence(hidden, embedding, labels, stored, cap=30.0, divergence=Divergence())


@pytest.mark.parametrize("loss", [cross_entropy, log_probs, divergence, stored_divergence])
def test_a_chunk_of_logits_is_the_most_there_is(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator).requires_grad_()
    embedding = torch.randn(VOCAB, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator)
    with LargestTensor(VOCAB) as largest:
        loss(hidden, embedding, labels).backward()  # type: ignore[no-untyped-call]
    assert 0 < largest.num_rows <= loss_chunk_tokens(VOCAB) < NUM_TOKENS
    assert hidden.grad is not None and embedding.grad is not None and embedding.grad.any()
