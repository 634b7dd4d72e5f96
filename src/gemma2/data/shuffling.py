"""One source as a shuffled stream of pieces, epoch after epoch, that can stop and go on at any piece.

The shuffle buffer is a reservoir: it is filled, then each draw takes a random piece and the next one read takes its
place. Epochs are kept apart: while the last pieces of an epoch are drawn, those of the next are read into the room that
becomes free. Every piece thus comes once an epoch, and there is no pause to refill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2.data.packing import Encode, Piece, cut_length, encode_slices
from gemma2.data.sources import Document, Newlines, OnError, Position, SkipCount, iter_documents
from gemma2.errors import DataError

State = dict[str, Any]
"""Integers, strings, lists of integers and numpy arrays: what JSON and npz can hold."""

_RANDOM_BLOCK: Final = 256
_NOTHING: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What decides which pieces come, and in which order."""

    files: tuple[Path, ...]
    text_key: str
    newlines: Newlines
    on_error: OnError
    sequence_length: int
    shuffle_buffer: int
    """The most pieces in the buffer, of both epochs together."""
    seed: int
    stream_number: int
    """Sets streams with the same seed apart."""
    rank: int
    world_size: int
    epochs: int | None
    """How often the files are read; None is without end."""
    eos_id: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """How far reading has come."""

    epoch: int = 0
    position: Position = dataclasses.field(default_factory=Position)
    """Of the document that is being encoded, or of the next one."""
    character: int = 0
    """How much of that document is encoded; 0 between documents."""
    waiting: npt.NDArray[np.int32] = dataclasses.field(default_factory=_NOTHING.copy)
    """(n,) int32: tokens of that document that are encoded but in no piece yet."""


@dataclass(frozen=True, kw_only=True)
class StreamSnapshot:
    """The state of a `PieceStream` between two draws. It shares its pieces, which never change, so it is cheap."""

    place: Place = dataclasses.field(default_factory=Place)
    epoch: int = 0
    current: tuple[Piece, ...] = ()
    upcoming: tuple[Piece, ...] = ()
    num_draws: int = 0
    skipped: SkipCount = dataclasses.field(default_factory=SkipCount)

    def to_state(self) -> State:
        """Writes the snapshot as a `State`."""
        position = self.place.position
        return {
            "epoch": self.epoch,
            "num_draws": self.num_draws,
            "read_epoch": self.place.epoch,
            "read_position": [position.file_number, position.offset, position.line, position.index],
            "read_character": self.place.character,
            "read_waiting": self.place.waiting.copy(),
            "skipped": [self.skipped.errors, self.skipped.empty],
            "last_error": self.skipped.last_error,
            **pieces_to_state("current", self.current),
            **pieces_to_state("upcoming", self.upcoming),
        }

    @staticmethod
    def from_state(state: State) -> StreamSnapshot:
        """Reads what `to_state` wrote, also after a round trip through JSON or npz."""
        file_number, offset, line, index = (int(number) for number in state["read_position"])
        errors, empty = (int(number) for number in state["skipped"])
        return StreamSnapshot(
            place=Place(
                epoch=int(state["read_epoch"]),
                position=Position(file_number=file_number, offset=offset, line=line, index=index),
                character=int(state["read_character"]),
                waiting=np.asarray(state["read_waiting"], dtype=np.int32),
            ),
            epoch=int(state["epoch"]),
            current=pieces_from_state("current", state),
            upcoming=pieces_from_state("upcoming", state),
            num_draws=int(state["num_draws"]),
            skipped=SkipCount(errors=errors, empty=empty, last_error=str(state["last_error"])),
        )


class Interrupted(Exception):
    """Raised in the thread that reads when another one has called `interrupt`."""


class PieceStream:
    """Reads, encodes, cuts and shuffles one source.

    Args:
        settings: what to read, and how.
        encode: the tokenizer, without <bos>.
    """

    def __init__(self, settings: StreamSettings, encode: Encode) -> None:
        self._settings = settings
        self._encode = encode
        self.restore(StreamSnapshot())

    @property
    def epoch(self) -> int:
        """The epoch that the next piece comes from."""
        if self._current or self._place.epoch == self._epoch:
            return self._epoch
        return self._epoch + 1

    def snapshot(self) -> StreamSnapshot:
        """The state after the last draw."""
        return StreamSnapshot(
            place=self._place,
            epoch=self._epoch,
            current=tuple(self._current),
            upcoming=tuple(self._upcoming),
            num_draws=self._num_draws,
            skipped=dataclasses.replace(self._skipped),
        )

    def restore(self, snapshot: StreamSnapshot) -> None:
        """Goes on from a snapshot. Nothing is read before the next draw."""
        self._place = snapshot.place
        self._epoch = snapshot.epoch
        self._current = list(snapshot.current)
        self._upcoming = list(snapshot.upcoming)
        self._num_draws = snapshot.num_draws
        self._skipped = dataclasses.replace(snapshot.skipped)
        self._arriving = self._read()
        self._random: tuple[int, list[int]] = (-1, [])
        self._interrupted = False

    def interrupt(self) -> None:
        """Makes a `draw` that runs in another thread give up soon, as filling the buffer may take minutes.

        After that only `restore` helps.
        """
        self._interrupted = True

    def draw(self) -> Piece | None:
        """Takes the next piece; None after the last epoch.

        Raises:
            DataError: the files cannot be read.
        """
        self._begin_epoch()
        if not self._current:
            return None
        index = self._random_number() % len(self._current)
        self._current[index], self._current[-1] = self._current[-1], self._current[index]
        piece = self._current.pop()
        # One in for one out. While what is left of this epoch is being drawn, the next one gathers.
        self._read_one(last_epoch=self._epoch + 1)
        return piece

    def _begin_epoch(self) -> None:
        """Where all of an epoch is drawn, makes the next one the current one and fills the buffer from it."""
        while not self._current:
            if self._place.epoch > self._epoch:
                self._current, self._upcoming = self._upcoming, []
                self._epoch += 1
            if self._epoch == self._settings.epochs:
                return
            while self._read_one(last_epoch=self._epoch):
                pass

    def _read_one(self, *, last_epoch: int) -> bool:
        """Reads one piece into the buffer if there is room for it, and one in the epochs up to `last_epoch`."""
        if len(self._current) + len(self._upcoming) >= self._settings.shuffle_buffer:
            return False
        while self._place.epoch <= last_epoch and self._place.epoch != self._settings.epochs:
            arrived_in = self._place.epoch
            piece = next(self._arriving)
            if piece is not None:
                (self._current if arrived_in == self._epoch else self._upcoming).append(piece)
                return True
        return False

    def _read(self) -> Iterator[Piece | None]:
        """Yields pieces in the order of the files, None after each epoch; `self._place` is always after what came."""
        settings = self._settings
        while True:
            for document in iter_documents(
                settings.files,
                text_key=settings.text_key,
                start=self._place.position,
                newlines=settings.newlines,
                epoch=self._place.epoch,
                on_error=settings.on_error,
                rank=settings.rank,
                world_size=settings.world_size,
                skipped=self._skipped,
            ):
                yield from self._read_document(document)
            self._place = Place(epoch=self._place.epoch + 1)
            yield None

    def _read_document(self, document: Document) -> Iterator[Piece]:
        epoch, length = self._place.epoch, self._settings.sequence_length
        tokens, end = self._place.waiting, self._place.character
        slices = encode_slices(document.text, self._encode, start=end)
        while True:
            last = end == len(document.text)
            while size := cut_length(len(tokens), sequence_length=length, last=last):
                piece, tokens = tokens[:size].copy(), tokens[size:]
                if last and not len(tokens):
                    self._place = Place(epoch=epoch, position=document.next_position)
                else:
                    self._place = Place(epoch=epoch, position=document.position, character=end, waiting=tokens)
                yield piece
            if last:
                return
            if self._interrupted:
                raise Interrupted
            ids, end = next(slices)
            eos = [self._settings.eos_id] if end == len(document.text) else []
            tokens = np.concatenate([tokens, np.array([*ids, *eos], dtype=np.int32)])

    def _random_number(self) -> int:
        """The next number of a sequence that depends on the seed alone, of which the state is how many were drawn.

        Taken from the bit generator and not from numpy's distributions, which may change between its versions.
        """
        block, place = divmod(self._num_draws, _RANDOM_BLOCK)
        if self._random[0] != block:
            settings = self._settings
            key = settings.seed | settings.stream_number << 64 | settings.rank << 96
            # Philox gives four numbers for each step of its counter.
            generator = np.random.Philox(key=key, counter=block * (_RANDOM_BLOCK // 4))
            self._random = (block, generator.random_raw(_RANDOM_BLOCK).tolist())
        self._num_draws += 1
        return self._random[1][place]


def pieces_to_state(name: str, pieces: Sequence[Piece]) -> State:
    """Writes pieces as one array of tokens and one of lengths."""
    return {
        f"{name}_tokens": np.concatenate([_NOTHING, *pieces]),
        f"{name}_lengths": np.array([len(piece) for piece in pieces], dtype=np.int32),
    }


def pieces_from_state(name: str, state: State) -> tuple[Piece, ...]:
    """Reads what `pieces_to_state` wrote.

    Raises:
        DataError: the lengths do not add up to the tokens.
    """
    tokens = np.asarray(state[f"{name}_tokens"], dtype=np.int32)
    lengths = np.asarray(state[f"{name}_lengths"], dtype=np.int64)
    if lengths.sum() != len(tokens) or (lengths < 1).any():
        raise DataError(f"the loader's state is damaged: {name} needs {lengths.sum()} tokens but has {len(tokens)}")
    return tuple(np.split(tokens, np.cumsum(lengths)[:-1])) if len(lengths) else ()
