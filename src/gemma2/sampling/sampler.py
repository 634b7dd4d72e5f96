"""`Sampler`: draws the tokens of one request from rows of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.errors import SamplingError
from gemma2.sampling.filters import candidates, largest, one_thread, penalize_repetition
from gemma2.sampling.params import SamplingParams

BLOCK: Final = 1024


class TokenLogprob(NamedTuple):
    """A token and the logarithm (base e) of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledToken:
    """One drawn token, with its log-probabilities if the request asked for them.

    They are those of the model's own distribution, before penalty, temperature and filters, as vLLM reports them.
    """

    token_id: int
    logprob: float | None = None
    """Of `token_id`; None if `SamplingParams.logprobs` is None."""
    top_logprobs: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens, likeliest first; `token_id` is among them only if it is one of them."""


class Sampler:
    """Draws the tokens of one request.

    A draw depends on nothing but the seed, how many draws this sampler made before, and the logits: so a request with
    a seed gives the same text whatever else runs beside it.

    Args:
        params: the request's parameters.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        # numpy keeps the raw bits of a bit generator the same in all versions, but not what Generator makes of them.
        # A negative seed becomes its two's complement, as in torch.manual_seed.
        self._bits = np.random.PCG64(None if params.seed is None else params.seed % 2**64)

    def sample(self, logits: npt.NDArray[np.float32], seen_token_ids: npt.ArrayLike = ()) -> SampledToken:
        """Draws the next token.

        Args:
            logits: (V,) float32; not changed. -inf forbids a token.
            seen_token_ids: ids of the prompt and of the answer so far, for the repetition penalty.

        Returns:
            The token: with temperature 0 the likeliest, of equally likely ones the one with the lowest id.

        Raises:
            SamplingError: the logits hold NaN or +inf, or forbid every token.
        """
        assert logits.ndim == 1 and logits.dtype == np.float32, f"logits: {logits.dtype} {logits.shape}"
        check_logits(logits)
        penalty = self.params.repetition_penalty
        adjusted = logits if penalty == 1.0 else penalize_repetition(logits, seen_token_ids, penalty)
        token_id = int(adjusted.argmax()) if self.params.is_greedy else self._draw(adjusted)
        if self.params.logprobs is None:
            return SampledToken(token_id=token_id)
        return _with_logprobs(token_id, logits, self.params.logprobs)

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        # One draw a token even if only one token is left, so that the n-th token always has the n-th draw.
        fraction = (int(self._bits.random_raw()) >> 11) * 2.0**-53
        token_ids, weights = candidates(logits, self.params)
        index = _index_at(weights, fraction)
        return index if token_ids is None else int(token_ids[index])


def check_logits(logits: npt.NDArray[np.float32]) -> None:
    """Checks that (V,) float32 logits are a distribution.

    Raises:
        SamplingError: they hold NaN or +inf, or all are -inf.
    """
    largest_logit = float(logits.max())  # NaN if any is NaN
    if math.isfinite(largest_logit):
        return
    if math.isnan(largest_logit):
        what = f"{int(np.isnan(logits).sum())} of {len(logits)} logits are NaN"
    elif largest_logit > 0:
        what = f"{int(np.isposinf(logits).sum())} of {len(logits)} logits are +inf"
    else:
        raise SamplingError(f"all {len(logits)} logits are -inf, so no token is allowed; at least one must be")
    raise SamplingError(
        f"cannot draw a token: {what}. The weights are damaged, or the arithmetic overflowed: float16 does so in "
        "Gemma 2's residual stream, use bfloat16 or float32"
    )


def log_normalizer(logits: npt.NDArray[np.float32]) -> float:
    """Returns log(sum(exp(logits))) of (V,) float32 logits, summed in float64; a logprob is a logit minus this."""
    normalizer = np.empty(1)
    kernels.log_normalizers(one_thread(), logits[None], normalizer)
    return float(normalizer[0])


def _with_logprobs(token_id: int, logits: npt.NDArray[np.float32], num_alternatives: int) -> SampledToken:
    normalizer = log_normalizer(logits)
    top: tuple[TokenLogprob, ...] = ()
    if num_alternatives:
        ids = largest(logits, min(num_alternatives, len(logits)))
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        top = tuple(TokenLogprob(int(i), float(logits[i]) - normalizer) for i in ids)
    return SampledToken(token_id=token_id, logprob=float(logits[token_id]) - normalizer, top_logprobs=top)


def _index_at(weights: npt.NDArray[np.float32], fraction: float) -> int:
    """Finds the index in which the running sum of the weights passes `fraction` (0 ≤ fraction < 1) of their total.

    The weights stand in the order of token ids, not of size: so rounding that swaps two near-equal weights does not
    change what is drawn. The running sum is taken of blocks first, since one over 256,000 values takes 2.4 ms.
    """
    block_sums = np.empty(-(-len(weights) // BLOCK))
    kernels.block_sums(one_thread(), weights, BLOCK, block_sums)
    block, passed = _first_above(block_sums, fraction * float(block_sums.sum()))
    start = block * BLOCK
    target = fraction * float(block_sums.sum()) - passed
    index, _ = _first_above(weights[start : start + BLOCK].astype(np.float64), target)
    return start + index


def _first_above(values: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """Returns the first index whose running sum is above `target`, and the sum of all values before it.

    Rounding may put the target at the very end; then it is the last index with a value above 0.
    """
    running = np.cumsum(values)
    index = int(np.searchsorted(running, target, side="right"))
    if index == len(values):
        index = int(np.flatnonzero(values)[-1])
    return index, float(running[index - 1]) if index else 0.0
