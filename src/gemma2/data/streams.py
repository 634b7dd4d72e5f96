"""`StreamLoader`: one process's rows of batches that all processes share.

Documents are dealt out to a number of streams, each a `PackedLoader` that gives its share of every batch's rows. Which
rows a batch has depends on the number of streams and never on that of processes: a process opens the streams that its
rows lie in, and takes them from there. So a run goes on unchanged with more processes or fewer.

With one stream every process encodes all documents; with as many as there are processes, each encodes its own alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from gemma2.data.loader import PackedLoader
from gemma2.data.packing import PackedBatch
from gemma2.data.prefetching import Prefetcher
from gemma2.data.shuffling import State
from gemma2.errors import DataError


class StreamLoader(Iterator[PackedBatch]):
    """Rows of this process, prepared in the background. Close it, or use it in a `with` statement.

    Args:
        make_stream: makes the loader of one stream, given its number, how many there are, and its rows of a batch.
        batch_size: rows of a batch, over all processes and streams; a multiple of the number of either.
        num_streams: into how many streams documents are dealt out.
        rank: this process among `world_size`; it takes rows that stand together.
        world_size: how many processes share each batch.

    Raises:
        DataError: the rows cannot be shared out evenly, or what `make_stream` raises.
    """

    def __init__(
        self,
        make_stream: Callable[[int, int, int], PackedLoader],
        *,
        batch_size: int,
        num_streams: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, count in {"num_streams": num_streams, "processes": world_size}.items():
            if count < 1 or batch_size % count:
                raise DataError(f"the rows of a batch, {batch_size}, must be a multiple of {name}, which is {count}")
        self._num_streams = num_streams
        stream_rows, own_rows = batch_size // num_streams, batch_size // world_size
        self._first_row, self._last_row = rank * own_rows, (rank + 1) * own_rows
        self._stream_rows = stream_rows
        self._streams = {
            number: Prefetcher(make_stream(number, num_streams, stream_rows))
            for number in range(self._first_row // stream_rows, -(-self._last_row // stream_rows))
        }

    def __next__(self) -> PackedBatch:
        parts = []
        for number, stream in self._streams.items():
            first = number * self._stream_rows
            last = min(self._stream_rows, self._last_row - first)
            parts.append(next(stream).rows(max(0, self._first_row - first), last))
        return parts[0] if len(parts) == 1 else _under_each_other(parts)

    def state_dict(self) -> State:
        """The states of this process's streams; those of one stream alone as `PackedLoader.state_dict` gives it."""
        if self._num_streams == 1:
            return self._streams[0].state_dict()
        state: State = {"num_streams": self._num_streams}
        for number, stream in self._streams.items():
            state.update({f"stream{number}_{name}": value for name, value in stream.state_dict().items()})
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch at which the states were taken, in any number of processes.

        Args:
            state: the states of all processes, put together.

        Raises:
            DataError: as `PackedLoader.load_state_dict`, or it has another number of streams.
        """
        saved = int(state.get("num_streams", 1))
        if saved != self._num_streams:
            raise DataError(
                f"the loader cannot go on: documents were dealt out to {saved} streams, and are now to "
                f"{self._num_streams}; resume with the number that the state was saved with, or begin anew without it"
            )
        for number, stream in self._streams.items():
            prefix = "" if saved == 1 else f"stream{number}_"
            stream.load_state_dict(
                {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            )

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()


def _under_each_other(parts: list[PackedBatch]) -> PackedBatch:
    return PackedBatch(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        segment_ids=np.concatenate([part.segment_ids for part in parts]),
    )
