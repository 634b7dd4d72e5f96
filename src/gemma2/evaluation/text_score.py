"""Perplexity and bits per byte of texts, with a window of context that slides over long ones.

Each window begins with <bos>, as everything that the model was trained on does; documents never see each other. Bits
per byte compare models whatever their tokenizers; perplexity is per token, and compares only models that cut text
alike.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import numpy as np

from gemma2.evaluation.texts import EncodedText, encode_text
from gemma2.evaluation.windows import SlidingWindow
from gemma2.generation import ScoringTask, score_continuations
from gemma2.step import Backend
from gemma2.text import Tokenizer

MAX_NUM_BATCHED_TOKENS: Final = 512
"""Of one step; windows and documents that are shorter share steps."""


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What the model said of some text. Scores of several texts add up to that of all of them."""

    nats: float = 0.0
    """Sum of -ln p over all tokens, <bos> not among them."""
    num_tokens: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the text."""

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(
            nats=self.nats + other.nats,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; infinite if it does not fit a float, NaN for no tokens."""
        try:
            return math.exp(self.nats / self.num_tokens) if self.num_tokens else math.nan
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text takes, divided by its bytes; NaN for no bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def score_texts(
    backend: Backend,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[TextScore], None] = lambda score: None,
) -> TextScore:
    """Scores texts, each on its own.

    Args:
        backend: the model. Nothing else may use it meanwhile, as sequences get their ids here.
        tokenizer: its tokenizer.
        texts: documents; empty ones count for nothing.
        context: tokens that the model reads at once, <bos> included; the most that it can if left out.
        stride: tokens that each window but the first scores; half of `context` if left out. See `SlidingWindow`.
        on_progress: is given the sum so far after each window.

    Raises:
        ConfigError: `context` or `stride` is out of range.
        ValueError: there is no text at all.
    """
    windows = SlidingWindow.fit(backend.config, context=context, stride=stride)
    total = TextScore()
    encoded = (encode_text(tokenizer, text) for text in texts)
    for _, part in score_windows(backend, tokenizer, encoded, windows):
        total += part
        on_progress(total)
    if total.num_tokens == 0:
        raise ValueError("there is no text to score: all of it is empty")
    return total


def score_windows(
    backend: Backend, tokenizer: Tokenizer, texts: Iterable[EncodedText], windows: SlidingWindow
) -> Generator[tuple[int, TextScore], None, None]:
    """Scores texts window by window, for those who want to see how far it is, or to stop half-way.

    Args:
        backend: the model; as for `score_texts`.
        tokenizer: its tokenizer.
        texts: taken one by one as there is room for them in a step.
        windows: how long texts are read.

    Yields:
        For each window, in order: the number of its text, from 0, and the score of the tokens that it scores.

    Raises:
        SamplingError: the logits hold NaN or infinity.
    """
    coming: deque[tuple[int, TextScore]] = deque()

    def tasks() -> Iterator[ScoringTask]:
        bos = np.array([tokenizer.bos_id], dtype=np.int32)
        for number, text in enumerate(texts):
            for window in windows.windows(len(text.token_ids)):
                num_bytes = text.num_bytes(window.first_scored, window.last)
                coming.append((number, TextScore(num_tokens=window.last - window.first_scored, num_bytes=num_bytes)))
                yield ScoringTask(
                    context=np.concatenate([bos, text.token_ids[window.first : window.first_scored]]),
                    continuations=(text.token_ids[window.first_scored : window.last],),
                )

    scores = score_continuations(
        backend,
        tasks(),
        new_sequence_id=itertools.count().__next__,
        vocab_size=tokenizer.vocab_size,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )
    with closing(scores):  # as soon as this one is
        for (scored,) in scores:
            number, counts = coming.popleft()
            yield number, counts + TextScore(nats=-float(scored.logprobs.sum(dtype=np.float64)))
