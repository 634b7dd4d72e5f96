"""From logits to the tokens that may be drawn: repetition penalty → temperature → top-k → top-p → min-p.

This is the order of Hugging Face's `generate`, and vLLM's but for min-p: vLLM applies it before top-k and top-p. The
order is visible in one place only: top-p measures the mass of what top-k left, and min-p cuts what top-p left.

Ties are settled by the lowest token id. Hugging Face and vLLM instead keep every token that ties with the k-th, so
their top-k may leave more than k.

Written for a vocabulary of 256,000: nothing here sorts. Shapes: V is the vocabulary, n ≤ V the
tokens still in the running.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2.sampling.params import SamplingParams

Float32s = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]

BLOCK: Final = 256
"""Values per block in `largest`. About the square root of a vocabulary: few blocks, and few values in each."""


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
    with np.errstate(over="ignore"):  # a difference too large for float32 is -inf, and its weight 0: rightly so
        scaled: Float32s = logits - logits.max()
        if temperature != 1.0:
            # Within what float32 holds; beyond these it is greedy, or uniform, all the same.
            scaled /= np.float32(min(max(temperature, 1e-30), 1e30))
    np.exp(scaled, out=scaled)
    return scaled


def largest(values: Float32s, k: int) -> TokenIds:
    """Finds the k largest values; among equal ones the lowest indices.

    Args:
        values: (n,) float32 without NaN.
        k: from 1 to n.

    Returns:
        (k,) int64 indices, ascending.
    """
    num_blocks = len(values) // BLOCK
    if k <= num_blocks // 4:
        # At least k values reach the k-th largest of the blocks' maxima, so no smaller value can be among the k.
        maxima = values[: num_blocks * BLOCK].reshape(num_blocks, BLOCK).max(axis=1)
        bound = np.partition(maxima, num_blocks - k)[num_blocks - k]
        survivors = np.flatnonzero(values >= bound)
        return survivors[_largest(values[survivors], k)]
    return _largest(values, k)


def _largest(values: Float32s, k: int) -> TokenIds:
    kth = np.partition(values, len(values) - k)[len(values) - k]
    above = values > kth
    return _with_ties(above, values == kth, k - int(np.count_nonzero(above)))


def nucleus(weights: Float32s, top_p: float) -> TokenIds:
    """Finds the fewest largest weights that sum to at least `top_p` of all; among equal ones the lowest indices.

    Source: Holtzman et al., arXiv 1904.09751.

    Args:
        weights: (n,) float32, none negative, at least one above 0.
        top_p: above 0, below 1.

    Returns:
        (m,) int64 indices, ascending; m ≥ 1.
    """
    total = float(weights.sum(dtype=np.float64))
    wanted_mass = top_p * total
    # Weights up to this bound sum to at most (1 - top_p) · total all together, so those above it hold the nucleus.
    # One float32 lower, as rounding upwards could leave none above.
    bound = np.nextafter(np.float32((1.0 - top_p) * total / len(weights)), np.float32(0.0))
    remaining = weights[weights > bound]
    mass_above = 0.0
    # A radix select for the smallest weight of the nucleus, with mass in place of counts: the bits of positive
    # float32 values, read as whole numbers, have the order of the values.
    for shift in (20, 8, 0):
        if remaining.min() == remaining.max():
            break
        bins = remaining.view(np.uint32) >> np.uint32(shift)
        bins -= bins.min()
        mass_of_bin = np.bincount(bins, weights=remaining)
        mass_from_bin = mass_above + np.cumsum(mass_of_bin[::-1])[::-1]
        reaching = np.flatnonzero(mass_from_bin >= wanted_mass)
        # Rounding can leave the sum of all a hair below the wanted mass; then the nucleus ends in the lowest bin.
        last = int(reaching[-1]) if len(reaching) else 0
        if last + 1 < len(mass_from_bin):
            mass_above = float(mass_from_bin[last + 1])
        remaining = remaining[bins == last]
    smallest = remaining[0]
    num_ties = max(1, math.ceil((wanted_mass - mass_above) / float(smallest)))
    return _with_ties(weights > smallest, weights == smallest, num_ties)


def _with_ties(above: npt.NDArray[np.bool_], ties: npt.NDArray[np.bool_], num_ties: int) -> TokenIds:
    """Returns the indices, ascending, of all of `above` and of the first `num_ties` of `ties`."""
    above[np.flatnonzero(ties)[:num_ties]] = True
    return np.flatnonzero(above)
