"""`PackedLoader`: from files to packed batches, stopped and resumed at any batch without a difference.

What comes next depends on the files, the tokenizer and the settings alone: no clock, no thread, no global random state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gemma2.data.files import expand_files
from gemma2.data.fingerprint import TOKENIZER_PROBE, check_same_fingerprint
from gemma2.data.packing import LOOKAHEAD, Encode, PackedBatch, Piece, batch_rows, pack_row
from gemma2.data.shuffling import (
    PieceStream,
    State,
    StreamSettings,
    StreamSnapshot,
    pieces_from_state,
    pieces_to_state,
)
from gemma2.data.sources import Newlines, OnError, check_reading
from gemma2.errors import DataError

_STATE_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that are mixed with those of other sources."""

    files: str | Path | Sequence[str | Path]
    weight: float = 1.0
    """This source's share of the tokens is its weight over the sum of all weights."""


@dataclass(frozen=True, kw_only=True)
class LoaderSnapshot:
    """The state of a `PackedLoader` after a batch. It shares memory with the loader, so it is cheap to take."""

    settings: str
    streams: tuple[StreamSnapshot, ...]
    tokens_drawn: tuple[int, ...]
    """Tokens taken from each source."""
    epochs_drawn: tuple[int, ...]
    """The epoch of the last piece taken from each source."""
    pool: tuple[Piece, ...]
    documents_seen: int
    """Documents whose end was in a batch that was returned."""
    tokens_seen: int
    """Labels in the batches that were returned."""

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the last pieces came from; of the source that is least far on."""
        return min(self.epochs_drawn)

    @property
    def documents_skipped(self) -> int:
        """Documents that were read and left out because of an error (``on_error="skip"``), in all epochs so far."""
        return sum(stream.skipped.errors for stream in self.streams)

    def to_state(self) -> State:
        """Writes the snapshot as plain integers, strings, lists of integers and numpy arrays, under plain names."""
        state: State = {
            "version": _STATE_VERSION,
            "settings": self.settings,
            "documents_seen": self.documents_seen,
            "tokens_seen": self.tokens_seen,
            "tokens_drawn": list(self.tokens_drawn),
            "epochs_drawn": list(self.epochs_drawn),
            **pieces_to_state("pool", self.pool),
        }
        for number, stream in enumerate(self.streams):
            state.update({f"source{number}_{name}": value for name, value in stream.to_state().items()})
        return state


class PackedLoader(Iterator[PackedBatch]):
    """Batches of packed rows from text files, for pretraining.

    Documents are read in order, encoded, cut into pieces, shuffled in a buffer of pieces, and packed (see `packing`).
    The last batch of the last epoch is filled up with rows of padding, so that all batches have one shape.

    Args:
        files: names, globs or folders (see `expand_files`), or a list of `Source` to mix.
        encode: the tokenizer: text to ids, without <bos>.
        sequence_length: L, places in a row.
        batch_size: B, rows in a batch.
        shuffle_buffer: pieces of up to L tokens that are shuffled among each other; 1 keeps the order.
        seed: from 0 to 2**64 - 1; sets the order.
        text_key: the key of a JSON line that holds the text.
        newlines: "keep", "lf" or "both" (see `iter_documents`).
        epochs: how often each source is read; None is without end. Epochs are exact: each piece comes once in each.
        on_error: "raise" or "skip" for documents that cannot be read.
        rank: this process among `world_size`; each sees documents of its own. Ranks need not come to the end of an
            epoch at the same batch, so that several ranks should count steps and leave `epochs` at None.
        world_size: how many processes share the data.
        bos_id: begins each segment.
        eos_id: ends each document.
        pad_id: fills rows.

    Raises:
        DataError: a setting is out of range, nothing is found, or, while iterating, a file cannot be read.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path] | Sequence[Source],
        encode: Encode,
        *,
        sequence_length: int,
        batch_size: int,
        shuffle_buffer: int = 16384,
        seed: int = 0,
        text_key: str = "text",
        newlines: Newlines = "keep",
        epochs: int | None = None,
        on_error: OnError = "raise",
        rank: int = 0,
        world_size: int = 1,
        bos_id: int = 2,
        eos_id: int = 1,
        pad_id: int = 0,
    ) -> None:
        _check_at_least_one(
            sequence_length=sequence_length, batch_size=batch_size, shuffle_buffer=shuffle_buffer, world_size=world_size
        )
        if epochs is not None:
            _check_at_least_one(epochs=epochs)
        if not 0 <= seed < 1 << 64:
            raise DataError(f"seed must be from 0 to 2**64 - 1, but is {seed}")
        check_reading(newlines=newlines, on_error=on_error, rank=rank, world_size=world_size)
        sources = _as_sources(files)
        settings = [
            StreamSettings(
                files=tuple(expand_files(source.files)),
                text_key=text_key,
                newlines=newlines,
                on_error=on_error,
                sequence_length=sequence_length,
                shuffle_buffer=shuffle_buffer,
                seed=seed,
                stream_number=number,
                rank=rank,
                world_size=world_size,
                epochs=epochs,
                eos_id=eos_id,
            )
            for number, source in enumerate(sources)
        ]
        self._weights = [source.weight for source in sources]
        self._streams = [PieceStream(stream_settings, encode) for stream_settings in settings]
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._bos_id, self._eos_id, self._pad_id = bos_id, eos_id, pad_id
        self._settings = json.dumps(
            {
                "sequence_length": sequence_length,
                "shuffle_buffer": shuffle_buffer,
                "seed": seed,
                "text_key": text_key,
                "newlines": newlines,
                "rank": rank,
                "world_size": world_size,
                "bos_id": bos_id,
                "eos_id": eos_id,
                "weights": self._weights,
                "files": [[[path.name, path.stat().st_size] for path in stream.files] for stream in settings],
                "tokenizer": [int(token) for token in encode(TOKENIZER_PROBE)],
            }
        )
        self._snapshot = LoaderSnapshot(
            settings=self._settings,
            streams=tuple(stream.snapshot() for stream in self._streams),
            tokens_drawn=(0,) * len(sources),
            epochs_drawn=(0,) * len(sources),
            pool=(),
            documents_seen=0,
            tokens_seen=0,
        )
        self.restore(self._snapshot)

    @property
    def epoch(self) -> int:
        """As `LoaderSnapshot.epoch`, after the last batch."""
        return self._snapshot.epoch

    @property
    def documents_seen(self) -> int:
        """Documents whose end was in a batch that was returned."""
        return self._snapshot.documents_seen

    @property
    def tokens_seen(self) -> int:
        """Labels in the batches that were returned."""
        return self._snapshot.tokens_seen

    @property
    def documents_skipped(self) -> int:
        """As `LoaderSnapshot.documents_skipped`, after the last batch."""
        return self._snapshot.documents_skipped

    def __next__(self) -> PackedBatch:
        try:
            batch = self._next_batch()
        except StopIteration:
            raise
        except BaseException:
            # Half a batch is lost otherwise; like this a second try meets the same error and not the end of the data.
            self.restore(self._snapshot)
            raise
        self._snapshot = LoaderSnapshot(
            settings=self._settings,
            streams=tuple(stream.snapshot() for stream in self._streams),
            tokens_drawn=tuple(self._tokens_drawn),
            epochs_drawn=tuple(self._epochs_drawn),
            pool=tuple(self._pool),
            documents_seen=self._snapshot.documents_seen + int(np.count_nonzero(batch.labels == self._eos_id)),
            tokens_seen=self._snapshot.tokens_seen + batch.num_tokens,
        )
        return batch

    def snapshot(self) -> LoaderSnapshot:
        """The state after the last batch that was returned; make a `state_dict` of it with `to_state`."""
        return self._snapshot

    def state_dict(self) -> State:
        """The state after the last batch that was returned: integers, strings, lists and numpy arrays, by plain names.

        It holds the tokens in the shuffle buffer: about shuffle_buffer * sequence_length * 4 bytes.
        """
        return self._snapshot.to_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch at which `state_dict` was taken, without encoding again what came before.

        `batch_size`, `epochs` and `on_error` may have changed, and files may lie in another folder.

        Args:
            state: from `state_dict`, also after a round trip through JSON or npz.

        Raises:
            DataError: the state is damaged, or belongs to other settings, files or another tokenizer.
        """
        try:
            version = int(state["version"])
            if version != _STATE_VERSION:
                raise DataError(f"the loader's state has version {version}, but only {_STATE_VERSION} can be read")
            check_same_fingerprint(str(state["settings"]), self._settings)
            streams = []
            for number in range(len(self._streams)):
                prefix = f"source{number}_"
                own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                streams.append(StreamSnapshot.from_state(own))
            snapshot = LoaderSnapshot(
                settings=self._settings,
                streams=tuple(streams),
                tokens_drawn=tuple(int(number) for number in state["tokens_drawn"]),
                epochs_drawn=tuple(int(number) for number in state["epochs_drawn"]),
                pool=pieces_from_state("pool", dict(state)),
                documents_seen=int(state["documents_seen"]),
                tokens_seen=int(state["tokens_seen"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"this is no state of a PackedLoader, or a damaged one: {error!r}") from None
        self.restore(snapshot)

    def interrupt(self) -> None:
        """Makes a `next` that runs in another thread raise `Interrupted` soon; the loader then stands before it."""
        for stream in self._streams:
            stream.interrupt()

    def restore(self, snapshot: LoaderSnapshot) -> None:
        """Goes on after the batch at which `snapshot` was taken of this loader."""
        for stream, stream_snapshot in zip(self._streams, snapshot.streams, strict=True):
            stream.restore(stream_snapshot)
        self._tokens_drawn = list(snapshot.tokens_drawn)
        self._epochs_drawn = list(snapshot.epochs_drawn)
        self._pool = list(snapshot.pool)
        self._snapshot = snapshot

    def _next_batch(self) -> PackedBatch:
        rows: list[list[Piece]] = []
        while len(rows) < self._batch_size:
            self._fill_pool()
            if not self._pool:
                break
            rows.append(pack_row(self._pool, sequence_length=self._sequence_length))
        if not rows:
            raise StopIteration
        return batch_rows(
            rows,
            num_rows=self._batch_size,
            sequence_length=self._sequence_length,
            bos_id=self._bos_id,
            pad_id=self._pad_id,
        )

    def _fill_pool(self) -> None:
        waiting = sum(len(piece) for piece in self._pool)
        unfinished = set(range(len(self._streams)))
        while unfinished and len(self._pool) < LOOKAHEAD:
            # The source that is furthest behind its share comes next.
            number = min(unfinished, key=lambda i: (self._tokens_drawn[i] / self._weights[i], i))
            stream = self._streams[number]
            if stream.epoch != self._epochs_drawn[number] and waiting >= self._sequence_length:
                return  # A small source must not be in the pool many times over: an epoch is used up before the next.
            epoch = stream.epoch
            piece = stream.draw()
            if piece is None:
                unfinished.remove(number)
                continue
            self._epochs_drawn[number] = epoch
            self._tokens_drawn[number] += len(piece)
            self._pool.append(piece)
            waiting += len(piece)


def _as_sources(files: str | Path | Sequence[str | Path] | Sequence[Source]) -> list[Source]:
    if isinstance(files, str | Path) or not any(isinstance(item, Source) for item in files):
        return [Source(files=files)]  # type: ignore[arg-type]
    sources = [item for item in files if isinstance(item, Source)]
    if len(sources) != len(files):
        raise DataError("files must be names only or Sources only, but both came")
    for source in sources:
        if not 0 < source.weight < float("inf"):
            raise DataError(f"{source.files}: the weight of a source must be a number above 0, but is {source.weight}")
    return sources


def _check_at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise DataError(f"{name} must be at least 1, but is {value}")
