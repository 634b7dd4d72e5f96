"""How verbs write: in colour and boxes to a terminal, in plain columns to a pipe or a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 1000
"""Columns of a line that goes to a pipe: enough that no table is folded."""


class PlainProgress:
    """Says on standard error now and then how far some work is: for logs, and for whoever waits on a pipe.

    Args:
        what: begins each line.
        clock: gives seconds.
    """

    FIRST_SECONDS: Final = 10.0
    SECONDS: Final = 30.0

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._started = clock()
        self._next = self.FIRST_SECONDS

    def update(self, done: float, total: float) -> None:
        """Is told how much is done, and of how much; work that is done soon goes without a line."""
        seconds = self._clock() - self._started
        if seconds >= self._next and 0 < done < total:
            self._next = seconds + self.SECONDS
            left = seconds * (total - done) / done
            times = f"after {format_duration(seconds)}, about {format_duration(left)} left"
            print(f"{self._what}: {done / total:.0%} {times}", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Writes "0:07", "12:34" or "1:02:03"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def make_console() -> Console:
    """Makes the console for standard output; it knows itself whether that is a terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def make_table(console: Console, *columns: str, title: str = "", left: int = 1) -> Table:
    """Makes a table whose first `left` columns are texts, and the others figures, flush right.

    Args:
        console: where it will be printed.
        columns: the headers.
        title: a line above it; none if empty.
        left: how many columns are flush left.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="bold" if console.is_terminal else "",
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        show_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return table


def heading(console: Console, text: str) -> None:
    """Prints a section's heading, a blank line before it."""
    console.print()
    console.print(text, style="bold")


def format_bytes(num_bytes: int) -> str:
    """Writes a size with the binary unit that gives it one to four digits before the point, as "2.63 GiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} GiB"


def _three_digits(size: float) -> str:
    if size >= 100:
        return f"{size:,.0f}"
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"
