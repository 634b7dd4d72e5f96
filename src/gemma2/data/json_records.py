"""Records from JSON: one object a line, or one array of objects in a `.json` file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gemma2.data.files import COMPRESSIONS, STREAM_ERRORS, open_bytes
from gemma2.data.records import Record, RecordOrError
from gemma2.data.skipping import ExampleError
from gemma2.data.sources import (
    BYTE_ORDER_MARK,
    Position,
    RawRecord,
    decode_utf8,
    json_lines,
    json_type,
    parse_json_line,
)
from gemma2.errors import DataError

_SPACES: Final = re.compile(r"[ \t\r\n]*")
_PEEK_BYTES: Final = 4096


def read_json(file: Path) -> Iterator[RecordOrError]:
    """Reads a `.jsonl` or `.json` file, compressed or not. An array is held in memory as a whole.

    Raises:
        DataError: the file cannot be opened.
    """
    compressed = file.suffix.lower() in COMPRESSIONS
    ending = file.suffixes[-2] if compressed else file.suffix
    if ending.lower() == ".json" and _begins_with_a_bracket(file):
        return _read_array(file)
    return _read_lines(file, size_bytes=None if compressed else file.stat().st_size)


def _begins_with_a_bracket(file: Path) -> bool:
    try:
        with open_bytes(file) as stream:
            return stream.read(_PEEK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["
    except STREAM_ERRORS:
        return False  # Whoever reads it next meets the error again.


def _read_lines(file: Path, *, size_bytes: int | None) -> Iterator[RecordOrError]:
    position = Position()
    try:
        with open_bytes(file) as stream:
            for line in json_lines(stream, position):
                position = line.next_position
                yield _parse(line, file, share=position.offset / size_bytes if size_bytes else 0.0)
    except STREAM_ERRORS as error:
        yield _damaged(file, f"after line {position.line}", error)
    else:
        if not position.index:
            yield _empty(file)


def _parse(line: RawRecord, file: Path, *, share: float) -> RecordOrError:
    number = line.position.line + 1
    try:
        text = decode_utf8(line.data, file, number)
    except DataError as error:
        return ExampleError("not UTF-8", str(error))
    try:
        values = parse_json_line(text, file, number)
    except DataError as error:
        return ExampleError("not JSON", str(error))
    if not isinstance(values, dict):
        return ExampleError(
            "not an object", f"{file}, line {number}: a JSON object is needed, but the line is a {json_type(values)}"
        )
    return Record(values=values, source=str(file), unit="line", number=number, share=share)


def _read_array(file: Path) -> Iterator[RecordOrError]:
    try:
        with open_bytes(file) as stream:
            data = stream.read()
    except STREAM_ERRORS as error:
        yield _damaged(file, "to its end", error)
        return
    try:
        text = decode_utf8(data.removeprefix(BYTE_ORDER_MARK), file, 1)
    except DataError as error:
        yield ExampleError("not UTF-8", str(error))
        return
    number = -1
    line, counted = 1, 0
    try:
        for number, (values, place, end) in enumerate(_items(text)):
            line += text.count("\n", counted, place)
            counted = place
            record = Record(
                values=values if isinstance(values, dict) else {},
                source=str(file),
                unit="item",
                number=number,
                line=line,
                share=end / len(text),
            )
            if isinstance(values, dict):
                yield record
            else:
                yield record.error("not an object", f"a JSON object is needed, but the item is a {json_type(values)}")
    except json.JSONDecodeError as error:
        yield ExampleError(
            "not JSON",
            f"{file}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}; "
            f"nothing {f'after item {number}' if number >= 0 else 'of the array'} can be read",
        )
    except (ValueError, RecursionError) as error:  # numbers that are too long, brackets that are too deep
        yield ExampleError("not JSON", f"{file}, item {number + 1}: not JSON: {error}")
    else:
        if number < 0:
            yield _empty(file)


def _items(text: str) -> Iterator[tuple[object, int, int]]:
    """Yields the items of an array, and at which characters each begins and ends.

    Raises:
        json.JSONDecodeError: something in the array is not JSON, or follows after it.
    """
    decoder = json.JSONDecoder()
    place = _after_spaces(text, text.index("[") + 1)
    closed = text.startswith("]", place)
    while not closed:
        value, end = decoder.raw_decode(text, place)
        yield value, place, end
        place = _after_spaces(text, end)
        closed = text.startswith("]", place)
        if not closed:
            if not text.startswith(",", place):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = _after_spaces(text, place + 1)
    place = _after_spaces(text, place + 1)
    if place < len(text):
        raise json.JSONDecodeError("Extra data after the array", text, place)


def _after_spaces(text: str, place: int) -> int:
    spaces = _SPACES.match(text, place)
    assert spaces
    return spaces.end()


def _damaged(file: Path, where: str, error: Exception) -> ExampleError:
    return ExampleError("damaged file", f"{file}: cannot be read {where}: the file is truncated or damaged ({error})")


def _empty(file: Path) -> ExampleError:
    return ExampleError("empty file", f"{file}: the file holds no example; remove it or fill it")
