"""Streams documents from text and JSON-lines files, one after the other, resumable at every document.

Errors name the file and the line. With ``on_error="skip"`` what cannot be read is passed over and counted instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, get_args

from gemma2.data.files import STREAM_ERRORS, expand_files, is_json_lines, open_bytes
from gemma2.errors import DataError, nearest_name

Newlines = Literal["keep", "lf", "both"]
OnError = Literal["raise", "skip"]

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_MAX_KEYS_SHOWN: Final = 12


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place between two documents of a list of files."""

    file_number: int = 0
    """Which file of the list."""
    offset: int = 0
    """Bytes of that file, decompressed, that lie before."""
    line: int = 0
    """Lines of that file that lie before."""
    index: int = 0
    """Documents of all files that lie before."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, and where it was found."""

    text: str
    file: Path
    line: int
    """The line of `file` on which the document begins, from 1."""
    index: int
    """Running number over all files, from 0. Documents that were skipped, for whatever reason, have one too."""
    position: Position
    """`iter_documents(start=position)` begins with this document."""
    next_position: Position
    """`iter_documents(start=next_position)` begins with the document after this one."""


@dataclass(kw_only=True)
class SkipCount:
    """What a pass over the files has left out. `iter_documents` counts up in it."""

    errors: int = 0
    """Documents that could not be read, and files that ended in damaged data."""
    empty: int = 0
    """Documents without any text."""
    last_error: str = ""
    """The message of the last error that was passed over."""


def iter_documents(
    files: str | Path | Sequence[str | Path],
    *,
    text_key: str = "text",
    text_key_is_fixed: bool = False,
    start: Position | None = None,
    newlines: Newlines = "keep",
    epoch: int = 0,
    on_error: OnError = "raise",
    rank: int = 0,
    world_size: int = 1,
    skipped: SkipCount | None = None,
) -> Iterator[Document]:
    """Reads documents in the order of the files and of the lines in them. Holds one document in memory at a time.

    A `.txt` file is one document; in `.jsonl` and `.json` every line that is not blank is one. Documents with an empty
    text are passed over: they would teach a model to end at once.

    Args:
        files: names, globs or folders, as for `expand_files`.
        text_key: the key of a JSON object that holds its text; a `.txt` file needs none.
        text_key_is_fixed: whether the user has no way to set `text_key`, so that no error advises it.
        start: where to begin, from a `Document`; what lies before is decompressed but neither split nor parsed.
        newlines: "keep" leaves them; "lf" turns CRLF and CR into LF; "both" does so for every second document, and for
            the other half in the next epoch, so that a model learns both forms.
        epoch: the number of the pass over the files; only "both" depends on it.
        on_error: "raise", or "skip" to leave out what cannot be read and count it in `skipped`.
        rank: together with `world_size`, yields only documents whose running number is `rank` modulo `world_size`.
            The others are not parsed, so that an error in one of them is seen by its own rank only.
        world_size: the number of ranks that share the documents.
        skipped: counts what was left out.

    Raises:
        DataError: nothing found; not JSON, key missing, text not a string, broken UTF-8, a truncated or damaged
            compressed file, an empty file; or, whatever `on_error` says, a full pass that yields no document at all.
    """
    check_reading(newlines=newlines, on_error=on_error, rank=rank, world_size=world_size)
    paths = expand_files(files)
    return _iter_documents(
        paths,
        text_key=text_key,
        text_key_is_fixed=text_key_is_fixed,
        start=start or Position(),
        newlines=newlines,
        epoch=epoch,
        on_error=on_error,
        rank=rank,
        world_size=world_size,
        skipped=skipped if skipped is not None else SkipCount(),
    )


def check_reading(*, newlines: str, on_error: str, rank: int, world_size: int) -> None:
    """Checks settings of `iter_documents` before anything is read.

    Raises:
        DataError: one of them is out of range.
    """
    for name, value, choices in (("newlines", newlines, get_args(Newlines)), ("on_error", on_error, get_args(OnError))):
        if value not in choices:
            expected = ", ".join(choices)
            raise DataError(f"{name} must be one of {expected}, but is {value!r}.{nearest_name(value, choices)}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, but is {rank}")


def to_line_feeds(text: str) -> str:
    """Turns every CRLF and every lone CR into LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True, kw_only=True)
class RawRecord:
    """The bytes of a line, or of a whole text, not yet parsed."""

    data: bytes
    position: Position
    next_position: Position


def _iter_documents(
    paths: list[Path],
    *,
    text_key: str,
    text_key_is_fixed: bool,
    start: Position,
    newlines: Newlines,
    epoch: int,
    on_error: OnError,
    rank: int,
    world_size: int,
    skipped: SkipCount,
) -> Iterator[Document]:
    def fail(message: str) -> None:
        if on_error == "raise":
            raise DataError(message) from None
        skipped.errors += 1
        skipped.last_error = message

    num_documents = 0
    position = start
    while position.file_number < len(paths):
        path = paths[position.file_number]
        as_json = is_json_lines(path)
        num_records = 0
        try:
            with open_bytes(path, offset=position.offset) as stream:
                for record in json_lines(stream, position) if as_json else _text_record(stream, position):
                    num_records += 1
                    index = record.position.index
                    position = record.next_position
                    if index % world_size != rank:
                        continue
                    line = record.position.line + 1
                    try:
                        text = decode_utf8(record.data, path, line)
                        if as_json:
                            text = _json_text(text, path, line, text_key, is_fixed=text_key_is_fixed)
                    except DataError as error:
                        fail(str(error))
                        continue
                    if not text:
                        skipped.empty += 1
                        continue
                    num_documents += 1
                    yield Document(
                        text=to_line_feeds(text)
                        if newlines == "lf" or (newlines == "both" and (index + epoch) % 2)
                        else text,
                        file=path,
                        line=line,
                        index=index,
                        position=record.position,
                        next_position=record.next_position,
                    )
        except STREAM_ERRORS as error:
            fail(f"{path}: cannot be read after line {position.line}: the file is truncated or damaged ({error})")
        else:
            if not num_records and not position.offset:
                fail(f"{path}: the file holds no document; remove it or fill it")
        position = Position(file_number=position.file_number + 1, index=position.index)
    if not num_documents and start == Position():
        raise DataError(_nothing_message(paths, position.index, rank, world_size, skipped))


def _nothing_message(paths: list[Path], num_records: int, rank: int, world_size: int, skipped: SkipCount) -> str:
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files"
    if 0 < num_records <= rank:
        return f"{where}: {num_records} documents are too few to share among {world_size} ranks; rank {rank} has none"
    details = f"{skipped.errors} could not be read, {skipped.empty} were empty"
    last = f"; the last error was: {skipped.last_error}" if skipped.last_error else ""
    return f"{where}: no document is left: {details}{last}"


def json_lines(stream: BinaryIO, position: Position) -> Iterator[RawRecord]:
    """Splits a stream into lines, without the byte order mark and without lines that are blank.

    Args:
        stream: stands at `position`.
        position: of the first line.

    Raises:
        STREAM_ERRORS: the stream is damaged.
    """
    for data in stream:
        following = Position(
            file_number=position.file_number,
            offset=position.offset + len(data),
            line=position.line + 1,
            index=position.index,
        )
        if not position.offset:
            data = data.removeprefix(BYTE_ORDER_MARK)
        if data.isspace() or not data:
            position = following
            continue
        following = Position(
            file_number=following.file_number, offset=following.offset, line=following.line, index=position.index + 1
        )
        yield RawRecord(data=data, position=position, next_position=following)
        position = following


def _text_record(stream: BinaryIO, position: Position) -> Iterator[RawRecord]:
    data = stream.read()
    if data:
        following = Position(
            file_number=position.file_number,
            offset=position.offset + len(data),
            line=position.line + data.count(b"\n"),
            index=position.index + 1,
        )
        yield RawRecord(data=data.removeprefix(BYTE_ORDER_MARK), position=position, next_position=following)


def _json_text(source: str, path: Path, line: int, text_key: str, *, is_fixed: bool) -> str:
    record = parse_json_line(source, path, line)
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {line}: a JSON object is needed, but the line is a {json_type(record)}")
    if text_key not in record:
        keys = list(record)
        advice = f"The text must be under {text_key!r}." if is_fixed else "Set text_key to the one that holds the text."
        raise DataError(
            f"{path}, line {line}: no key {text_key!r}; the keys are {shown_keys(keys)}."
            f"{nearest_name(text_key, keys, cutoff=0.8)} {advice}"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(f"{path}, line {line}: {text_key!r} must be a string, but is a {json_type(text)}")
    # JSON may spell half of a surrogate pair ("\ud800"), which is no text: it has no UTF-8 form.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}, line {line}: {text_key!r} holds half of a surrogate pair at character {error.start}"
        ) from None
    return text


def parse_json_line(source: str, path: Path, line: int) -> object:
    """Parses one line of JSON; `path` and `line` are for the error.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(source.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{path}, line {line}: not JSON: {reason}; one JSON object a line is needed") from None


def decode_utf8(data: bytes, path: Path, line: int) -> str:
    """Decodes bytes of a file of which the first stand on `line`.

    Raises:
        DataError: they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        raise DataError(
            f"{path}, line {line}: not UTF-8: byte 0x{data[error.start]:02x} at byte {column} of the line"
            f" ({error.reason}); save the file as UTF-8"
        ) from None


def json_type(value: object) -> str:
    """What JSON calls the type of a value; the name in Python of one that JSON does not have."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown_keys(keys: Sequence[str]) -> str:
    """The first few of an object's keys, for an error."""
    shown = ", ".join(repr(key) for key in keys[:_MAX_KEYS_SHOWN])
    return (shown + (", …" if len(keys) > _MAX_KEYS_SHOWN else "")) or "none"
