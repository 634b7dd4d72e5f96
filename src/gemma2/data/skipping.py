"""What is wrong with an example: an error with a reason, by which those that are left out are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gemma2.errors import DataError

Reason = Literal[
    "damaged file",
    "empty file",
    "not UTF-8",
    "not JSON",
    "not an object",
    "missing column",
    "not text",
    "not messages",
    "wrong roles",
    "wrong flag",
    "empty turn",
    "no answer",
    "no preference",
    "needs the chat template",
    "too long",
]
"""Why an example cannot be used, in a few words."""


class ExampleError(DataError):
    """An example that cannot be used, or a file that cannot be read on.

    Args:
        reason: what to count it under.
        message: where it is, what was needed, what came, and what to do.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(kw_only=True)
class SkippedExamples:
    """What was left out while examples were read."""

    counts: dict[Reason, int] = field(default_factory=dict)
    """How often for each reason. A file that is damaged or empty counts as one."""
    last_message: str = ""
    """The message of the last error that was passed over."""

    @property
    def total(self) -> int:
        """How many in all."""
        return sum(self.counts.values())

    def count(self, error: ExampleError) -> None:
        """Counts one more."""
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self.last_message = str(error)

    def __str__(self) -> str:
        """Such as "3 skipped (too long: 2, not JSON: 1)", the most frequent reason first."""
        reasons = sorted(self.counts.items(), key=lambda item: -item[1])
        details = ", ".join(f"{reason}: {count:,}" for reason, count in reasons)
        return f"{self.total:,} skipped" + (f" ({details})" if details else "")
