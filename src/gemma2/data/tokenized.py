"""Examples as tokens: all of them in memory, in a few flat arrays, 4 bytes a token.

Tokens stand one sequence after the other, an example's one or a pair's two. What is trained of a sequence are runs, of
which there are as many as answers.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from gemma2.data.encoding import EncodedExample, EncodedPair
from gemma2.data.forms import FormChoice
from gemma2.data.packing import IGNORED_LABEL
from gemma2.data.records import Record
from gemma2.data.skipping import SkippedExamples

_INT32: Final = "i"
assert array(_INT32).itemsize == 4


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenizedExamples:
    """Examples, or preference pairs, that are tokenized and cut to length. Made by `tokenize_examples`."""

    tokens: npt.NDArray[np.int32]
    """(T,) int32: all sequences, each from <bos> to its last trained token."""
    sequence_starts: npt.NDArray[np.int64]
    """(S + 1,) int64: where in `tokens` each sequence begins, and where the last one ends."""
    runs: npt.NDArray[np.int32]
    """(R, 2) int32: where a run of trained tokens begins and ends, counted from the start of its sequence."""
    run_starts: npt.NDArray[np.int64]
    """(S + 1,) int64: where in `runs` those of each sequence begin, and where the last ones end."""
    numbers: npt.NDArray[np.int64]
    """(E,) int64: the line, item or row of each example."""
    source_ends: tuple[int, ...]
    """How many examples the sources up to each one have."""
    source_units: tuple[str, ...]
    """For each source, what is counted: "line", "item" or "row"."""
    choices: tuple[FormChoice, ...]
    """For each source, which form its examples have, and why."""
    are_pairs: bool
    """Whether each example is two sequences, the chosen and the rejected one."""
    sequence_length: int
    """The most places that an example takes, or a pair with both its sequences."""
    pad_id: int
    num_truncated: int
    """Examples whose end was cut off."""
    skipped: SkippedExamples
    settings: Mapping[str, Any]
    """Of what the tokens depend on, what an error can name, in plain values: settings, sources and the tokenizer."""

    def __len__(self) -> int:
        """The number of examples; a pair is one."""
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"TokenizedExamples({len(self)} {'pairs' if self.are_pairs else 'examples'}, {len(self.tokens)} tokens)"

    @property
    def sequences_per_example(self) -> int:
        """2 for pairs, else 1."""
        return 2 if self.are_pairs else 1

    @cached_property
    def num_places(self) -> npt.NDArray[np.int64]:
        """(E,) int64: the places that each example takes in a row: its tokens but the last, of both sequences."""
        by_sequence = np.diff(self.sequence_starts) - 1
        places: npt.NDArray[np.int64] = by_sequence.reshape(-1, self.sequences_per_example).sum(axis=1)
        return places

    @cached_property
    def num_trained(self) -> npt.NDArray[np.int64]:
        """(E,) int64: the tokens of each example that are trained."""
        before = np.concatenate([[0], np.cumsum(self.runs[:, 1] - self.runs[:, 0], dtype=np.int64)])
        by_sequence = np.diff(before[self.run_starts])
        trained: npt.NDArray[np.int64] = by_sequence.reshape(-1, self.sequences_per_example).sum(axis=1)
        return trained

    @property
    def trained_tokens(self) -> npt.NDArray[np.int32]:
        """(N,) int32: all tokens that are trained, in order."""
        firsts = np.repeat(self.sequence_starts[:-1], np.diff(self.run_starts))
        change = np.zeros(len(self.tokens) + 1, dtype=np.int8)
        change[firsts + self.runs[:, 0]] += 1
        change[firsts + self.runs[:, 1]] -= 1
        return self.tokens[np.cumsum(change[:-1], dtype=np.int8).astype(np.bool_)]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """`settings`, and a hash of the tokens: equal where loaders give the same batches."""
        hashed = xxhash.xxh3_128()
        for part in (self.tokens, self.sequence_starts, self.runs, self.run_starts):
            hashed.update(part.data.cast("B"))
        return {**self.settings, "contents": hashed.hexdigest()}

    def encoded(self, index: int) -> EncodedExample | EncodedPair:
        """An example's tokens, up to the last one that is trained, and which are."""
        if self.are_pairs:
            return EncodedPair(chosen=self._sequence(2 * index), rejected=self._sequence(2 * index + 1))
        return self._sequence(index)

    def where(self, index: int) -> str:
        """Where an example stands, such as "chats.jsonl, line 17"."""
        source = int(np.searchsorted(self.source_ends, index, side="right"))
        return f"{self.choices[source].source}, {self.source_units[source]} {self.numbers[index]}"

    def inputs_and_labels(self, sequence: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """What the model reads of a sequence, and what it is to say after each token.

        Args:
            sequence: from 0; a pair has two.

        Returns:
            (n,) int32 tokens, and (n,) int64 labels: the token that follows, or -100 where that is not trained.
        """
        tokens = self.tokens[self.sequence_starts[sequence] : self.sequence_starts[sequence + 1]]
        labels = np.full(len(tokens) - 1, IGNORED_LABEL, dtype=np.int64)
        for first, end in self._runs(sequence):
            labels[first - 1 : end - 1] = tokens[first:end]
        return tokens[:-1], labels

    def _sequence(self, sequence: int) -> EncodedExample:
        ids = self.tokens[self.sequence_starts[sequence] : self.sequence_starts[sequence + 1]]
        trained = np.zeros(len(ids), dtype=np.bool_)
        for first, end in self._runs(sequence):
            trained[first:end] = True
        return EncodedExample(ids=ids, trained=trained)

    def _runs(self, sequence: int) -> list[list[int]]:
        runs: list[list[int]] = self.runs[self.run_starts[sequence] : self.run_starts[sequence + 1]].tolist()
        return runs


class TokenizedBuilder:
    """Gathers encoded examples."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._tokens = array(_INT32)
        self._sequence_starts = array("q", [0])
        self._runs = array(_INT32)
        self._run_starts = array("q", [0])
        self._numbers = array("q")
        self._source_ends: list[int] = []
        self._source_units: list[str] = []
        self._choices: list[FormChoice] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, record: Record, sequences: Sequence[EncodedExample]) -> None:
        """Adds an example's one sequence or a pair's two, cut to length, each with a token that is trained."""
        self._source_units[-1] = record.unit
        self._source_ends[-1] += 1
        self._numbers.append(record.number)
        for sequence in sequences:
            assert sequence.trained[-1] and not sequence.trained[0]
            self._tokens.frombytes(sequence.ids.astype(np.int32, copy=False).tobytes())
            self.num_tokens += len(sequence.ids)
            self._sequence_starts.append(self.num_tokens)
            borders = np.flatnonzero(np.diff(sequence.trained, append=False)) + 1
            self._runs.frombytes(borders.astype(np.int32).tobytes())
            self._run_starts.append(len(self._runs) // 2)

    def begin_source(self, choice: FormChoice) -> None:
        """What is added from now on comes from the next source."""
        self._choices.append(choice)
        self._source_ends.append(len(self))
        self._source_units.append("line")

    def build(
        self,
        *,
        are_pairs: bool,
        sequence_length: int,
        pad_id: int,
        num_truncated: int,
        skipped: SkippedExamples,
        settings: Mapping[str, Any],
    ) -> TokenizedExamples:
        """All that was gathered, without copying it. Nothing can be added any more."""
        return TokenizedExamples(
            tokens=_frozen(self._tokens, np.int32),
            sequence_starts=_frozen(self._sequence_starts, np.int64),
            runs=_frozen(self._runs, np.int32).reshape(-1, 2),
            run_starts=_frozen(self._run_starts, np.int64),
            numbers=_frozen(self._numbers, np.int64),
            source_ends=tuple(self._source_ends),
            source_units=tuple(self._source_units),
            choices=tuple(self._choices),
            are_pairs=are_pairs,
            sequence_length=sequence_length,
            pad_id=pad_id,
            num_truncated=num_truncated,
            skipped=skipped,
            settings=settings,
        )


def _frozen(values: array[int], dtype: Any) -> npt.NDArray[Any]:
    found = np.frombuffer(values, dtype=dtype)
    found.flags.writeable = False
    return found
