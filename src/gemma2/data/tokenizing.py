"""From files to tokenized examples: records are read, understood, encoded, cut to length, or left out and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, get_args

from gemma2.data.encoding import EncodedExample, EncodedPair, Template, TrainOn, encode_example, encode_pair
from gemma2.data.examples import Conversation, Example, PreferencePair
from gemma2.data.fingerprint import TOKENIZER_PROBE
from gemma2.data.forms import NUM_RECORDS_TO_TELL, Format, FormChoice, check_columns, choose_form, read_example
from gemma2.data.record_sources import RecordSource, find_sources
from gemma2.data.records import Record, RecordOrError
from gemma2.data.skipping import ExampleError, SkippedExamples
from gemma2.data.sources import OnError
from gemma2.data.tokenized import TokenizedBuilder, TokenizedExamples
from gemma2.errors import ChatFormatError, DataError, TokenizerError, nearest_name
from gemma2.text.tokenizer import Tokenizer

TooLong = Literal["skip", "truncate", "raise"]
"""What becomes of an example that is longer than a row: it is left out, loses its end, or is an error."""

_SECONDS_BETWEEN_REPORTS: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class TokenizingProgress:
    """How far `tokenize_examples` is."""

    num_examples: int
    """So far, without those that were skipped."""
    num_tokens: int
    num_skipped: int
    seconds: float
    fraction: float
    """How much of the sources has been read, from 0 to 1; moves in steps where files are compressed."""

    @property
    def tokens_per_second(self) -> float:
        """The rate so far."""
        return self.num_tokens / max(self.seconds, 1e-9)


def tokenize_examples(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    format: Format = "auto",
    columns: Mapping[str, str] | None = None,
    template: Template = "chat",
    train_on: TrainOn = "answers",
    too_long: TooLong = "skip",
    on_error: OnError = "raise",
    strict_system: bool = False,
    max_examples: int | None = None,
    on_progress: Callable[[TokenizingProgress], None] = lambda progress: None,
) -> TokenizedExamples:
    """Reads and encodes all examples, in the order of the files.

    Args:
        files: files, globs, folders, saved datasets and datasets of the Hub, as for `find_sources`. Each may have
            another form, but pairs and single examples do not mix.
        tokenizer: whose ids.
        sequence_length: the most places that an example may take: a place is a token that the model reads, so that
            an example of n tokens takes n - 1. Both sequences of a pair together must fit.
        format: the form of all sources, or "auto" to tell that of each from the columns of its first records.
        columns: names of columns by the names that the form has for them, {"prompt": "question"}. "system" names a
            column with a system message; it is not read unless it is named here.
        template: see `encode_example`.
        train_on: see `encode_example`; pairs cannot have "all".
        too_long: "skip" leaves out an example that is too long and counts it, whatever `on_error` says; "truncate"
            keeps its beginning, and leaves it out if that has no token to train; "raise" is an error, whatever
            `on_error` says. Of a pair the longer sequence is cut first.
        on_error: "raise", or "skip" to leave out what cannot be used and count it by reason.
        strict_system: whether a system message is an error.
        max_examples: read no more examples than this.
        on_progress: is told about ten times a second how far it is, and once at the end.

    Raises:
        DataError: a setting is not known; a form cannot be told; a file is missing; something cannot be used and is not
            to be skipped, as an `ExampleError` with its reason; or no example is left.
        MissingDependencyError: a source needs a library that is not installed.
    """
    settings = {
        "sequence_length": sequence_length,
        "format": format,
        "columns": dict(columns or {}),
        "template": template,
        "train_on": train_on,
        "too_long": too_long,
        "on_error": on_error,
        "strict_system": strict_system,
        "max_examples": max_examples,
    }
    _check_settings(settings)
    reading = _Reading(tokenizer, settings, on_progress)
    sources = find_sources(files)
    reading.read(sources)
    return reading.finish(sources)


class _Reading:
    """One call of `tokenize_examples`, on its way through the sources."""

    def __init__(
        self, tokenizer: Tokenizer, settings: Mapping[str, Any], on_progress: Callable[[TokenizingProgress], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._on_progress = on_progress
        self._builder = TokenizedBuilder()
        self._skipped = SkippedExamples()
        self._num_truncated = 0
        self._pairs_from: dict[bool, str] = {}
        """The first source that has pairs (True), and the first that has none (False)."""
        self._began = self._reported = time.monotonic()

    def read(self, sources: Sequence[RecordSource]) -> None:
        """Reads all sources, or as many examples as are wanted."""
        sizes = [source.size_bytes or 0 for source in sources]
        weights = sizes if all(sizes) else [1] * len(sources)
        for number, source in enumerate(sources):
            before = sum(weights[:number]) / sum(weights)
            for record in self._good_records(source):
                self._report(before + record.share * weights[number] / sum(weights))
                if len(self._builder) == self._settings["max_examples"]:
                    return

    def finish(self, sources: Sequence[RecordSource]) -> TokenizedExamples:
        """What was read, or an error if that is nothing."""
        self._report(1.0, always=True)
        if not len(self._builder):
            where = sources[0].name if len(sources) == 1 else f"{sources[0].name} and {len(sources) - 1} more"
            raise DataError(
                f"{where}: no example is left to train on: {self._skipped}; the last error was: "
                f"{self._skipped.last_message}"
            )
        return self._builder.build(
            are_pairs=True in self._pairs_from,
            sequence_length=self._settings["sequence_length"],
            pad_id=self._tokenizer.pad_id,
            num_truncated=self._num_truncated,
            skipped=self._skipped,
            settings={
                **{name: self._settings[name] for name in ("sequence_length", "template", "train_on", "strict_system")},
                "files": [[[source.short_name, source.size_bytes] for source in sources]],
                "tokenizer": self._tokenizer.encode(TOKENIZER_PROBE),
            },
        )

    def _good_records(self, source: RecordSource) -> Iterator[Record]:
        """Reads a source, and yields each record whose example was added."""
        records = self._without_errors(source.read())
        first = list(islice(records, NUM_RECORDS_TO_TELL))
        if not first:
            return
        columns = self._settings["columns"]
        choice = choose_form(first, format=self._settings["format"], columns=columns)
        self._begin_source(choice)
        for record in chain(first, records):
            try:
                self._add(record, read_example(record, choice.form, columns))
            except ExampleError as error:
                self._meet(error)
                continue
            yield record

    def _without_errors(self, records: Iterator[RecordOrError]) -> Iterator[Record]:
        for record in records:
            if isinstance(record, ExampleError):
                self._meet(record)
            else:
                yield record

    def _begin_source(self, choice: FormChoice) -> None:
        self._builder.begin_source(choice)
        has_pairs = choice.form.name == "preference"
        if has_pairs and self._settings["train_on"] == "all":
            raise DataError(
                f"{choice.source}: train_on: all is not for preference pairs, which differ in their answers only; set "
                "it to answers"
            )
        self._pairs_from.setdefault(has_pairs, choice.source)
        if len(self._pairs_from) == 2:
            raise DataError(
                f"{self._pairs_from[True]} holds preference pairs, but {self._pairs_from[False]} does not; "
                "train on one of them at a time"
            )

    def _meet(self, error: ExampleError) -> None:
        """Raises an error, or counts it, as the settings say."""
        on_error = self._settings["too_long"] if error.reason == "too long" else self._settings["on_error"]
        if on_error == "raise":
            raise error
        self._skipped.count(error)

    def _add(self, record: Record, example: Example) -> None:
        sequences = self._encode(record, example)
        length = self._settings["sequence_length"]
        places = [sequence.num_places for sequence in sequences]
        if not all(places):
            raise record.error("no answer", "nothing is trained, as 'train' or 'weight' of its messages say")
        room = _share_room(places, length)
        if room != places and self._settings["too_long"] != "truncate":
            needs = " and ".join(f"{needed:,}" for needed in places)
            raise record.error(
                "too long",
                f"takes {needs} places, but sequence_length is {length:,}; raise that, or set too_long to truncate "
                "or skip",
            )
        cut = [sequence.beginning(places) for sequence, places in zip(sequences, room, strict=True)]
        ids = {sequence.ids.tobytes() for sequence in cut}
        if len(ids) < len(cut) or not all(sequence.num_places for sequence in cut):
            raise record.error(
                "too long",
                f"its first {length:,} places hold nothing to train on; raise sequence_length",
            )
        self._num_truncated += room != places
        self._builder.add(record, cut)

    def _encode(self, record: Record, example: Example) -> list[EncodedExample]:
        side = example.chosen if isinstance(example, PreferencePair) else example
        template = self._settings["template"]
        if template == "none" and isinstance(side, Conversation):
            raise record.error("needs the chat template", "a list of messages can only be a chat; set template to chat")
        options = {name: self._settings[name] for name in ("template", "train_on", "strict_system")}
        try:
            if not isinstance(example, PreferencePair):
                return [encode_example(self._tokenizer, example, **options)]
            pair = encode_pair(self._tokenizer, example, **options)
        except ChatFormatError as error:
            raise record.error("wrong roles", str(error)) from None
        except TokenizerError as error:
            raise record.error("not text", str(error)) from None
        return self._both(record, pair)

    def _both(self, record: Record, pair: EncodedPair) -> list[EncodedExample]:
        if pair.chosen.ids.tolist() == pair.rejected.ids.tolist():
            raise record.error("no preference", "'chosen' and 'rejected' are the same; remove the example")
        return [pair.chosen, pair.rejected]

    def _report(self, fraction: float, *, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self._reported = now
            self._on_progress(
                TokenizingProgress(
                    num_examples=len(self._builder),
                    num_tokens=self._builder.num_tokens,
                    num_skipped=self._skipped.total,
                    seconds=now - self._began,
                    fraction=fraction,
                )
            )


def _share_room(places: list[int], length: int) -> list[int]:
    """How many places each of one or two sequences gets, so that all fit; the longer one is cut first."""
    if sum(places) <= length:
        return places
    if len(places) == 1:
        return [length]
    shorter = min(places)
    least = min(shorter, length // 2)
    return [least if needed == shorter else length - least for needed in places]


def _check_settings(settings: Mapping[str, Any]) -> None:
    choices = {
        "format": Format,
        "template": Template,
        "train_on": TrainOn,
        "too_long": TooLong,
        "on_error": OnError,
    }
    for name, literal in choices.items():
        value, known = settings[name], get_args(literal)
        if value not in known:
            raise DataError(
                f"{name} must be one of {', '.join(known)}, but is {value!r}.{nearest_name(str(value), known)}"
            )
    for name in ("sequence_length", "max_examples"):
        value = settings[name]
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, but is {value}")
    check_columns(settings["columns"], settings["format"])
