"""The loss over a large vocabulary without its logits: head, final cap, softmax and cross-entropy, a chunk at a time.

    logits = cap · tanh(h Eᵀ / cap)          loss = Σ over targets of (logsumexp(logits) - logits[target])

The logits of 8192 tokens over 256,000 words are 7.8 GiB in float32, so they never exist as one tensor, forward or
backward: each chunk's gradient, (softmax - one-hot) · (1 - (logit / cap)²), is formed while its logits are at hand
and goes straight into the gradients of the hidden states and of the embedding. The backward pass only scales them.
A loss that forgets the final cap trains another model than the one that is run.

Axes: T tokens, D width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma2.memory import loss_chunk_tokens

IGNORE_INDEX = -100
"""A label that is not trained on, as in PyTorch and Hugging Face."""


def linear_cross_entropy(
    hidden_TD: Tensor,
    embedding_VD: Tensor,
    labels_T: Tensor,
    *,
    cap: float | None,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """Sum of the cross-entropies of next tokens, differentiable in the hidden states and the embedding.

    Args:
        hidden_TD: (T, D) hidden states after the last norm.
        embedding_VD: (V, D) tied embedding, which is the head.
        labels_T: (T,) int64 next tokens; `IGNORE_INDEX` where none is trained on.
        cap: the final soft cap, or None.
        compute_dtype: dtype of the matrix products; None for that of `hidden_TD`. Losses are summed in float32
            (float64 for float64 inputs).
        chunk_size: tokens whose logits exist at a time; `loss_chunk_tokens` of the vocabulary if left out. Memory is a
            few times their logits in float32.
        compiled: whether `torch.compile` fuses the passes over a chunk (needs a C++ compiler on the CPU).

    Returns:
        () the sum, in nats. Divide by the number of labels for the mean.
    """
    size = loss_chunk_tokens(embedding_VD.shape[0]) if chunk_size is None else chunk_size
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD,
        embedding_VD,
        labels_T,
        cap,
        compute_dtype or hidden_TD.dtype,
        size,
        compiled,
        torch.is_grad_enabled(),
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embedding_VD: Tensor,
        labels_T: Tensor,
        cap: float | None,
        compute_dtype: torch.dtype,
        chunk_size: int,
        compiled: bool,
        is_grad_enabled: bool,
    ) -> Tensor:
        # needs_input_grad alone says yes for any parameter, under no_grad too.
        needs_hidden, needs_embedding = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        hidden_grad = torch.zeros_like(hidden_TD) if needs_hidden else None
        embedding_grad = torch.zeros_like(embedding_VD, dtype=wide) if needs_embedding else None
        embedding = embedding_VD.to(compute_dtype)
        chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
        for first in range(0, hidden_TD.shape[0], chunk_size):
            rows = slice(first, first + chunk_size)
            hidden = hidden_TD[rows].to(compute_dtype)
            loss, gradient_CV = chunk_loss(hidden @ embedding.t(), labels_T[rows], cap)
            total += loss
            if hidden_grad is not None:
                hidden_grad[rows] = gradient_CV @ embedding
            if embedding_grad is not None:
                embedding_grad += gradient_CV.t() @ hidden
        ctx.save_for_backward(hidden_grad, embedding_grad)
        ctx.embedding_dtype = embedding_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, embedding_grad = ctx.saved_tensors
        (scale,) = grad_outputs
        if hidden_grad is not None:
            hidden_grad = hidden_grad * scale.to(hidden_grad.dtype)
        if embedding_grad is not None:
            embedding_grad = (embedding_grad * scale).to(ctx.embedding_dtype)
        return hidden_grad, embedding_grad, None, None, None, None, None, None


def _chunk_loss(logits_CV: Tensor, labels_C: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, and its gradient in the logits before the cap, in their dtype."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    trained_C1 = (labels_C != IGNORE_INDEX)[:, None]
    targets_C1 = labels_C.clamp(min=0)[:, None]
    capped_CV = logits_CV.to(wide)
    if cap is not None:
        capped_CV = torch.tanh(capped_CV / cap) * cap
    log_normalizer_C1 = torch.logsumexp(capped_CV, dim=1, keepdim=True)
    loss = ((log_normalizer_C1 - capped_CV.gather(1, targets_C1)) * trained_C1).sum()
    gradient_CV = torch.exp(capped_CV - log_normalizer_C1)
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C1
    gradient_CV = gradient_CV - is_target_CV.to(wide)
    if cap is not None:
        gradient_CV = gradient_CV * (1.0 - (capped_CV / cap).square())  # d tanh = 1 - tanh²
    return loss, (gradient_CV * trained_C1).to(logits_CV.dtype)


@functools.cache
def _compiled_chunk_loss() -> Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]:
    compiled: Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]] = torch.compile(_chunk_loss)
    return compiled
