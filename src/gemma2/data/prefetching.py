"""Prepares batches in a background thread, while the state stays that of the batches that were taken."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final

from gemma2.data.loader import LoaderSnapshot, PackedLoader
from gemma2.data.packing import PackedBatch
from gemma2.data.shuffling import State
from gemma2.errors import DataError

_POLL_SECONDS: Final = 0.1

_Item = tuple[PackedBatch, LoaderSnapshot] | BaseException | None
"""A batch and the loader's state after it; or an error, raised where its batch would have come; or None at the end."""


class Prefetcher(Iterator[PackedBatch]):
    """A `PackedLoader` that works ahead in a thread, at most `depth` batches.

    The thread starts with the first batch that is asked for. It helps as far as the tokenizer or the decompression
    releases the interpreter lock, or the consumer waits for a device. Close it, or use it in a `with` statement.

    Args:
        loader: not to be used by others meanwhile.
        depth: how many batches may wait to be taken.

    Raises:
        DataError: `depth` is less than 1.
    """

    def __init__(self, loader: PackedLoader, *, depth: int = 4) -> None:
        if depth < 1:
            raise DataError(f"depth must be at least 1, but is {depth}")
        self._loader = loader
        self._depth = depth
        self._snapshot = loader.snapshot()
        self._queue: queue.Queue[_Item] = queue.Queue(depth)
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        self._thread: threading.Thread | None = None
        self._ended: BaseException | None = None

    @property
    def epoch(self) -> int:
        """As `PackedLoader.epoch`, of the batches that were taken."""
        return self._snapshot.epoch

    @property
    def documents_seen(self) -> int:
        """As `PackedLoader.documents_seen`, of the batches that were taken."""
        return self._snapshot.documents_seen

    @property
    def tokens_seen(self) -> int:
        """As `PackedLoader.tokens_seen`, of the batches that were taken."""
        return self._snapshot.tokens_seen

    @property
    def documents_skipped(self) -> int:
        """As `PackedLoader.documents_skipped`, of the batches that were taken."""
        return self._snapshot.documents_skipped

    def __next__(self) -> PackedBatch:
        if self._ended is not None:
            raise self._ended
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._loader, self._queue, self._stop), name="gemma2-prefetcher", daemon=True
            )
            self._thread.start()
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            self._ended = item if item is not None else StopIteration()
            raise self._ended
        batch, self._snapshot = item
        return batch

    def snapshot(self) -> LoaderSnapshot:
        """The state after the last batch that was taken."""
        return self._snapshot

    def state_dict(self) -> State:
        """As `PackedLoader.state_dict`, after the last batch that was taken, whatever was prepared ahead."""
        return self._snapshot.to_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `PackedLoader.load_state_dict`; batches that were prepared ahead are thrown away."""
        self.close()
        self._loader.load_state_dict(state)
        self._snapshot = self._loader.snapshot()

    def close(self) -> None:
        """Ends the thread. The loader then stands after the last batch that was taken, so that both can go on."""
        if self._thread is not None:
            self._stop.set()
            self._loader.interrupt()
            self._thread.join()
            self._stop.clear()
            self._queue = queue.Queue(self._depth)
            self._loader.restore(self._snapshot)
        self._thread, self._ended = None, None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _work(loader: PackedLoader, batches: queue.Queue[_Item], stop: threading.Event) -> None:
    """Runs in the thread. It knows nothing of the `Prefetcher`, so that one which is forgotten can be collected."""
    while not stop.is_set():
        item: _Item
        try:
            item = (next(loader), loader.snapshot())
        except StopIteration:
            item = None
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                batches.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if not isinstance(item, tuple):
            return
