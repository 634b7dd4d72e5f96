"""Next-token cross-entropy over a large vocabulary, without the logits.

    logits = cap · tanh(h Eᵀ / cap)          loss = Σ over targets of (logsumexp(logits) - logits[target])

A chunk's gradient is (softmax - one-hot) · (1 - (logit / cap)²); `head_loss` takes it to hidden states and embedding.
A loss that forgets the final cap trains another model than the one that is run.

Axes: T tokens, D width, V vocabulary, C tokens of one chunk, R tokens of one block of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma2.training.head_loss import (
    Head,
    blocks,
    chunked_head_loss,
    trained_places,
    widen_and_cap,
    write_gradient,
)

if TYPE_CHECKING:
    from gemma2.distributed.tensor_parallel import VocabularyPart


def linear_cross_entropy(
    hidden_TD: Tensor,
    embedding_VD: Tensor | Head,
    labels_T: Tensor,
    *,
    cap: float | None,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    compiled: bool = False,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum of the cross-entropies of next tokens, differentiable in the hidden states and the embedding.

    Args:
        hidden_TD: (T, D) hidden states after the last norm.
        embedding_VD: (V, D) tied embedding, which is the head, or a frozen `Head`. If it needs no gradient, none is
            formed.
        labels_T: (T,) int64 next tokens; `IGNORE_INDEX` where none is trained on. Such tokens cost nothing.
        cap: the final soft cap, or None.
        compute_dtype: dtype of the matrix products; None for that of `hidden_TD`. Losses are summed in float32
            (float64 for float64 inputs).
        chunk_size: tokens whose logits exist at a time; `loss_chunk_tokens` of the vocabulary if left out.
        compiled: whether `torch.compile` fuses the passes over a chunk (needs a C++ compiler on the CPU).
        part: which words `embedding_VD` has, if other processes have the others, each of which must call this with the
            same hidden states and labels; None if it has all. Never compiled.

    Returns:
        () the sum, in nats. Divide by the number of labels for the mean.
    """
    block_loss = _compiled_block_loss() if compiled else _block_loss
    if part is not None:
        block_loss = functools.partial(_shared_block_loss, part)

    def chunk_loss(logits_CV: Tensor, places_C: Tensor, needs_gradient: bool) -> Tensor:
        labels_C = labels_T[places_C]
        losses = [block_loss(logits_CV[block], labels_C[block], cap, needs_gradient) for block in blocks(logits_CV)]
        return torch.stack(losses).sum()

    return chunked_head_loss(
        hidden_TD,
        embedding_VD,
        trained_places(labels_T),
        chunk_loss,
        compute_dtype=compute_dtype,
        chunk_size=chunk_size,
        part=part,
    )


def _block_loss(logits_RV: Tensor, labels_R: Tensor, cap: float | None, needs_gradient: bool) -> Tensor:
    """The summed loss of a block; see `ChunkLoss`."""
    labels_R1 = labels_R[:, None]
    capped_RV, sigmoid_RV = widen_and_cap(logits_RV, cap)
    probabilities_RV = torch.softmax(capped_RV, dim=1)
    # The most probable word is never so improbable that the log of its probability would lose anything.
    log_normalizers_R1 = capped_RV.amax(1, keepdim=True) - probabilities_RV.amax(1, keepdim=True).log()
    loss = (log_normalizers_R1 - capped_RV.gather(1, labels_R1)).sum()
    if needs_gradient:
        gradient_RV = probabilities_RV.scatter_add_(1, labels_R1, torch.full_like(log_normalizers_R1, -1.0))
        write_gradient(logits_RV, gradient_RV, sigmoid_RV)
    return loss


def _shared_block_loss(
    part: VocabularyPart, logits_RV: Tensor, labels_R: Tensor, cap: float | None, needs_gradient: bool
) -> Tensor:
    """`_block_loss` where V are the words of this process: what sums over words is summed over processes."""
    places_R1 = labels_R[:, None] - part.first
    is_here_R1 = (places_R1 >= 0) & (places_R1 < logits_RV.shape[1])
    places_R1 = torch.where(is_here_R1, places_R1, 0)
    capped_RV, tanh_RV = widen_and_cap(logits_RV, cap)
    highest_R1 = capped_RV.amax(1, keepdim=True)
    targets_R1 = capped_RV.gather(1, places_R1).mul_(is_here_R1)
    part.raise_to_highest(highest_R1)
    exponentials_RV = (capped_RV - highest_R1).exp_()
    shared_R2 = torch.cat([exponentials_RV.sum(1, keepdim=True), targets_R1], dim=1)
    part.add(shared_R2)
    sums_R1, targets_R1 = shared_R2[:, :1], shared_R2[:, 1:]
    loss: Tensor = (sums_R1.log() + highest_R1 - targets_R1).sum()
    if needs_gradient:
        gradient_RV = exponentials_RV.div_(sums_R1)
        gradient_RV.scatter_add_(1, places_R1, -is_here_R1.to(gradient_RV.dtype))
        write_gradient(logits_RV, gradient_RV, tanh_RV)
    return loss


@functools.cache
def _compiled_block_loss() -> Callable[[Tensor, Tensor, float | None, bool], Tensor]:
    compiled: Callable[[Tensor, Tensor, float | None, bool], Tensor] = torch.compile(_block_loss)
    return compiled
