"""Examples to token ids, and which of them are trained.

Of a conversation the model's turns are trained, each with its <end_of_turn>: a model that never learned to end its turn
never stops. The newline after the last turn is not, as nothing is generated there.

    <bos><start_of_turn>user\\n Hi <end_of_turn>\\n<start_of_turn>model\\n Hello! <end_of_turn>\\n
                                                                       ^^^^^^ ^^^^^^^^^^^^^

Whatever a text says stays text, "<end_of_turn>" too: the only control tokens are those that are put in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gemma2.data.examples import Conversation, PlainText, PreferencePair, PromptCompletion, SingleExample, in_turns
from gemma2.errors import ChatFormatError
from gemma2.text.chat import Message, encode_chat_segments
from gemma2.text.detokenizer import StreamDetokenizer
from gemma2.text.tokenizer import Tokenizer

Template = Literal["chat", "none"]
"""Whether a prompt and its completion are turns of a chat, or one text."""
TrainOn = Literal["answers", "last_answer", "all"]
"""What is trained: what the model says, the last of it, or all that is said."""


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """A sequence of tokens, and which of them are trained."""

    ids: npt.NDArray[np.int32]
    """(n,) int32: <bos>, once, and what follows."""
    trained: npt.NDArray[np.bool_]
    """(n,) bool: whether the model is to say this token after those before it. Never <bos>."""

    @property
    def num_places(self) -> int:
        """How many tokens the model must read: those before the last one that is trained. 0 if none is."""
        where = np.flatnonzero(self.trained)
        return int(where[-1]) if len(where) else 0

    def beginning(self, num_places: int) -> EncodedExample:
        """As much as fits in `num_places`, without what comes after the last token that is trained."""
        kept = self.ids[: num_places + 1], self.trained[: num_places + 1]
        shortened = EncodedExample(ids=kept[0], trained=kept[1])
        end = shortened.num_places + 1
        return EncodedExample(ids=kept[0][:end], trained=kept[1][:end])


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """Two sequences that share their prompt, the first one preferred."""

    chosen: EncodedExample
    rejected: EncodedExample


class RenderedSpan(NamedTuple):
    """A piece of an example's text."""

    text: str
    is_trained: bool


def encode_example(
    tokenizer: Tokenizer,
    example: SingleExample,
    *,
    template: Template = "chat",
    train_on: TrainOn = "answers",
    strict_system: bool = False,
) -> EncodedExample:
    """Encodes an example, however long.

    Args:
        tokenizer: whose ids.
        example: a conversation; a prompt and its completion; or a text, which becomes <bos>, text, <eos>, all trained.
        template: "chat" makes turns of a prompt and its completion. "none" makes <bos>, prompt, completion, <eos>, and
            trains the completion and <eos>; the prompt is encoded by itself, as when the model is asked to go on from
            it. Conversations need "chat", and to a text it is all the same.
        train_on: "answers" is what the model says; in a conversation with a given beginning, what it says after that.
            "last_answer" is its last turn. "all" is every token but the first and a conversation's last newline.
            Messages that say themselves whether they are trained know better.
        strict_system: whether to refuse a system message, which otherwise goes before the first user's text.

    Raises:
        ChatFormatError: the roles come in an order that the chat format cannot express, or
            `template` is "none" and the example a `Conversation`.
        TokenizerError: a text cannot be encoded.
    """
    if isinstance(example, PlainText):
        return _join([([tokenizer.bos_id], False), ([*_encode(tokenizer, example.text), tokenizer.eos_id], True)])
    if isinstance(example, PromptCompletion):
        if template == "none":
            prompt = _encode(tokenizer, example.prompt), train_on == "all"
            completion = [*_encode(tokenizer, example.completion), tokenizer.eos_id], True
            return _join([([tokenizer.bos_id], False), prompt, completion])
        example = Conversation(messages=in_turns(example), num_given=1)
    if template == "none":
        raise ChatFormatError("a list of messages can only be a chat; set template to chat")
    return _encode_conversation(tokenizer, example, train_on, strict_system)


def encode_pair(
    tokenizer: Tokenizer,
    pair: PreferencePair,
    *,
    template: Template = "chat",
    train_on: TrainOn = "answers",
    strict_system: bool = False,
) -> EncodedPair:
    """Encodes both sides of a pair; the arguments and errors are those of `encode_example`."""
    chosen, rejected = (
        encode_example(tokenizer, side, template=template, train_on=train_on, strict_system=strict_system)
        for side in (pair.chosen, pair.rejected)
    )
    return EncodedPair(chosen=chosen, rejected=rejected)


def render_example(tokenizer: Tokenizer, encoded: EncodedExample) -> list[RenderedSpan]:
    """Shows what is trained.

    Returns:
        The text of the tokens, control tokens by name, in pieces: one for each run of tokens that are trained or not.
        Joined they are `tokenizer.decode(ids, skip_control=False)`. A character of several tokens goes with the last.

    Raises:
        TokenizerError: an id is not in the vocabulary.
    """
    stream = StreamDetokenizer(tokenizer, skip_control=False)
    spans: list[RenderedSpan] = []

    def add(text: str, is_trained: bool) -> None:
        if not text:
            return
        if spans and spans[-1].is_trained == is_trained:
            text = spans.pop().text + text
        spans.append(RenderedSpan(text, is_trained))

    before = False
    for token_id, is_trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if isinstance(tokenizer.token_text(token_id), str):
            add(stream.finish(), before)  # Bytes that make no character belong to the tokens that they came from.
        add(stream.push(token_id), is_trained)
        before = is_trained
    add(stream.finish(), before)
    return spans


def _encode_conversation(
    tokenizer: Tokenizer, conversation: Conversation, train_on: TrainOn, strict_system: bool
) -> EncodedExample:
    segments = encode_chat_segments(tokenizer, conversation.messages, strict_system=strict_system)
    answers = [segment.turn for segment in segments if segment.is_answer]
    given = conversation.messages[: conversation.num_given]
    answers = answers[sum(message["role"] == "model" for message in given) :]
    chosen = set(answers[-1:] if train_on == "last_answer" else answers)
    flags = _flags_of_turns(conversation.messages)
    encoded = _join([(s.ids, flags.get(s.turn, train_on == "all" or s.turn in chosen)) for s in segments])
    if train_on == "all":
        encoded.trained[[0, -1]] = False
    return encoded


def _flags_of_turns(messages: Sequence[Message]) -> dict[int | None, bool]:
    """Which turns say themselves whether they are trained. With a system message, a turn has the flags of both."""
    num_system = sum(message["role"] == "system" for message in messages)
    flags: dict[int | None, bool] = {}
    for index, message in enumerate(messages):
        if "train" in message:
            turn = max(0, index - num_system)
            flags[turn] = flags.get(turn, True) and message["train"]
    return flags


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_bos=False)


def _join(parts: Sequence[tuple[Sequence[int], bool]]) -> EncodedExample:
    return EncodedExample(
        ids=np.array([token_id for ids, _ in parts for token_id in ids], dtype=np.int32),
        trained=np.repeat([is_trained for _, is_trained in parts], [len(ids) for ids, _ in parts]),
    )
