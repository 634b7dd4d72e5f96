"""One request: what was asked, how far it is, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np
import numpy.typing as npt

from gemma2.generation.stopping import StopStrings, stop_token_ids
from gemma2.sampling import SampledToken, Sampler, SamplingParams
from gemma2.step import TokenIds
from gemma2.text import StreamDetokenizer, Tokenizer

FinishReason = Literal["stop", "length", "abort"]
"""vLLM's words: a stop string or stop token came; `max_tokens` or the context's end; the caller gave up."""


class RequestStatus(Enum):
    """Where a request stands in its life."""

    WAITING = "waiting"
    """Not yet begun; the backend holds nothing of it."""
    RUNNING = "running"
    """Its prompt or its answer is going through the model."""
    FINISHED = "finished"
    """It has a finish reason, and no step will touch it again."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of one request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    text: str
    """The answer, without the stop string or stop token that ended it."""
    token_ids: tuple[int, ...]
    """Every generated token: also the stop token, and those of a stop string."""
    logprobs: tuple[SampledToken, ...] | None
    """One for each of `token_ids`, or None if `SamplingParams.logprobs` was None."""
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or the id of the stop token. None for <eos> and for other finish reasons, as in vLLM."""

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens the prompt has, <bos> included."""
        return len(self.prompt_token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """What one step added to one request. The texts of all deltas, joined, are the completion's text."""

    request_id: str
    text: str
    """The text that is now certain. Empty while a character is not whole or a stop string may have begun."""
    token_ids: tuple[int, ...]
    """The tokens of this step, which need not be those of `text`."""
    logprobs: tuple[SampledToken, ...] | None
    """One for each of `token_ids`, or None if they were not asked for."""
    completion: Completion | None
    """The whole result, on the last delta; None before."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended, on the last delta; None before."""
        return self.completion.finish_reason if self.completion else None


class Request:
    """A request on its way. The scheduler moves `status`, `sequence_id` and `num_computed_tokens`; no one else does.

    Args:
        request_id: the caller's name for it.
        prompt_token_ids: (n,) int32, n ≥ 1.
        params: how to draw and when to end.
        tokenizer: makes text of the tokens.
        max_tokens: the most tokens to generate; at least 1.
    """

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: TokenIds,
        params: SamplingParams,
        tokenizer: Tokenizer,
        max_tokens: int,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.status = RequestStatus.WAITING
        self.sequence_id: int | None = None
        """The backend's cache of this request, once it runs."""
        self.num_computed_tokens = 0
        """How many of `token_ids` the backend's cache holds."""
        self.error: BaseException | None = None
        """What ended it, if a step of it failed."""

        self._num_prompt_tokens = self._num_tokens = len(prompt_token_ids)
        self._buffer = prompt_token_ids  # with room to grow behind the tokens, from the first generated one on
        self._max_tokens = max_tokens
        self._sampler = Sampler(params)
        self._stop_token_ids = stop_token_ids(tokenizer, params)
        self._eos_id = None if params.ignore_eos else tokenizer.eos_id
        self._detokenizer = StreamDetokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop)
        self._texts: list[str] = []
        self._logprobs: list[SampledToken] = []

    @property
    def token_ids(self) -> TokenIds:
        """(num_tokens,) int32: the prompt and what was generated so far."""
        return self._buffer[: self._num_tokens]

    @property
    def num_tokens(self) -> int:
        """Length of the prompt and of what was generated so far."""
        return self._num_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has a finish reason."""
        return self.status is RequestStatus.FINISHED

    def draw(self, logits: npt.NDArray[np.float32]) -> TextDelta:
        """Draws the next token, and finishes the request if that ends it.

        Args:
            logits: (V,) float32, after the last of `token_ids`.

        Raises:
            SamplingError: nothing can be drawn from these logits.
        """
        sampled = self._sampler.sample(logits, self.token_ids)
        token_id = sampled.token_id
        self._append(token_id)
        if self.params.logprobs is not None:
            self._logprobs.append(sampled)
        if token_id in self._stop_token_ids:
            # As in vLLM: <eos> is the ordinary end and no reason worth telling.
            return self._finish("stop", None if token_id == self._eos_id else token_id, new=(sampled,))
        text = self._stop_strings.push(self._detokenizer.push(token_id))
        if self._stop_strings.matched is not None:
            return self._finish("stop", self._stop_strings.matched, text, new=(sampled,))
        if self._num_tokens - self._num_prompt_tokens == self._max_tokens:
            return self._finish("length", None, text, new=(sampled,))
        return self._delta(text, (sampled,), None)

    def abort(self) -> TextDelta:
        """Finishes the request where it is; the delta has the text that was held back."""
        assert not self.is_finished
        return self._finish("abort", None)

    def _finish(
        self,
        finish_reason: FinishReason,
        stop_reason: str | int | None,
        text: str = "",
        *,
        new: tuple[SampledToken, ...] = (),
    ) -> TextDelta:
        self.status = RequestStatus.FINISHED
        if self._stop_strings.matched is None:
            # What the detokenizer held back is text like any other, so it may complete a stop string.
            text += self._stop_strings.push(self._detokenizer.finish())
            if self._stop_strings.matched is not None:
                finish_reason, stop_reason = "stop", self._stop_strings.matched
            else:
                text += self._stop_strings.finish()
        completion = Completion(
            request_id=self.request_id,
            prompt_token_ids=tuple(self._buffer[: self._num_prompt_tokens].tolist()),
            text="".join([*self._texts, text]),
            token_ids=tuple(self.token_ids[self._num_prompt_tokens :].tolist()),
            logprobs=None if self.params.logprobs is None else tuple(self._logprobs),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        return self._delta(text, new, completion)

    def _delta(self, text: str, new: tuple[SampledToken, ...], completion: Completion | None) -> TextDelta:
        self._texts.append(text)
        return TextDelta(
            request_id=self.request_id,
            text=text,
            token_ids=tuple(sampled.token_id for sampled in new),
            logprobs=None if self.params.logprobs is None else new,
            completion=completion,
        )

    def _append(self, token_id: int) -> None:
        if self._num_tokens == len(self._buffer):
            # Twice the room; what the backend was given are views of the old buffer, which nobody changes any more.
            self._buffer = np.concatenate([self._buffer, np.zeros_like(self._buffer)])
        self._buffer[self._num_tokens] = token_id
        self._num_tokens += 1
