"""Learning from preferences without a reward model: DPO and its kin, on pairs of answers to one prompt.

A pair is two neighbouring segments of one row: the chosen answer in segment 2k - 1, the rejected one in 2k, each with
its prompt. Labels stand at the answers' tokens only. With the summed log-probabilities of the answers' tokens,

    margin = (log π(chosen) - log π(rejected)) - (log ref(chosen) - log ref(rejected))

and ε the probability that a pair is labelled the wrong way round, the loss of a pair is

    sigmoid  -(1 - ε) · log σ(β · margin) - ε · log σ(-β · margin)      Rafailov et al., arXiv 2305.18290; ε: their cDPO
    robust   (that with ε for the second sign) / (1 - 2ε), unbiased     Chowdhury et al., arXiv 2403.00409
    hinge    max(0, 1 - β · margin)                                     Zhao et al., arXiv 2305.10425
    ipo      (margin - 1 / (2β))², log-probabilities averaged over an   Azar et al., arXiv 2310.12036
             answer's tokens in place of summed

Axes: B rows, L tokens of a row, S segments of a row (an even number), P pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.data import PackedBatch
from gemma2.distributed.tensor_parallel import all_rows
from gemma2.errors import ConfigError, nearest_name
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.head_loss import IGNORE_INDEX, head_of
from gemma2.training.linear_log_probs import linear_log_probs
from gemma2.training.objectives import Batch, MetricSums, Objective, last_hidden_states

PreferenceLoss = Literal["sigmoid", "robust", "hinge", "ipo"]
Reference = Callable[[Batch], Tensor]
"""(B, S) summed log-probabilities of the labels of each segment, under the model that training starts from."""


def preference_objective(
    *,
    reference: Reference | None,
    beta: float = 0.1,
    loss_type: PreferenceLoss = "sigmoid",
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype,
    metrics: MetricSums | None = None,
) -> Objective:
    """The summed loss of the pairs of a batch. What it is a sum of is counted by `count_pairs`.

    Args:
        reference: log-probabilities under the reference (see `model_reference`); None for one that finds all answers
            equally probable.
        beta: how dear it is to leave the reference; above 0.
        loss_type: one of the losses above.
        label_smoothing: ε, from 0 to below one half; of sigmoid and robust only.
        compute_dtype: dtype of matrix products, float32 or bfloat16.
        metrics: is given, for each pair, "rewards/chosen" and "rewards/rejected" (β times an answer's log-probability
            over the reference's), "rewards/margins", "rewards/accuracies" (1 if the margin is above 0), "logps/chosen"
            and "logps/rejected": TRL's names.

    Raises:
        ConfigError: there is no such loss, or a number is out of range.
    """
    kinds = get_args(PreferenceLoss)
    if loss_type not in kinds:
        raise ConfigError(
            f"there is no preference loss {loss_type!r}; they are {', '.join(kinds)}.{nearest_name(loss_type, kinds)}"
        )
    if not beta > 0:
        raise ConfigError(f"beta must be above 0, but is {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing must be from 0 to below 0.5, but is {label_smoothing}")
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise ConfigError(f"label_smoothing is of sigmoid and robust only; set it to 0 for {loss_type}")

    def objective(model: Gemma2ForCausalLM, batch: Batch) -> Tensor:
        log_probs_BS = segment_log_probs(model, batch, compute_dtype=compute_dtype)
        reference_BS = torch.zeros_like(log_probs_BS) if reference is None else reference(batch).to(log_probs_BS)
        is_pair_BS = _pairs(batch)
        if loss_type == "ipo":
            counts_BS = _segment_sums((batch.labels != IGNORE_INDEX).to(log_probs_BS.dtype), batch.segment_ids)
            log_probs_BS, reference_BS = (values / counts_BS.clamp(min=1) for values in (log_probs_BS, reference_BS))
        gains_BS = log_probs_BS - reference_BS
        chosen_P, rejected_P = gains_BS[:, 0::2][is_pair_BS], gains_BS[:, 1::2][is_pair_BS]
        losses_P = _losses(chosen_P - rejected_P, beta, loss_type, label_smoothing)
        if metrics is not None:
            metrics.add("rewards/chosen", beta * chosen_P)
            metrics.add("rewards/rejected", beta * rejected_P)
            metrics.add("rewards/margins", beta * (chosen_P - rejected_P))
            metrics.add("rewards/accuracies", chosen_P > rejected_P)
            metrics.add("logps/chosen", log_probs_BS[:, 0::2][is_pair_BS])
            metrics.add("logps/rejected", log_probs_BS[:, 1::2][is_pair_BS])
        return losses_P.sum()

    return objective


def count_pairs(packed: PackedBatch) -> int:
    """How many pairs a batch holds; see `CountUnits`."""
    return int(np.sum((packed.segment_ids.max(axis=1, initial=0) + 1) // 2))


def segment_log_probs(model: Gemma2ForCausalLM, batch: Batch, *, compute_dtype: torch.dtype) -> Tensor:
    """(B, S) summed log-probabilities of the labels of each segment, 0 for segments that a row lacks.

    Args:
        model: with weights of any dtype.
        batch: the tokens; column s - 1 of the result is of segment s.
        compute_dtype: dtype of matrix products, float32 or bfloat16.
    """
    log_probs_T = linear_log_probs(
        last_hidden_states(model, batch, compute_dtype).flatten(0, 1),
        head_of(model) or all_rows(model.lm_head.weight),
        batch.labels.flatten(),
        cap=model.config.final_logit_softcapping,
        compute_dtype=compute_dtype,
    )
    return _segment_sums(log_probs_T.view(batch.labels.shape), batch.segment_ids)


def model_reference(
    model: Gemma2ForCausalLM,
    *,
    compute_dtype: torch.dtype,
    as_reference: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Reference:
    """Asks a model for the reference's log-probabilities.

    Args:
        model: another model, or the trained one if what is trained can be switched off.
        compute_dtype: dtype of matrix products, float32 or bfloat16.
        as_reference: makes a context in which the model is the reference, such as one without its adapter.
    """

    @torch.no_grad()
    def reference(batch: Batch) -> Tensor:
        with as_reference():
            return segment_log_probs(model, batch, compute_dtype=compute_dtype)

    return reference


def _segment_sums(values_BL: Tensor, segment_ids_BL: Tensor) -> Tensor:
    """(B, S) sums over each segment; in this form and not as a scatter, whose order is left open on accelerators."""
    num_segments = _num_segments(segment_ids_BL)
    ids_S = torch.arange(1, num_segments + 1, device=segment_ids_BL.device)
    return torch.where(segment_ids_BL[:, :, None] == ids_S, values_BL[:, :, None], 0.0).sum(1)


def _num_segments(segment_ids_BL: Tensor) -> int:
    highest = int(segment_ids_BL.max())
    return highest + highest % 2


def _pairs(batch: Batch) -> Tensor:
    """(B, S / 2) bool: which pairs a row has."""
    ids_S = torch.arange(1, _num_segments(batch.segment_ids) + 1, device=batch.segment_ids.device)
    is_there_BS = (batch.segment_ids[:, :, None] == ids_S).any(1)
    if not torch.equal(is_there_BS[:, 0::2], is_there_BS[:, 1::2]):
        raise ValueError(
            "preferences need segments in pairs, chosen 2k - 1 and rejected 2k, but one stands without the other"
        )
    return is_there_BS[:, 0::2]


def _losses(margins_P: Tensor, beta: float, loss_type: PreferenceLoss, label_smoothing: float) -> Tensor:
    right_P, wrong_P = -F.logsigmoid(beta * margins_P), -F.logsigmoid(-beta * margins_P)
    if loss_type == "sigmoid":
        return (1 - label_smoothing) * right_P + label_smoothing * wrong_P
    if loss_type == "robust":
        return ((1 - label_smoothing) * right_P - label_smoothing * wrong_P) / (1 - 2 * label_smoothing)
    if loss_type == "hinge":
        return F.relu(1 - beta * margins_P)
    return (margins_P - 1 / (2 * beta)).square()
