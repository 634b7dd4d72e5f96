"""What a record says, in whatever form it came: a conversation, a prompt and its completion, a text, or a pair."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2.text.chat import Message


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns of a user and the model, with at least one answer to learn from."""

    messages: tuple[Message, ...]
    """{"role": "system", "user" or "model", "content": a text} each; with "train": True or False where it says so."""
    num_given: int = 0
    """How many of the first messages are a prompt, whose answers are not learned."""


@dataclass(frozen=True, kw_only=True)
class PromptCompletion:
    """A text and how it goes on, neither of them blank."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """A text that is not blank."""

    text: str


SingleExample = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, the one preferred to the other.

    Both are conversations that agree in their first `num_given` messages, or both are completions of one prompt.
    """

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion


Example = SingleExample | PreferencePair


def in_turns(answered: PromptCompletion) -> tuple[Message, Message]:
    """A prompt as a user's turn, and its completion as the model's."""
    return {"role": "user", "content": answered.prompt}, {"role": "model", "content": answered.completion}
