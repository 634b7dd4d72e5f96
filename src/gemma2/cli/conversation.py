"""A conversation, and what of it the model is shown.

A model that was tuned for chat is shown Gemma's chat format. One that was not is shown one text: the system text, then
everything that was typed and generated, in order. Either way the whole conversation is kept, and when it no longer
fits the context, the oldest part is left out of what is shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gemma2.errors import ContextLengthError

if TYPE_CHECKING:
    from gemma2.text import Tokenizer

_FOLLOWS_WITHOUT_SPACE: Final = tuple(".,;:!?…)]’”")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What a user typed and what the model answered."""

    user: str
    """Empty where an untuned model was just let go on."""
    answer: str = ""
    is_interrupted: bool = False
    """Whether the user stopped the answer."""


@dataclass
class Conversation:
    """The system text and all exchanges so far; an exchange is added when its answer is there."""

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class View:
    """What the model is shown of a conversation."""

    token_ids: list[int]
    num_hidden_exchanges: int = 0
    """How many of the oldest exchanges do not fit."""
    num_hidden_tokens: int = 0
    """How many tokens at the beginning of an untuned model's text do not fit."""

    @property
    def hides_something(self) -> bool:
        """Whether the conversation is longer than what the model is shown."""
        return bool(self.num_hidden_exchanges or self.num_hidden_tokens)


def chat_view(tokenizer: Tokenizer, conversation: Conversation, pending: Exchange, *, limit: int, context: int) -> View:
    """Shows a conversation in Gemma's chat format, less the oldest exchanges if they do not fit.

    Args:
        tokenizer: the model's.
        conversation: what was said before.
        pending: what the model is to answer; if it has an answer already, the model goes on with that.
        limit: how many tokens to show at most, so that there is room for an answer. Only the last message may be
            longer, as it cannot be left out.
        context: how many tokens the model's context holds.

    Raises:
        ContextLengthError: the last message leaves no room in the context.
    """
    from gemma2.text import encode_chat

    exchanges = conversation.exchanges

    def encode_without(num_hidden: int) -> list[int]:
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for exchange in exchanges[num_hidden:]:
            messages += [{"role": "user", "content": exchange.user}, {"role": "model", "content": exchange.answer}]
        messages.append({"role": "user", "content": pending.user})
        return encode_chat(tokenizer, messages) + tokenizer.encode(pending.answer, add_bos=False)

    num_hidden = bisect_left(range(len(exchanges)), True, key=lambda hidden: len(encode_without(hidden)) <= limit)
    token_ids = encode_without(num_hidden)
    if len(token_ids) >= context:
        who = "the message and the system text have" if conversation.system else "the message has"
        raise ContextLengthError(
            f"{who} {len(token_ids)} tokens, but the context holds {context}, the answer included; send a shorter one"
        )
    return View(token_ids=token_ids, num_hidden_exchanges=num_hidden)


def text_view(tokenizer: Tokenizer, conversation: Conversation, pending: Exchange, *, limit: int, context: int) -> View:
    """Shows a conversation as one text, less its oldest part if that does not fit; the arguments are `chat_view`'s.

    Raises:
        ContextLengthError: the system text leaves too little room for the rest.
    """
    opening = tokenizer.encode(_opening(conversation.system))
    if len(opening) > limit // 2:
        raise ContextLengthError(
            f"the system text has {len(opening)} tokens, but {limit // 2} are the most, so that the context of "
            f"{context} has room for the rest; shorten it with /system"
        )
    token_ids = tokenizer.encode(join_exchanges([*conversation.exchanges, pending]), add_bos=False)
    num_hidden = max(0, len(opening) + len(token_ids) - limit)
    return View(token_ids=opening + token_ids[num_hidden:], num_hidden_tokens=num_hidden)


def whole_text(conversation: Conversation) -> str:
    """Returns all of the text that an untuned model and its user wrote."""
    return _opening(conversation.system) + join_exchanges(conversation.exchanges)


def join_exchanges(exchanges: Sequence[Exchange]) -> str:
    """Joins what was typed and generated to one text, with a space before what was typed where words would touch."""
    text = ""
    for exchange in exchanges:
        touches = bool(text and exchange.user) and not text[-1].isspace() and not exchange.user[0].isspace()
        if touches and not exchange.user.startswith(_FOLLOWS_WITHOUT_SPACE):
            text += " "
        # A model writes the space before its first word itself, if there is to be one.
        text += exchange.user + exchange.answer
    return text


def _opening(system: str) -> str:
    return f"{system}\n\n" if system and not system[-1].isspace() else system
