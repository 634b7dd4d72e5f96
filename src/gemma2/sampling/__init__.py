"""Parameters of a request and the draw of its next token; numpy only."""

from gemma2.sampling.params import SamplingParams
from gemma2.sampling.sampler import SampledToken, Sampler, TokenLogprob, check_logits, log_normalizer

__all__ = ["SampledToken", "Sampler", "SamplingParams", "TokenLogprob", "check_logits", "log_normalizer"]
