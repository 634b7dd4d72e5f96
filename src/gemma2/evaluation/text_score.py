"""Perplexity and bits per byte of a text, with a window of context that slides over it.

A text that is longer than the context is read in windows. Each begins with <bos>, as everything that the model was
trained on does, and scores only its last `stride` tokens, so that every token is scored once and all but the first
ones of a text have at least context - stride tokens before them. Bits per byte compare models whatever their
tokenizer; perplexity does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from gemma2.generation.scoring import score
from gemma2.step import Backend
from gemma2.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What the model said of a text."""

    nats: float
    """Sum of -ln p over all tokens, <bos> not among them."""
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the text."""

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(
            nats=self.nats + other.nats,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; infinite if it does not fit a float."""
        try:
            return math.exp(self.nats / self.num_tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text takes, divided by its bytes."""
        return self.nats / math.log(2) / self.num_bytes


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
        backend: the model.
        tokenizer: its tokenizer.
        texts: documents; empty ones count for nothing.
        context: tokens of a window, <bos> included; the model's whole context if left out.
        stride: tokens that a window scores; half of `context` if left out. Smaller is slower and a little lower.
        on_progress: is given the sum so far after each window.

    Raises:
        ValueError: `context` is not within 2 … max_position_embeddings, `stride` not within 1 … `context`, or there
            is no text at all.
    """
    limit = backend.config.max_position_embeddings
    context = limit if context is None else context
    if not 2 <= context <= limit:
        raise ValueError(f"context must be from 2 to {limit}, the model's context, but is {context}")
    stride = context // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to {context}, the context, but is {stride}")
    total = TextScore(nats=0.0, num_tokens=0, num_bytes=0)
    sequence_id = 0
    for text in texts:
        ids = np.array(tokenizer.encode(text, add_bos=False), dtype=np.int32)
        # The bytes count from the first window on, so that the sum so far is never short of bytes by more than a text.
        num_bytes, scored = len(text.encode()), 0
        while scored < len(ids):
            last = min(len(ids), context if scored == 0 else scored + stride)
            first = max(0, last - context)
            window = np.concatenate([[tokenizer.bos_id], ids[first:last]]).astype(np.int32)
            logprobs = score(
                backend,
                window,
                sequence_id=sequence_id,
                vocab_size=tokenizer.vocab_size,
                max_num_batched_tokens=context,
                num_scored=last - scored,
            )
            nats = -float(logprobs.sum(dtype=np.float64))
            sequence_id += 1
            total += TextScore(
                nats=nats,
                num_tokens=last - scored,
                num_bytes=num_bytes * last // len(ids) - num_bytes * scored // len(ids),
            )
            scored = last
            on_progress(total)
    if total.num_tokens == 0:
        raise ValueError("there is no text to score: all of it is empty")
    return total
