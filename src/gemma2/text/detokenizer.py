"""Turns token ids to text one at a time, for showing an answer while it is made."""

from __future__ import annotations

from typing import Protocol


class TokenTexts(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def is_control(self, token_id: int) -> bool:
        """Whether the token is no text."""
        ...

    def token_text(self, token_id: int) -> str | bytes:
        """What the token writes: text, or one byte of a character that the vocabulary lacks."""
        ...


class StreamDetokenizer:
    """Gives out the text of a sequence of tokens, each part as soon as no later token can change it.

    The work for a token does not depend on how many came before. All that `push` returned and what `finish` returns,
    joined, is what `Tokenizer.decode` makes of the same ids: decoding is this class, run over a whole sequence.

    A character that the vocabulary lacks comes as several tokens of one byte each. It is held back until its last
    byte is there; each byte that cannot be part of a character becomes one U+FFFD, as in SentencePiece (tokenizers
    differs: one wrong byte turns all its neighbouring bytes to U+FFFD, which cannot be known while streaming).

    Args:
        tokenizer: a `Tokenizer`.
        skip_control: whether control tokens write nothing, or their names.
    """

    def __init__(self, tokenizer: TokenTexts, *, skip_control: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Takes the next token and returns the text that is now final; often the token's own, at times "".

        Raises:
            TokenizerError: the tokenizer has no such id; what came before is not lost.
        """
        text = self._tokenizer.token_text(token_id)
        if isinstance(text, bytes):
            self._pending += text
            return self._take_characters()
        held_back = self.finish()
        if self._skip_control and self._tokenizer.is_control(token_id):
            return held_back
        return held_back + text

    def finish(self) -> str:
        """Returns what was held back: one U+FFFD for each byte of a character that was never completed."""
        text = "\N{REPLACEMENT CHARACTER}" * len(self._pending)
        self._pending = b""
        return text

    def _take_characters(self) -> str:
        """Takes whole characters, and bytes that can never be part of one, off the front of the pending bytes."""
        taken = ""
        while self._pending:
            try:
                text = self._pending.decode()
            except UnicodeDecodeError as error:
                # Characters are taken as soon as they are whole, so what is wrong stands at the front.
                if error.reason == "unexpected end of data":
                    break
                taken += "\N{REPLACEMENT CHARACTER}" * (error.end - error.start)
                self._pending = self._pending[error.end :]
            else:
                taken += text
                self._pending = b""
        return taken
