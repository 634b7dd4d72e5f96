"""How a text that is longer than the context is read: in windows that move on by a stride."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens `first` … `last` - 1 of a text, of which those from `first_scored` on are scored."""

    first: int
    first_scored: int
    last: int


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """Which windows a text is read in.

    Window number k, from 0, begins at token k · `stride` of the text and ends `context` tokens later or with the text.
    The model reads <bos> and then the window's tokens but for the last, which is only predicted: at most `context`
    tokens in all. It scores what no window before it scored: all of the first window, the last `stride` of a later one.

    So every token of a text is scored exactly once. Token number i, from 0, is predicted from <bos> and all i tokens
    before it if i < `context`; else from <bos> and at least `context` - `stride` of them. With a stride as long as the
    context, windows do not overlap, and the first token of each is predicted from <bos> alone.
    """

    context: int
    stride: int

    @classmethod
    def fit(cls, config: Gemma2Config, *, context: int | None = None, stride: int | None = None) -> SlidingWindow:
        """Makes windows for a model.

        Args:
            config: the model's architecture.
            context: tokens that the model reads at once, <bos> included; the most that it can if left out.
            stride: tokens that each window but the first scores; half of `context` if left out. Smaller is slower, and
                gives a lower loss, as tokens have more before them.

        Raises:
            ConfigError: `context` is not within 2 … max_position_embeddings, or `stride` not within 1 … `context`.
        """
        limit = config.max_position_embeddings
        context = limit if context is None else context
        if not 2 <= context <= limit:
            raise ConfigError(
                f"context must be from 2 to {limit}, what the model reads (max_position_embeddings), but is {context}"
            )
        stride = context // 2 if stride is None else stride
        if not 1 <= stride <= context:
            raise ConfigError(f"stride must be from 1 to {context}, the context, but is {stride}")
        return cls(context=context, stride=stride)

    def windows(self, num_tokens: int) -> Iterator[Window]:
        """Yields the windows of a text of so many tokens; none if it has none."""
        first = first_scored = 0
        while first_scored < num_tokens:
            last = min(num_tokens, first + self.context)
            yield Window(first=first, first_scored=first_scored, last=last)
            first, first_scored = first + self.stride, last
