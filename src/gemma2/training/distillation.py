"""Distillation: a student learns a teacher's whole distribution of the next token, not only the token that came.

P is the teacher's distribution and Q the student's, each softmax(logits / temperature) of capped logits. Per token:

    forward_kl   KL(P ‖ Q), the report's loss (section 3): the cross-entropy against P, less P's own entropy
    reverse_kl   KL(Q ‖ P)
    jsd          beta · KL(P ‖ M) + (1 - beta) · KL(Q ‖ M) with M = beta · P + (1 - beta) · Q, the generalized
                 Jensen-Shannon divergence of Agarwal et al., arXiv 2306.13649. Divided by beta it becomes KL(P ‖ Q) as
                 beta goes to 0, divided by 1 - beta it becomes KL(Q ‖ P) as beta goes to 1; those are what 0 and 1 give

    loss = (1 - hard_label_weight) · temperature² · divergence + hard_label_weight · cross-entropy of the label

The square of the temperature keeps the size of gradients (Hinton et al., arXiv 1503.02531, section 2); the label's
cross-entropy is at temperature 1. With d = log Q - log P (or log Q - log M), the gradients in the student's logits are
Q - P, Q · (d - KL(Q ‖ P)) and (1 - beta) · Q · (d - KL(Q ‖ M)).

Teachers come in two forms: logits of the tokens asked for (`TeacherLogits`), or the most probable words that were
stored for each token (`TeacherTopK`). Neither the student's nor the teacher's logits exist beyond a chunk of tokens.

Axes: T tokens, D width, V vocabulary, K stored words, C tokens of one chunk, R tokens of one block of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gemma2.distributed.tensor_parallel import all_rows
from gemma2.errors import ConfigError, nearest_name
from gemma2.memory.training import loss_chunk_tokens
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.head_loss import (
    blocks,
    chunked_head_loss,
    trained_places,
    widen_and_cap,
    write_gradient,
)
from gemma2.training.objectives import Batch, Objective, last_hidden_states

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What is minimized between teacher and student; see the formulas above.

    Raises:
        ConfigError: there is no such kind, or a number is out of range.
    """

    kind: DivergenceKind = "forward_kl"
    beta: float = 0.5
    """Of jsd only, from 0 to 1."""
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    """From 0, the teacher alone, to 1, the labels alone."""

    def __post_init__(self) -> None:
        kinds = get_args(DivergenceKind)
        if self.kind not in kinds:
            raise ConfigError(
                f"there is no divergence {self.kind!r}; they are {', '.join(kinds)}.{nearest_name(self.kind, kinds)}"
            )
        for name in ("beta", "hard_label_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, but is {getattr(self, name)}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature must be above 0, but is {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """A teacher that is asked for the logits of a chunk of tokens at a time."""

    at: Callable[[Tensor], Tensor]
    """(C,) int64 places among the T tokens to (C, V) logits in any floating dtype; they are not written to, and may be
    overwritten by the next call."""
    cap: float | None
    """The final cap that these logits still need; None if they are capped, or have no cap."""


@dataclass(frozen=True, kw_only=True)
class TeacherTopK:
    """What was stored of a teacher: its most probable words at each token, and the rest as one.

    Nothing is known of how the rest spreads over the other words, so teacher and student are compared as distributions
    over K + 1 events: the K words, and "any other word". The loss is the divergence between these, exactly. It is at
    most the divergence over all words, and equal to it where the student's other words stand in the teacher's
    proportions (or where K is the vocabulary).
    """

    ids_TK: Tensor
    """(T, K) int64, distinct in each row."""
    log_probs_TK: Tensor
    """(T, K), at the temperature that the divergence has: a stored distribution cannot be brought to another one."""
    rest_T: Tensor
    """(T,) probability of all other words together, likewise. With the words' it is scaled to a sum of 1."""


Teacher = TeacherLogits | TeacherTopK


def linear_divergence(
    hidden_TD: Tensor,
    embedding_VD: Tensor,
    labels_T: Tensor,
    teacher: Teacher,
    *,
    cap: float | None,
    divergence: Divergence,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over tokens of the divergence from a teacher, differentiable in the student's hidden states and embedding.

    Args:
        hidden_TD: (T, D) hidden states of the student after the last norm.
        embedding_VD: (V, D) tied embedding of the student, which is its head. If it needs no gradient, none is formed.
        labels_T: (T,) int64 next tokens; `IGNORE_INDEX` where none is trained on. Which token it is matters to
            `hard_label_weight` only.
        teacher: its distribution of the token that follows each of the T.
        cap: the student's final soft cap, or None.
        divergence: what is minimized.
        compute_dtype: dtype of the matrix products; None for that of `hidden_TD`. Losses are summed in float32
            (float64 for float64 inputs).
        chunk_size: tokens whose logits exist at a time; `loss_chunk_tokens` of the vocabulary if left out.

    Returns:
        () the sum, in nats.

    Raises:
        ValueError: the teacher has another vocabulary.
    """
    vocab_size = embedding_VD.shape[0]

    def chunk_loss(logits_CV: Tensor, places_C: Tensor, needs_gradient: bool) -> Tensor:
        if isinstance(teacher, TeacherLogits):
            teacher_CV = teacher.at(places_C)
            if teacher_CV.shape != logits_CV.shape:
                raise ValueError(
                    f"the teacher must give logits of {len(places_C)} tokens for the student's {vocab_size} words, but "
                    f"gives {tuple(teacher_CV.shape)}"
                )
        losses = []
        for block in blocks(logits_CV):
            places_R = places_C[block]
            capped_RV, sigmoid_RV = widen_and_cap(logits_CV[block], cap)
            if isinstance(teacher, TeacherLogits):
                teacher_RV, _ = widen_and_cap(teacher_CV[block], teacher.cap)
                soft_R, gradient_RV = _whole_divergence(capped_RV, teacher_RV, divergence)
            else:
                soft_R, gradient_RV = _top_k_divergence(capped_RV, teacher, places_R, divergence)
            # The divergence times temperature², its gradient through logits / temperature.
            weight = 1.0 - divergence.hard_label_weight
            loss = soft_R.sum() * (weight * divergence.temperature**2)
            gradient_RV *= weight * divergence.temperature
            if divergence.hard_label_weight:
                loss += divergence.hard_label_weight * _add_cross_entropy(
                    capped_RV, labels_T[places_R, None], gradient_RV, divergence.hard_label_weight
                )
            losses.append(loss)
            if needs_gradient:
                write_gradient(logits_CV[block], gradient_RV, sigmoid_RV)
        return torch.stack(losses).sum()

    return chunked_head_loss(
        hidden_TD,
        embedding_VD,
        trained_places(labels_T),
        chunk_loss,
        compute_dtype=compute_dtype,
        chunk_size=chunk_size,
    )


def _whole_divergence(capped_RV: Tensor, teacher_RV: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(R,) divergences over all words, and their (R, V) gradient in the student's logits / temperature."""
    q_log_RV = torch.log_softmax(_divided(capped_RV, divergence.temperature), dim=1)
    p_log_RV = torch.log_softmax(_divided(teacher_RV.to(capped_RV.dtype), divergence.temperature), dim=1)
    return _compare(p_log_RV, q_log_RV, divergence)


def _top_k_divergence(
    capped_RV: Tensor, teacher: TeacherTopK, places_R: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """As `_whole_divergence`, over the stored words and the rest as one event more."""
    ids_RK = teacher.ids_TK[places_R]
    smallest = torch.finfo(capped_RV.dtype).tiny  # events of probability 0 count as this probable: their log is finite
    p_log_RE = torch.cat([teacher.log_probs_TK[places_R], teacher.rest_T[places_R, None].log()], dim=1)
    p_log_RE = torch.log_softmax(p_log_RE.to(capped_RV.dtype), dim=1).clamp_(min=math.log(smallest))
    # The student's rest is summed without the words, since 1 - (their sum) would cancel.
    scaled_RV = _divided(capped_RV, divergence.temperature)
    exponentials_RV = (scaled_RV - scaled_RV.amax(1, keepdim=True)).exp_()
    words_RK = exponentials_RV.gather(1, ids_RK)
    exponentials_RV.scatter_(1, ids_RK, 0.0)
    rest_R1 = exponentials_RV.sum(1, keepdim=True)
    events_RE = torch.cat([words_RK, rest_R1], dim=1)
    q_RE = events_RE / events_RE.sum(1, keepdim=True)
    losses_R, gradient_RE = _compare(p_log_RE, q_RE.clamp_(min=smallest).log_(), divergence)
    # Each other word takes its share of the gradient that all of them have together.
    gradient_RV = exponentials_RV.mul_(gradient_RE[:, -1:] / rest_R1.clamp(min=smallest))
    return losses_R, gradient_RV.scatter_(1, ids_RK, gradient_RE[:, :-1])


def _compare(p_log_RE: Tensor, q_log_RE: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """(R,) divergences of distributions over E events, given their logs, which are used up, and the (R, E) gradient.

    The gradient is the one in the student's logits / temperature; of an event of several words, the sum over theirs.
    """
    kind, beta = divergence.kind, divergence.beta
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "forward_kl" if beta == 0.0 else "reverse_kl"
    if kind == "forward_kl":
        p_RE = p_log_RE.exp()
        losses_R = p_log_RE.sub_(q_log_RE).mul_(p_RE).sum(1)
        return losses_R, q_log_RE.exp_().sub_(p_RE)
    target_log_RE, share = p_log_RE, 1.0
    losses_R = torch.zeros_like(p_log_RE[:, 0])
    if kind == "jsd":
        target_log_RE, share = torch.logaddexp(p_log_RE + math.log(beta), q_log_RE + math.log1p(-beta)), 1.0 - beta
        losses_R += beta * (p_log_RE.exp() * (p_log_RE - target_log_RE)).sum(1)
    q_RE = q_log_RE.exp()
    differences_RE = q_log_RE.sub_(target_log_RE)
    q_losses_R1 = (q_RE * differences_RE).sum(1, keepdim=True)
    losses_R += share * q_losses_R1.squeeze(1)
    return losses_R, differences_RE.sub_(q_losses_R1).mul_(q_RE).mul_(share)


def _divided(logits_RV: Tensor, temperature: float) -> Tensor:
    return logits_RV if temperature == 1.0 else logits_RV / temperature


def _add_cross_entropy(capped_RV: Tensor, labels_R1: Tensor, gradient_RV: Tensor, weight: float) -> Tensor:
    """The summed cross-entropy of labels; adds its gradient in the capped logits, times the weight."""
    log_probs_RV = torch.log_softmax(capped_RV, dim=1)
    log_probs_R1 = log_probs_RV.gather(1, labels_R1)
    gradient_RV.add_(log_probs_RV.exp_(), alpha=weight)
    gradient_RV.scatter_add_(1, labels_R1, torch.full_like(log_probs_R1, -weight))
    return -log_probs_R1.sum()


# -- teachers -------------------------------------------------------------------------------------------------------


def teacher_from_hidden(
    hidden_TD: Tensor, embedding_VD: Tensor, *, cap: float | None, compute_dtype: torch.dtype | None = None
) -> TeacherLogits:
    """A teacher of whom the last hidden states of all T tokens are at hand; its logits are computed chunk by chunk.

    Args:
        hidden_TD: (T, D) its hidden states after the last norm.
        embedding_VD: (V, D) its tied embedding.
        cap: its final soft cap, or None.
        compute_dtype: dtype of the matrix product; None for that of `hidden_TD`.
    """
    hidden_TD, embedding = hidden_TD.detach(), embedding_VD.detach().to(compute_dtype or hidden_TD.dtype)
    buffers: list[Tensor] = []

    def at(places_C: Tensor) -> Tensor:
        num_rows = places_C.shape[0]
        if not buffers or buffers[0].shape[0] < num_rows:
            buffers[:] = [embedding.new_empty((num_rows, embedding.shape[0]))]
        logits_CV = buffers[0][:num_rows]
        torch.mm(hidden_TD[places_C].to(embedding.dtype), embedding.t(), out=logits_CV)
        return logits_CV

    return TeacherLogits(at=at, cap=cap)


def torch_teacher(model: Gemma2ForCausalLM, *, compute_dtype: torch.dtype) -> Callable[[Batch], TeacherLogits]:
    """A teacher that runs beside the student, in PyTorch.

    Args:
        model: the teacher; it is not trained.
        compute_dtype: dtype of matrix products, float32 or bfloat16.
    """

    @torch.no_grad()
    def teacher(batch: Batch) -> TeacherLogits:
        return teacher_from_hidden(
            last_hidden_states(model, batch, compute_dtype).flatten(0, 1),
            all_rows(model.lm_head.weight),
            cap=model.config.final_logit_softcapping,
            compute_dtype=compute_dtype,
        )

    return teacher


@torch.no_grad()
def most_probable(
    teacher: TeacherLogits, places_N: Tensor, num_words: int, *, vocab_size: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What is stored of a teacher: see `TeacherTopK`.

    Args:
        teacher: whose words.
        places_N: (N,) int64, at which tokens.
        num_words: K.
        vocab_size: V.
        temperature: of the probabilities.

    Returns:
        (N, K) int64 ids, the most probable first; (N, K) log-probabilities; (N,) probability of all other words. The
        last two in float32 (float64 for float64 logits).
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for places_C in torch.split(places_N, loss_chunk_tokens(vocab_size)):
        logits_CV = teacher.at(places_C)
        for block in blocks(logits_CV):
            capped_RV, _ = widen_and_cap(logits_CV[block], teacher.cap)
            log_probs_RV = torch.log_softmax(capped_RV / temperature, dim=1)
            best_RK, ids_RK = log_probs_RV.topk(num_words, dim=1)
            log_probs_RV.scatter_(1, ids_RK, -math.inf)
            kept.append((ids_RK, best_RK, log_probs_RV.exp_().sum(1)))
    ids, best, rest = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return ids, best, rest


def distillation_objective(
    *,
    teacher: Callable[[Batch], Teacher],
    divergence: Divergence,
    compute_dtype: torch.dtype,
) -> Objective:
    """Divergence from a teacher over the tokens that have a label.

    Args:
        teacher: gives its distributions for a batch, tokens of all rows one after the other: T = B · L.
        divergence: what is minimized.
        compute_dtype: dtype of the student's matrix products, float32 or bfloat16.
    """

    def objective(model: Gemma2ForCausalLM, batch: Batch) -> Tensor:
        distributions = teacher(batch)
        return linear_divergence(
            last_hidden_states(model, batch, compute_dtype).flatten(0, 1),
            all_rows(model.lm_head.weight),
            batch.labels.flatten(),
            distributions,
            cap=model.config.final_logit_softcapping,
            divergence=divergence,
            compute_dtype=compute_dtype,
        )

    return objective
