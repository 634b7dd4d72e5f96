"""From logits to the tokens that may be drawn: repetition penalty → temperature → top-k → top-p → min-p.

This is the order of Hugging Face's `generate`, and vLLM's but for min-p: vLLM applies it before top-k and top-p. The
order is visible in one place only: top-p measures the mass of what top-k left, and min-p cuts what top-p left.

Ties are settled by the lowest token id. Hugging Face and vLLM instead keep every token that ties with the k-th, so
their top-k may leave more than k.

Written for a vocabulary of 256,000: nothing here sorts it, and what passes over all of it is a kernel. Shapes: V is the
vocabulary, n ≤ V the tokens still in the running.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.runtime import make_runtime
from gemma2.sampling.params import SamplingParams

Float32s = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]


@cache
def one_thread() -> kernels.Runtime:
    """Returns what the kernels run on here: a row is too short to be worth more threads."""
    return make_runtime(1)


def penalize_repetition(logits: Float32s, seen_token_ids: npt.ArrayLike, penalty: float) -> Float32s:
    """Returns logits in which every token that was seen is less likely (`penalty` > 1) or likelier (< 1).

    A negative logit is multiplied by the penalty and any other divided by it; once, however often the token was seen.
    Source: Keskar et al., arXiv 1909.05858, and Hugging Face's `RepetitionPenaltyLogitsProcessor`.

    Args:
        logits: (V,) float32; not changed.
        seen_token_ids: ids of the prompt and of the answer so far; repeats are no matter.
        penalty: above 0.

    Returns:
        (V,) float32.
    """
    seen = np.asarray(seen_token_ids, dtype=np.int64)
    before = logits[seen].astype(np.float64)
    with np.errstate(over="ignore"):
        after = np.where(before < 0, before * penalty, before / penalty)
    # An extreme penalty must neither make +inf nor forbid a token; a token that was forbidden (-inf) stays so.
    largest_float = float(np.finfo(np.float32).max)
    penalized: Float32s = logits.copy()
    penalized[seen] = np.where(np.isfinite(before), np.clip(after, -largest_float, largest_float), before)
    return penalized


def candidates(logits: Float32s, params: SamplingParams) -> tuple[TokenIds | None, Float32s]:
    """Applies temperature, top-k, top-p and min-p.

    Args:
        logits: (V,) float32, the penalty already applied; the largest is finite. Not changed.
        params: with a temperature above 0.

    Returns:
        token_ids: (n,) int64, ascending; None if no filter is on, for all of 0 … V - 1.
        weights: (n,) float32, proportional to the probabilities; the largest is 1.
    """
    token_ids: TokenIds | None = None
    # Before the division by the temperature, which keeps the order: so only k values have to be divided.
    if params.top_k is not None and params.top_k < len(logits):
        token_ids = largest(logits, params.top_k)
        logits = logits[token_ids]
    weights = softmax_weights(logits, params.temperature)
    if params.top_p < 1.0:
        kept = nucleus(weights, params.top_p)
        token_ids = kept if token_ids is None else token_ids[kept]
        weights = weights[kept]
    if params.min_p > 0.0:
        # The largest weight is 1, so the bound relative to it is min_p itself.
        kept = np.flatnonzero(weights >= params.min_p)
        token_ids = kept if token_ids is None else token_ids[kept]
        weights = weights[kept]
    return token_ids, weights


def softmax_weights(logits: Float32s, temperature: float = 1.0) -> Float32s:
    """Returns exp((logits - max) / temperature), (n,) float32: a softmax before it is normalized."""
    weights = np.empty((1, len(logits)), dtype=np.float32)
    kernels.softmax_weights(one_thread(), logits[None], temperature, weights)
    row: Float32s = weights[0]
    return row


def largest(values: Float32s, k: int) -> TokenIds:
    """Finds the k largest values; among equal ones the lowest indices.

    Args:
        values: (n,) float32 without NaN.
        k: from 1 to n.

    Returns:
        (k,) int64 indices, ascending.
    """
    ids = np.empty((1, k), dtype=np.int32)
    kernels.top_k(one_thread(), values[None], k, ids, np.empty((1, k), dtype=np.float32))
    return np.sort(ids[0]).astype(np.int64)


def nucleus(weights: Float32s, top_p: float) -> TokenIds:
    """Finds the fewest largest weights that sum to at least `top_p` of all; among equal ones the lowest indices.

    Source: Holtzman et al., arXiv 1904.09751.

    Args:
        weights: (n,) float32, none negative, at least one above 0.
        top_p: above 0, below 1.

    Returns:
        (m,) int64 indices, ascending; m ≥ 1.
    """
    ids = np.empty(len(weights), dtype=np.int32)
    num_kept = kernels.nucleus(one_thread(), weights, top_p, ids)
    return ids[:num_kept].astype(np.int64)
