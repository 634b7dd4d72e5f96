"""Gemma's chat format: messages to token ids.

    <bos><start_of_turn>user
    {text, trimmed}<end_of_turn>
    <start_of_turn>model
    {text, trimmed}<end_of_turn>
    <start_of_turn>model

The last line asks for an answer. (google/gemma-2-2b-it, chat_template in tokenizer_config.json; the report, section 5
and tables 4 and 5.) There is no system role: a system message is put before the first user turn's text, apart by a
blank line, or refused if one prefers to know. What a user types stays text, `<end_of_turn>` too: ids are made part by
part, and never from the rendered text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gemma2.errors import ChatFormatError, nearest_name
from gemma2.text.layout import BOS, END_OF_TURN, START_OF_TURN
from gemma2.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}; content may also be a list of {"type": "text", "text": "..."}."""

_USER, _MODEL, _SYSTEM = "user", "model", "system"
_ROLES: Final = {_USER: _USER, _MODEL: _MODEL, "assistant": _MODEL, _SYSTEM: _SYSTEM}


@dataclass(frozen=True)
class ChatSegment:
    """A part of a conversation's token ids."""

    ids: tuple[int, ...]
    turn: int | None
    """Whose these are, if they are a turn's text and its <end_of_turn>: 0 for the first user's. None for all else."""

    @property
    def is_answer(self) -> bool:
        """Whether the model says these. The <end_of_turn> is among them: fine-tuning must train on it too."""
        return self.turn is not None and self.turn % 2 == 1


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    strict_system: bool = False,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Returns the token ids of a conversation, with one <bos> first.

    Args:
        tokenizer: whose ids.
        messages: turns of "user" and "model" (or "assistant") by turns, the first a user's; one "system" message may
            come before them.
        strict_system: whether to refuse a system message, which Gemma 2 was not trained with.
        add_generation_prompt: whether to ask for an answer; the last turn must then be a user's.

    Raises:
        ChatFormatError: the format cannot express the messages; says which one is wrong.
    """
    segments = encode_chat_segments(
        tokenizer, messages, strict_system=strict_system, add_generation_prompt=add_generation_prompt
    )
    return [token_id for segment in segments for token_id in segment.ids]


def encode_chat_segments(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    strict_system: bool = False,
    add_generation_prompt: bool = False,
) -> list[ChatSegment]:
    """Returns the token ids of a conversation in parts: what each side says, and what stands between.

    The arguments and errors are those of `encode_chat`, whose ids the parts join to.
    """
    segments = []
    newline = tokenizer.encode("\n", add_bos=False)
    # To cut after it changes no id: the newline is always a token of its own, as a trimmed text starts with none.
    headers = {
        role: [tokenizer.start_of_turn_id, *tokenizer.encode(f"{role}\n", add_bos=False)] for role in (_USER, _MODEL)
    }
    between = [tokenizer.bos_id]
    for turn, (role, text) in enumerate(_turns(messages, strict_system, add_generation_prompt)):
        segments.append(ChatSegment((*between, *headers[role]), turn=None))
        said = [*tokenizer.encode(text, add_bos=False), tokenizer.end_of_turn_id]
        segments.append(ChatSegment(tuple(said), turn))
        between = newline
    segments.append(ChatSegment((*between, *(headers[_MODEL] if add_generation_prompt else [])), turn=None))
    return segments


def render_chat(messages: Sequence[Message], *, strict_system: bool = False, add_generation_prompt: bool = True) -> str:
    """Returns a conversation as text, <bos> included, to be read by people or another program.

    Ids come from `encode_chat`: in this text nobody can tell a control token from one that a user typed.
    The arguments and errors are those of `encode_chat`.
    """
    text = BOS
    for role, content in _turns(messages, strict_system, add_generation_prompt):
        text += f"{START_OF_TURN}{role}\n{content}{END_OF_TURN}\n"
    return text + (f"{START_OF_TURN}{_MODEL}\n" if add_generation_prompt else "")


def _turns(messages: Sequence[Message], strict_system: bool, add_generation_prompt: bool) -> list[tuple[str, str]]:
    """Checks the messages and returns (role, trimmed text) of each turn, the system text put into the first."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ChatFormatError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, but is a {type(messages).__name__}"
        )
    if not messages:
        raise ChatFormatError("a conversation needs at least one message, but the list is empty")
    turns: list[tuple[str, str]] = []
    system = ""
    for index, message in enumerate(messages):
        role = _role(index, message)
        text = _text(index, message).strip()
        if role == _SYSTEM:
            if strict_system:
                raise ChatFormatError(
                    f"message {index}: Gemma 2 has no system role, and strict mode refuses one; "
                    "put the text into the first user message"
                )
            if index:
                raise ChatFormatError(f"message {index}: a system message can only come first")
            system = text
            continue
        expected = _MODEL if len(turns) % 2 else _USER
        if role != expected:
            raise ChatFormatError(
                f"message {index}: user and model must take turns, the user first; needed {expected!r} here, "
                f"but the role is {message['role']!r}"
            )
        if system and not turns:
            text = f"{system}\n\n{text}".strip()
        turns.append((role, text))
    if not turns:
        raise ChatFormatError("message 0: a system message needs a user message after it, but there is none")
    if add_generation_prompt and turns[-1][0] != _USER:
        raise ChatFormatError(
            f"message {len(messages) - 1}: the model answers a user, but the last role is {messages[-1]['role']!r}; "
            "end with a user message, or ask for no answer (add_generation_prompt=False)"
        )
    return turns


def _role(index: int, message: object) -> str:
    if not isinstance(message, Mapping):
        raise ChatFormatError(
            f"message {index}: must be an object with 'role' and 'content', but is a {type(message).__name__}"
        )
    if "role" not in message:
        raise ChatFormatError(f"message {index}: has no 'role'; it must be one of {', '.join(_ROLES)}")
    role = message["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatFormatError(
            f"message {index}: the role must be one of {', '.join(_ROLES)}, but is {role!r}."
            f"{nearest_name(str(role), _ROLES)}"
        )
    return _ROLES[role]


def _text(index: int, message: Message) -> str:
    if "content" not in message:
        raise ChatFormatError(f"message {index}: has no 'content'; it must be a text")
    content = message["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ChatFormatError(
            f"message {index}: content must be a text or a list of text parts, but is a {type(content).__name__}"
        )
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ChatFormatError(
                f"message {index}: part {number} of the content must be {{'type': 'text', 'text': ...}}, as Gemma 2 "
                f"reads only text, but its type is {kind!r}"
            )
        texts.append(part["text"])
    return "".join(texts)


CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{%- set state = namespace(system='', turns=0) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set text = message['content'] -%}"
    "{%- else -%}"
    "{%- set text = message['content'] | map(attribute='text') | join('') -%}"
    "{%- endif -%}"
    "{%- set text = text | trim -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- if not loop.first -%}{{ raise_exception('A system message can only come first') }}{%- endif -%}"
    "{%- set state.system = text -%}"
    "{%- else -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{%- if role != ('model' if state.turns % 2 else 'user') -%}"
    "{{ raise_exception('user and model must take turns, the user first') }}"
    "{%- endif -%}"
    "{%- if state.system and state.turns == 0 -%}"
    "{%- set text = (state.system + '\\n\\n' + text) | trim -%}"
    "{%- endif -%}"
    "{%- set state.turns = state.turns + 1 -%}"
    "{{ '<start_of_turn>' + role + '\\n' + text + '<end_of_turn>\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
"""The same format as a Jinja template, for the `tokenizer_config.json` of tokenizers that are trained here."""
