"""A record's fields, under the names that forms have for them, with an error for each that is not as it must be.

Messages are read in the two spellings that are in use, {"role", "content"} and {"from", "value"}, and come out in one.
Either may say whether its turn is trained: "train" outranks the settings, and "weight" is a factor of the loss, 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gemma2.data.records import Record
from gemma2.data.sources import json_type, shown_keys
from gemma2.errors import nearest_name
from gemma2.text.chat import Message

SYSTEM_COLUMN: Final = "system"
_SPELLINGS: Final = (("role", "content"), ("from", "value"))
_ROLES: Final = {
    "system": "system",
    "user": "user",
    "human": "user",
    "model": "model",
    "assistant": "model",
    "gpt": "model",
    "chatgpt": "model",
    "bing": "model",
    "bard": "model",
}


class Fields:
    """One record's fields.

    Args:
        record: where they are.
        columns: the record's names of fields that are not called as the form calls them.
    """

    def __init__(self, record: Record, columns: Mapping[str, str]) -> None:
        self.record = record
        self._columns = columns

    def has(self, name: str) -> bool:
        """Whether the field is there and not null. A column that `columns` gives to one field is no other's."""
        if name not in self._columns and name in self._columns.values():
            return False
        return self.record.values.get(self._columns.get(name, name)) is not None

    def value(self, name: str) -> Any:
        """The field, of whatever type.

        Raises:
            ExampleError: the record does not have it.
        """
        column = self._columns.get(name, name)
        values = self.record.values
        if column not in values:
            keys = list(values)
            mapped = f", which is to be {name!r}" if column != name else ""
            raise self.record.error(
                "missing column",
                f"no column {column!r}{mapped}; the columns are {shown_keys(keys)}.{nearest_name(column, keys)}",
            )
        return values[column]

    def text(self, name: str, *, may_be_blank: bool = False) -> str:
        """The field, which must be a text.

        Raises:
            ExampleError: it is not there, no text, or blank.
        """
        value = self.value(name)
        if not isinstance(value, str):
            raise self.record.error("not text", f"{name!r} must be a string, but is {_a_type(value)}")
        self._check_text(value, repr(name))
        if not may_be_blank and not value.strip():
            raise self.record.error("empty turn", f"{name!r} is empty; remove the example or fill it")
        return value

    def messages(self, name: str) -> tuple[Message, ...]:
        """The field, which must be a list of messages; see `examples.Conversation` for what comes out.

        The order of the roles is not checked, which the chat format does.

        Raises:
            ExampleError: it is not there or no such list, or a message is blank, has another role, no text, or a flag
                that is neither yes nor no.
        """
        value = self.value(name)
        if not isinstance(value, list | tuple):
            raise self.record.error(
                "not messages",
                f"{name!r} must be a list of messages {{'role': …, 'content': …}}, but is {_a_type(value)}",
            )
        if not value:
            raise self.record.error("empty turn", f"{name!r} has no messages; remove the example or fill it")
        return tuple(self._message(message, f"{name!r}, message {index}") for index, message in enumerate(value))

    def is_messages(self, name: str) -> bool:
        """Whether the field is a list, so that `messages` and not `text` should read it."""
        return isinstance(self.value(name), list | tuple)

    def system(self) -> tuple[Message, ...]:
        """The system message that a column of its own holds, if `columns` names one and it is not blank; or nothing.

        Raises:
            ExampleError: it is no text.
        """
        if SYSTEM_COLUMN not in self._columns or not self.has(SYSTEM_COLUMN):
            return ()
        text = self.text(SYSTEM_COLUMN, may_be_blank=True)
        return ({"role": "system", "content": text},) if text.strip() else ()

    def _message(self, message: object, where: str) -> Message:
        if not isinstance(message, Mapping):
            raise self.record.error(
                "not messages", f"{where} must be an object with 'role' and 'content', but is {_a_type(message)}"
            )
        # A table has all columns in all rows: what a message does not have is null there.
        spelling = next((keys for keys in _SPELLINGS if all(message.get(key) is not None for key in keys)), None)
        spelling = spelling or next((keys for keys in _SPELLINGS if all(key in message for key in keys)), None)
        if spelling is None:
            raise self.record.error(
                "not messages",
                f"{where} needs 'role' and 'content', or 'from' and 'value', but has {shown_keys(list(message))}",
            )
        role, content = (message[key] for key in spelling)
        if not isinstance(role, str) or role not in _ROLES:
            raise self.record.error(
                "wrong roles",
                f"{where}: the role must be one of {', '.join(_ROLES)}, but is {role!r}."
                f"{nearest_name(str(role), _ROLES)}",
            )
        text = self._content(content, where)
        if _ROLES[role] != "system" and not text.strip():
            raise self.record.error("empty turn", f"{where}: the turn of {role!r} is empty")
        flag = self._flag(message, where)
        return {"role": _ROLES[role], "content": text} | ({} if flag is None else {"train": flag})

    def _flag(self, message: Mapping[str, Any], where: str) -> bool | None:
        """Whether a message's turn is trained; None where the settings decide, as they do with a weight of 1."""
        flags: dict[str, bool | None] = {}
        for name in ("train", "weight"):
            value = message.get(name)
            # A table may hold them as floats. Anything else, such as "no", might be meant the other way round.
            if value is not None and not (isinstance(value, int | float) and value in (0, 1)):
                raise self.record.error(
                    "wrong flag", f"{where}: {name!r} must be true, false, 1 or 0, but is {value!r:.40}"
                )
            flags[name] = None if value is None else bool(value)
        if flags["train"] and flags["weight"] is False:
            raise self.record.error("wrong flag", f"{where}: 'train' says yes, but 'weight' no; leave one of them out")
        return False if flags["weight"] is False else flags["train"]

    def _content(self, content: object, where: str) -> str:
        """The text of a message; also of a list of parts {"type": "text", "text": …}."""
        if isinstance(content, list | tuple):
            parts = [part if isinstance(part, Mapping) else {} for part in content]
            kinds = [part.get("type") for part in parts if part.get("type") != "text"]
            if kinds or not all(isinstance(part.get("text"), str) for part in parts):
                raise self.record.error(
                    "not text",
                    f"{where}: the parts of its content must be {{'type': 'text', 'text': …}}, as Gemma 2 reads only "
                    f"text, but one is {kinds[0] if kinds else 'without text'!r}",
                )
            content = "".join(part["text"] for part in parts)
        if not isinstance(content, str):
            raise self.record.error("not text", f"{where}: its content must be a text, but is {_a_type(content)}")
        self._check_text(content, where)
        return content

    def _check_text(self, text: str, where: str) -> None:
        # JSON may spell half of a surrogate pair ("\ud800"), which is no text: it has no UTF-8 form.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.record.error(
                "not text", f"{where} holds half of a surrogate pair at character {error.start}"
            ) from None


def _a_type(value: object) -> str:
    name = json_type(value)
    return name if name == "null" else f"an {name}" if name[0] in "aeiou" else f"a {name}"
