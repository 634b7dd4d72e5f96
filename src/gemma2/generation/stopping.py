"""Where a text ends: stop strings, found across the borders of tokens, and stop tokens."""

from __future__ import annotations

from collections.abc import Sequence

from gemma2.sampling import SamplingParams
from gemma2.text import Tokenizer


def stop_token_ids(tokenizer: Tokenizer, params: SamplingParams) -> frozenset[int]:
    """Returns the tokens that end a request: the model's own, unless it ignores them, and those it names itself."""
    own = frozenset[int]() if params.ignore_eos else tokenizer.stop_ids
    return own | frozenset(params.stop_token_ids)


class StopStrings:
    """Lets a text through piece by piece, up to the first stop string.

    The end of the text so far may be the beginning of a stop string. It is held back until that is decided. How the
    text is cut into pieces makes no difference: the stop string that is complete first wins, as if the characters
    came one by one, and of several that are complete with the same character the longest.

    Args:
        stops: the stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "SamplingParams refuses an empty stop string"
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held_back = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> str:
        """Takes the next piece of the text and returns what is now certain to stand before any stop string."""
        assert self.matched is None, "the text has ended"
        if not self._matchers:
            return text
        pending = self._held_back + text
        for end, character in enumerate(text, start=len(self._held_back) + 1):
            for matcher in self._matchers:
                matcher.push(character)
            complete = [matcher.stop for matcher in self._matchers if matcher.is_complete]
            if complete:
                self.matched = max(complete, key=len)
                self._held_back = ""
                return pending[: end - len(self.matched)]
        num_certain = len(pending) - max(matcher.num_matched for matcher in self._matchers)
        self._held_back = pending[num_certain:]
        return pending[:num_certain]

    def finish(self) -> str:
        """Returns what was held back, once no more text comes."""
        text, self._held_back = self._held_back, ""
        return text


class _Matcher:
    """Knows how much of one stop string the text so far ends with.

    Knuth, Morris and Pratt's automaton: a character costs constant time on average, however long the stop string is.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        # _shorter[n]: the longest beginning of the stop string, shorter than n, with which its first n characters end.
        self._shorter = [0, 0]
        for character in stop[1:]:
            self._shorter.append(self._longest_with(character, self._shorter[-1]))

    @property
    def is_complete(self) -> bool:
        return self.num_matched == len(self.stop)

    def push(self, character: str) -> None:
        self.num_matched = self._longest_with(character, self.num_matched)

    def _longest_with(self, character: str, num_matched: int) -> int:
        while num_matched and self.stop[num_matched] != character:
            num_matched = self._shorter[num_matched]
        return num_matched + (self.stop[num_matched] == character)
