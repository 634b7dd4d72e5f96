"""Log-probabilities of given next tokens over a large vocabulary, without the logits.

    logits = cap · tanh(h Eᵀ / cap)          log p = logits[label] - logsumexp(logits)

What a loss does with them is not known yet, so that each has a gradient of its own: (one-hot - softmax) ·
(1 - (logit / cap)²) · E in its hidden state, which is as wide as the hidden state and is formed while the logits are at
hand; the backward pass scales it. Only a trained embedding, whose gradient sums over tokens, has the logits computed
again in the backward pass, chunk by chunk.

Axes: T tokens, N of them with a label, D width, V vocabulary, C tokens of one chunk, R tokens of one block of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gemma2.training.head_loss import (
    Head,
    add_product,
    blocks,
    chunk_tokens,
    in_dtype,
    logit_chunks,
    to_hidden,
    trained_places,
    wide_dtype,
    widen_and_cap,
    write_gradient,
)


def linear_log_probs(
    hidden_TD: Tensor,
    embedding_VD: Tensor | Head,
    labels_T: Tensor,
    *,
    cap: float | None,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each label, differentiable once in the hidden states and the embedding.

    Args:
        hidden_TD: (T, D) hidden states after the last norm.
        embedding_VD: (V, D) tied embedding, which is the head, or a frozen `Head`. If it needs no gradient, none is
            formed.
        labels_T: (T,) int64 next tokens; `IGNORE_INDEX` where there is none. Such tokens cost nothing.
        cap: the final soft cap, or None.
        compute_dtype: dtype of the matrix products; None for that of `hidden_TD`.
        chunk_size: tokens whose logits exist at a time; `loss_chunk_tokens` of the vocabulary if left out.

    Returns:
        (T,) in nats, in float32 (float64 for float64 inputs); 0 where there is no label.
    """
    result: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden_TD,
        embedding_VD,
        labels_T,
        cap,
        compute_dtype or hidden_TD.dtype,
        chunk_size or chunk_tokens(embedding_VD),
        torch.is_grad_enabled(),
    )
    return result


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embedding_VD: Tensor | Head,
        labels_T: Tensor,
        cap: float | None,
        compute_dtype: torch.dtype,
        chunk_size: int,
        is_grad_enabled: bool,
    ) -> Tensor:
        needs_hidden, needs_embedding = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        log_probs_T = torch.zeros(labels_T.shape, dtype=wide_dtype(hidden_TD.dtype), device=hidden_TD.device)
        # Row t holds d log p(t) / d hidden(t).
        hidden_slopes_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        embedding = in_dtype(embedding_VD, compute_dtype)
        places_N = trained_places(labels_T)
        for places_C, _, logits_CV in logit_chunks(hidden_TD, embedding, places_N, chunk_size):
            log_probs_T[places_C] = _chunk_log_probs(logits_CV, labels_T[places_C], cap, None, needs_hidden)
            if hidden_slopes_TD is not None:
                hidden_slopes_TD[places_C] = to_hidden(logits_CV, embedding).to(hidden_TD.dtype)
        if needs_embedding:
            assert isinstance(embedding_VD, Tensor)
            ctx.save_for_backward(hidden_slopes_TD, labels_T, hidden_TD, embedding_VD)
        else:
            ctx.save_for_backward(hidden_slopes_TD, labels_T)
        ctx.cap, ctx.compute_dtype, ctx.chunk_size = cap, compute_dtype, chunk_size
        return log_probs_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weights_T,) = grad_outputs
        hidden_slopes_TD, labels_T, *inputs = ctx.saved_tensors
        hidden_grad = embedding_grad = None
        if hidden_slopes_TD is not None:
            hidden_grad = (hidden_slopes_TD * weights_T[:, None]).to(hidden_slopes_TD.dtype)
        if inputs:
            hidden_TD, embedding_VD = inputs
            embedding = embedding_VD.to(ctx.compute_dtype)
            total = torch.zeros_like(embedding_VD, dtype=weights_T.dtype)
            places_N = trained_places(labels_T)
            for places_C, hidden_CD, logits_CV in logit_chunks(hidden_TD, embedding, places_N, ctx.chunk_size):
                _chunk_log_probs(logits_CV, labels_T[places_C], ctx.cap, weights_T[places_C], True)
                add_product(total, logits_CV.t(), hidden_CD)
            embedding_grad = total.to(embedding_VD.dtype)
        return hidden_grad, embedding_grad, None, None, None, None, None


def _chunk_log_probs(
    logits_CV: Tensor, labels_C: Tensor, cap: float | None, weights_C: Tensor | None, needs_gradient: bool
) -> Tensor:
    """(C,) log-probabilities; if needed, the gradient of each, times its weight, takes the place of its logits."""
    log_probs = []
    for block in blocks(logits_CV):
        logits_RV, labels_R1 = logits_CV[block], labels_C[block, None]
        capped_RV, sigmoid_RV = widen_and_cap(logits_RV, cap)
        log_probs_RV = torch.log_softmax(capped_RV, dim=1)
        log_probs_R1 = log_probs_RV.gather(1, labels_R1)
        log_probs.append(log_probs_R1.squeeze(1))
        if needs_gradient:
            gradient_RV = log_probs_RV.exp_().neg_()
            gradient_RV.scatter_add_(1, labels_R1, torch.ones_like(log_probs_R1))
            if weights_C is not None:
                gradient_RV *= weights_C[block, None]
            write_gradient(logits_RV, gradient_RV, sigmoid_RV)
    return torch.cat(log_probs)
