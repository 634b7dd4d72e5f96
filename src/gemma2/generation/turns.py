"""A lock that several threads hold by turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType


class Turns:
    """A re-entrant lock that nobody waits long for: who gives it back and wants it again stands behind who waits.

    Python's own locks go to whoever asks first once they are free. That is the thread which gave it back, as it is
    running and the others are asleep: a thread that takes step after step would keep all others out to its end.

    Args:
        after: called by whoever has given it back.
    """

    def __init__(self, after: Callable[[], None]) -> None:
        self._after = after
        self._next = threading.Lock()
        """Held by the first of those who wait."""
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._depth = 0

    @property
    def depth(self) -> int:
        """How often the calling thread holds it."""
        return self._depth if self._holder == threading.get_ident() else 0

    def __enter__(self) -> None:
        if not self.depth:
            with self._next:
                self._lock.acquire()
            self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Gives it back; the end of a `with` does so itself."""
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
            self._lock.release()
            self._after()

    def take_if_free(self) -> bool:
        """Takes it if no thread holds it, not even this one; `give_back` has to follow."""
        if not self._lock.acquire(blocking=False):
            return False
        self._holder, self._depth = threading.get_ident(), 1
        return True
