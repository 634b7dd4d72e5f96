"""Conversations on disk: JSON, which can be loaded again, and Markdown, to be read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gemma2.cli.conversation import Conversation, Exchange, whole_text
from gemma2.errors import ChatFormatError, Gemma2Error

SUFFIXES: Final = (".json", ".md")


def check_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Checks that a file's name ends as one of the formats.

    Raises:
        Gemma2Error: it does not.
    """
    if path.suffix.lower() not in suffixes:
        raise Gemma2Error(f"{path}: a conversation's file ends in {' or '.join(suffixes)}; add that to the name")


def save_conversation(
    path: Path, conversation: Conversation, *, model: str, is_chat_tuned: bool, sampling: Mapping[str, Any]
) -> None:
    """Writes a conversation, as the suffix says; a file that is there already is replaced at once or not at all.

    Args:
        path: the file.
        conversation: what to write.
        model: its name, for the reader.
        is_chat_tuned: whether Markdown shows turns; the text of an untuned model is one text.
        sampling: the settings, for JSON.

    Raises:
        Gemma2Error: the suffix is neither, or the file cannot be written.
    """
    check_suffix(path)
    if path.suffix.lower() == ".json":
        content = {"model": model, "sampling": dict(sampling), "messages": to_messages(conversation)}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    elif is_chat_tuned:
        text = _to_markdown(conversation, model)
    else:
        text = whole_text(conversation) + "\n"
    path = path.resolve()  # what a link points to is replaced, and not the link
    if path.is_dir():
        raise Gemma2Error(f"{path}: is a folder; name a file in it")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            beside.write_text(text, encoding="utf-8", newline="\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise Gemma2Error(f"{path}: cannot be written: {error.strerror or error}") from None


def load_conversation(path: Path) -> Conversation:
    """Reads a conversation: what `save_conversation` wrote, or any JSON with a list of messages.

    Args:
        path: a list of {"role": ..., "content": ...}, or an object that has one under "messages".

    Raises:
        ChatFormatError: the file cannot be read, or is no such JSON; says what is wrong.
    """
    if path.suffix.lower() == ".md":
        raise ChatFormatError(f"{path}: Markdown is for reading; only what /save wrote to a .json file can be loaded")
    check_suffix(path, (".json",))
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ChatFormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ChatFormatError(f"{path}: is not JSON in UTF-8: {error}") from None
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list):
        raise ChatFormatError(
            f'{path}: a conversation is a list of messages, or an object that has one under "messages"; this is neither'
        )
    try:
        return from_messages(messages)
    except ChatFormatError as error:
        raise ChatFormatError(f"{path}: {error}") from None


def to_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Returns a conversation as messages, each with a role and a content; an answer that was stopped says so."""
    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for exchange in conversation.exchanges:
        messages.append({"role": "user", "content": exchange.user})
        answer: dict[str, Any] = {"role": "model", "content": exchange.answer}
        if exchange.is_interrupted:
            answer["interrupted"] = True
        messages.append(answer)
    return messages


def from_messages(messages: list[Any]) -> Conversation:
    """Makes a conversation of messages.

    Raises:
        ChatFormatError: a role is wrong, roles do not take turns, a content is no text, or an answer is missing.
    """
    from gemma2.text import render_chat

    has_system = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    turns = messages[1:] if has_system else messages
    if turns or not has_system:
        render_chat(messages, add_generation_prompt=False)
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str):
            raise ChatFormatError(f"message {index}: content must be a text, but is a {type(content).__name__}")
    if len(turns) % 2:
        raise ChatFormatError(
            f"message {len(messages) - 1}: is a user's and has no answer; leave it out, and send it after loading"
        )
    exchanges = [
        Exchange(
            user=user["content"], answer=answer["content"], is_interrupted=answer.get("interrupted", False) is True
        )
        for user, answer in zip(turns[::2], turns[1::2], strict=True)
    ]
    return Conversation(system=messages[0]["content"] if has_system else "", exchanges=exchanges)


def _to_markdown(conversation: Conversation, model: str) -> str:
    parts = [f"# A conversation with {model}"]
    if conversation.system:
        parts += ["## System", conversation.system]
    for exchange in conversation.exchanges:
        parts += ["## User", exchange.user]
        parts += ["## Model" + (" (stopped)" if exchange.is_interrupted else ""), exchange.answer]
    return "\n\n".join(part.strip() for part in parts) + "\n"
