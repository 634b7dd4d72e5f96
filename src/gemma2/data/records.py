"""Records: objects with named columns, each knowing where it stood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma2.data.skipping import ExampleError, Reason

Unit = Literal["line", "item", "row"]
"""What a source counts: lines of a file, from 1 as editors do; items of an array or rows of a table, from 0."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """An object with named columns."""

    values: Mapping[str, Any]
    source: str
    """The file, folder or dataset, as errors call it."""
    unit: Unit
    number: int
    """Which line, item or row of the source."""
    line: int | None = None
    """The line on which an item of an array begins, from 1."""
    share: float = 0.0
    """How much of the source has been read, from 0 to 1; 0 where that is not known, as in compressed files."""

    @property
    def where(self) -> str:
        """Such as "chats.jsonl, line 17"."""
        return f"{self.source}, {self.unit} {self.number}" + (f" (line {self.line})" if self.line else "")

    def error(self, reason: Reason, message: str) -> ExampleError:
        """An error that says where this record stands."""
        return ExampleError(reason, f"{self.where}: {message}")


RecordOrError = Record | ExampleError
"""A reader decides nothing about an error: it gives it out in place of a record, and goes on as far as it can."""
