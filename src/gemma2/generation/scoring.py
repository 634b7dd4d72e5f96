"""How likely a model finds a given text."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2.sampling import check_logits, log_normalizer
from gemma2.step import Backend, SequenceStep, StepBatch, TokenIds

MAX_LOGITS_BYTES: Final = 128 * 2**20
"""Of one step of scoring. 8192 tokens over 256,000 words would be 7.8 GiB at once."""


def score(
    backend: Backend,
    token_ids: TokenIds,
    *,
    sequence_id: int,
    vocab_size: int,
    max_num_batched_tokens: int,
    num_scored: int | None = None,
) -> npt.NDArray[np.float32]:
    """Computes the log-probability of each token after the first, given those before it.

    Args:
        backend: the model.
        token_ids: (n,) int32, n ≥ 1, each below `vocab_size`.
        sequence_id: an id that the backend does not know yet.
        vocab_size: how many of the model's rows are words; more are padding.
        max_num_batched_tokens: the most tokens of one step.
        num_scored: score only so many of the last tokens, 1 … n - 1; those before are context, and no logits are
            computed for them. Left out: all n - 1.

    Returns:
        (num_scored,) float32, base e.

    Raises:
        SamplingError: the logits hold NaN or infinity.
    """
    targets = token_ids[1:]
    first_scored = 0 if num_scored is None else len(targets) - num_scored
    assert 0 <= first_scored <= len(targets)
    logprobs = np.empty(len(targets) - first_scored, dtype=np.float32)
    bytes_per_token = 4 * backend.config.vocab_size
    chunk = max(1, min(max_num_batched_tokens, MAX_LOGITS_BYTES // bytes_per_token))
    try:
        for start in range(0, len(targets), chunk):
            end = min(start + chunk, len(targets))
            scored = range(max(start, first_scored), end)
            step = SequenceStep(
                sequence_id=sequence_id, token_ids=token_ids[start:end], position=start, num_logits=len(scored)
            )
            logits = backend.forward(StepBatch(steps=(step,)))
            for index, logits_row in zip(scored, logits, strict=True):
                row = logits_row[:vocab_size]
                check_logits(row)
                logprobs[index - first_scored] = float(row[targets[index]]) - log_normalizer(row)
    finally:
        backend.free(sequence_id)
    return logprobs
