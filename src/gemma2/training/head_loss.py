"""Losses over a large vocabulary without its logits: head and final cap, a chunk of tokens at a time.

    logits = cap · tanh(h Eᵀ / cap)

The logits of 8192 tokens over 256,000 words are 7.8 GiB in float32, so they never exist as one tensor, forward or
backward. Each chunk's gradient is formed while its logits are at hand, in their place, and goes straight into the
gradients of the hidden states and, if it is trained, of the embedding. The backward pass only scales them. Tokens that
are not trained on are not multiplied at all.

What is minimized is a function of a chunk's logits: next tokens in `linear_cross_entropy`, a teacher's distribution in
`distillation`.

Axes: T tokens, N of them trained, D width, V vocabulary, C tokens of one chunk, R tokens of one block of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from gemma2.memory.training import BLOCK_LOGITS, loss_chunk_tokens

if TYPE_CHECKING:
    from gemma2.distributed.tensor_parallel import VocabularyPart
    from gemma2.model.modeling import Gemma2ForCausalLM

IGNORE_INDEX: Final = -100
"""A label that is not trained on, as in PyTorch and Hugging Face."""

WORDS_OF_A_SUM: Final = 8192
"""Words that one product of the way back to the hidden states sums over."""

ChunkLoss = Callable[[Tensor, Tensor, bool], Tensor]
"""Of (C, V) logits before the cap, (C,) int64 places of their tokens among T, and whether a gradient is needed: the
() summed loss. The gradient in the logits, if needed, takes their place. Called where no gradient is recorded."""


class Head(Protocol):
    """Products with a head that is frozen and no tensor, such as `packed_base.PackedMatrix`."""

    num_outputs: int

    def outputs(self, hidden_CD: Tensor, out_CV: Tensor, /) -> Tensor:
        """Writes hidden · headᵀ, in float32."""
        ...

    def inputs(self, gradient_CV: Tensor, /) -> Tensor:
        """gradient · head: (C, D) float32."""
        ...


def trained_places(labels_T: Tensor) -> Tensor:
    """(N,) int64: where the labels are not `IGNORE_INDEX`."""
    return (labels_T != IGNORE_INDEX).nonzero().squeeze(1)


def chunked_head_loss(
    hidden_TD: Tensor,
    embedding_VD: Tensor | Head,
    places_N: Tensor,
    chunk_loss: ChunkLoss,
    *,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum of a loss over the chosen tokens, differentiable in the hidden states and the embedding.

    Args:
        hidden_TD: (T, D) hidden states after the last norm.
        embedding_VD: (V, D) tied embedding, which is the head, or a frozen `Head`. If it needs no gradient, none is
            formed.
        places_N: (N,) int64, the tokens that are trained on, each once.
        chunk_loss: what is minimized.
        compute_dtype: dtype of the matrix products; None for that of `hidden_TD`.
        chunk_size: tokens whose logits exist at a time; `loss_chunk_tokens` of the vocabulary if left out.
        part: which words `embedding_VD` has, if other processes have the others; None if it has all. The loss must
            then be that of all words.

    Returns:
        () the sum, in float32 (float64 for float64 inputs).
    """
    result: Tensor = _ChunkedHeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_TD,
        embedding_VD,
        places_N,
        chunk_loss,
        compute_dtype or hidden_TD.dtype,
        chunk_size or chunk_tokens(embedding_VD),
        torch.is_grad_enabled(),
        part,
    )
    return result


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        embedding_VD: Tensor | Head,
        places_N: Tensor,
        chunk_loss: ChunkLoss,
        compute_dtype: torch.dtype,
        chunk_size: int,
        is_grad_enabled: bool,
        part: VocabularyPart | None,
    ) -> Tensor:
        # needs_input_grad alone says yes for any parameter, under no_grad too.
        needs_hidden, needs_embedding = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        wide = wide_dtype(hidden_TD.dtype)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        hidden_grad = torch.zeros_like(hidden_TD) if needs_hidden else None
        embedding_grad = None
        embedding = in_dtype(embedding_VD, compute_dtype)
        if isinstance(embedding_VD, Tensor):
            embedding_grad = torch.zeros_like(embedding_VD, dtype=wide) if needs_embedding else None
            ctx.embedding_dtype = embedding_VD.dtype
        for places_C, hidden_CD, logits_CV in logit_chunks(hidden_TD, embedding, places_N, chunk_size):
            total += chunk_loss(logits_CV, places_C, needs_hidden or needs_embedding)
            if hidden_grad is not None:
                hidden_grad[places_C] = to_hidden(logits_CV, embedding).to(hidden_grad.dtype)
            if embedding_grad is not None:
                add_product(embedding_grad, logits_CV.t(), hidden_CD)
        if part is not None and hidden_grad is not None:
            part.add(hidden_grad)  # each process has formed it from its words alone
        ctx.save_for_backward(hidden_grad, embedding_grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, embedding_grad = ctx.saved_tensors
        (scale,) = grad_outputs
        if hidden_grad is not None:
            hidden_grad = hidden_grad * scale  # in its own dtype
        if embedding_grad is not None:
            # In place: it is as large as the embedding, and nobody else has it.
            embedding_grad = embedding_grad.mul_(scale).to(ctx.embedding_dtype)
        return hidden_grad, embedding_grad, None, None, None, None, None, None


def chunk_tokens(embedding_VD: Tensor | Head) -> int:
    """How many tokens' logits exist at once; half as many where they are float32 and not bf16."""
    tokens = loss_chunk_tokens(num_words(embedding_VD))
    return tokens if isinstance(embedding_VD, Tensor) else max(1, tokens // 2)


def num_words(embedding_VD: Tensor | Head) -> int:
    """V."""
    return embedding_VD.shape[0] if isinstance(embedding_VD, Tensor) else embedding_VD.num_outputs


def head_of(model: Gemma2ForCausalLM) -> Head | None:
    """The head of a model whose weights are packed, else None: it is the embedding then."""
    head: Head | None = getattr(model.lm_head, "matrix", None)
    return head


def in_dtype(embedding_VD: Tensor | Head, dtype: torch.dtype) -> Tensor | Head:
    """The embedding in the dtype of its products; a `Head` has its own."""
    return embedding_VD.to(dtype) if isinstance(embedding_VD, Tensor) else embedding_VD


def logit_chunks(
    hidden_TD: Tensor, embedding_VD: Tensor | Head, places_N: Tensor, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (C,) places, their (C, D) hidden states and (C, V) logits before the cap, in the embedding's dtype.

    A `Head` gives logits in float32.

    All logits lie in the same memory, one chunk after the other: use or overwrite them before the next comes.
    """
    if places_N.shape[0] == 0:
        return
    # As even as can be: a small rest would run slower.
    chunks = torch.tensor_split(places_N, -(-places_N.shape[0] // chunk_size))
    dtype = embedding_VD.dtype if isinstance(embedding_VD, Tensor) else torch.float32
    buffer = torch.empty((chunks[0].shape[0], num_words(embedding_VD)), dtype=dtype, device=hidden_TD.device)
    for places_C in chunks:
        hidden_CD = hidden_TD[places_C].to(dtype)
        logits_CV = buffer[: places_C.shape[0]]
        if isinstance(embedding_VD, Tensor):
            torch.mm(hidden_CD, embedding_VD.t(), out=logits_CV)
        else:
            embedding_VD.outputs(hidden_CD, logits_CV)
        yield places_C, hidden_CD, logits_CV


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, where the factors may be narrower than the total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Yields slices of a chunk's rows whose float32 values stay in the processor's cache between passes over them."""
    num_rows, vocab_size = logits_CV.shape
    size = max(1, BLOCK_LOGITS // vocab_size) if logits_CV.device.type == "cpu" else max(1, num_rows)
    for first in range(0, num_rows, size):
        yield slice(first, first + size)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widen_and_cap(logits_RV: Tensor, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """The capped logits in float32 (or float64), and σ(2 · logits / cap), which the way back needs.

    tanh(x) is 2 σ(2x) - 1, and PyTorch computes σ in a sixth of the time. Near 0, where the difference cancels, the
    error is 2⁻²⁴ of the cap. Without a cap the first may be the memory of `logits_RV` itself.
    """
    wide_RV = logits_RV.to(wide_dtype(logits_RV.dtype))
    if cap is None:
        return wide_RV, None
    sigmoid_RV = wide_RV.mul(2 / cap).sigmoid_()
    return sigmoid_RV.mul(2 * cap).sub_(cap), sigmoid_RV


def write_gradient(logits_RV: Tensor, gradient_RV: Tensor, sigmoid_RV: Tensor | None) -> None:
    """Overwrites logits with their gradient, given the one in the capped logits; both arguments are used up."""
    if sigmoid_RV is not None:
        gradient_RV *= sigmoid_RV.addcmul_(sigmoid_RV, sigmoid_RV, value=-1).mul_(4)  # 1 - tanh² = 4 σ (1 - σ)
    logits_RV.copy_(gradient_RV)


def to_hidden(gradient_CV: Tensor, embedding_VD: Tensor | Head) -> Tensor:
    """gradient · embedding, (C, D).

    On a CPU the product is cut along the vocabulary: sums as long as 256,000 run a tenth slower than shorter ones.
    """
    if not isinstance(embedding_VD, Tensor):
        return embedding_VD.inputs(gradient_CV)
    vocab_size = embedding_VD.shape[0]
    if gradient_CV.device.type != "cpu" or vocab_size <= WORDS_OF_A_SUM:
        return gradient_CV @ embedding_VD
    total = gradient_CV.new_zeros((gradient_CV.shape[0], embedding_VD.shape[1]), dtype=wide_dtype(gradient_CV.dtype))
    for first in range(0, vocab_size, WORDS_OF_A_SUM):
        words = slice(first, first + WORDS_OF_A_SUM)
        total += gradient_CV[:, words] @ embedding_VD[words]
    return total
