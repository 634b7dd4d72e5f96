"""The file format of `tokenizer.model`: written from its pieces, and checked and corrected before it is used.

The file is a protocol buffer (sentencepiece_model.proto in google/sentencepiece). Only the few fields that Gemma needs
are touched here, so the protobuf library, which `sentencepiece` does without, is not needed either:

    ModelProto      1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
    SentencePiece   1 piece (string), 2 score (float), 3 type (enum)
    TrainerSpec     3 model_type, 4 vocab_size, 35 byte_fallback, 40 … 43 the ids of unk, bos, eos and pad,
                    45 … 48 their pieces
    NormalizerSpec  1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from gemma2.errors import TokenizerError
from gemma2.text.layout import BOS, EOS, PAD, UNK


class PieceType(enum.IntEnum):
    """What a piece is; the numbers are SentencePiece's, and also GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2
_SCORE_FIELD = struct.Struct("<Bf")


class _Field(NamedTuple):
    number: int
    """The field's number in its message."""
    start: int
    """Where its key stands in the data."""
    value_start: int
    """Where its contents stand (after the length, for a string or a message)."""
    end: int
    """Where the next field begins."""
    value: int
    """The number, for a varint; else 0."""


class _DamagedError(Exception):
    """The bytes are not a protocol buffer, or end too early."""


def build_model(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> bytes:
    """Returns the contents of a `tokenizer.model` that cuts text as Gemma's does.

    Args:
        pieces: the piece of each id; a space is written U+2581.
        scores: of two neighbouring pairs, the one whose joined piece scores higher is joined first.
        types: a `PieceType` for each piece.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    body = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        entry = _bytes_field(1, piece.encode()) + _SCORE_FIELD.pack(2 << 3 | _FIXED32, score)
        if kind != PieceType.NORMAL:
            entry += _varint_field(3, kind)
        body += _bytes_field(1, entry)
    trainer = _varint_field(3, _BPE) + _varint_field(4, len(pieces)) + _varint_field(35, 1)
    specials = (UNK, BOS, EOS, PAD)
    for number, piece in enumerate(specials, start=40):
        trainer += _varint_field(number, ids[piece])
    for number, piece in enumerate(specials, start=45):
        trainer += _bytes_field(number, piece.encode())
    normalizer = _bytes_field(1, b"identity") + _varint_field(3, 0) + _varint_field(4, 0) + _varint_field(5, 1)
    return bytes(body + _bytes_field(2, trainer) + _bytes_field(3, normalizer))


def with_control_pieces(data: bytes, names: Collection[str], *, source: str) -> bytes:
    """Checks a `tokenizer.model` and returns it with the pieces called `names` made control pieces.

    In Gemma's own file <start_of_turn> and its like are user-defined pieces, which SentencePiece also finds in text
    that a user typed. A control piece is never found in text.

    Args:
        data: the contents of the file.
        names: pieces that are no text; <unk> stays as it is (SentencePiece never finds it, and older versions need it).
        source: what to call the file in errors.

    Raises:
        TokenizerError: the data are damaged or cut, or not byte-pair encoding with bytes for rare characters.
    """
    wanted = {name.encode() for name in names} - {UNK.encode()}
    parts = []
    copied = 0
    trainer: dict[int, int] = {}
    try:
        for field in _fields(data, 0, len(data)):
            if field.number == 1:
                # A piece's name comes first in its entry: key 0x0A, a length (one byte below 128), the name.
                length = data[field.value_start + 1] if field.end - field.value_start > 1 else 0
                if data[field.value_start + 2 : field.value_start + 2 + length] in wanted:
                    parts.append(data[copied : field.start])
                    parts.append(_bytes_field(1, _with_type(data, field, PieceType.CONTROL)))
                    copied = field.end
            elif field.number == 2:
                trainer = {inner.number: inner.value for inner in _fields(data, field.value_start, field.end)}
    except _DamagedError as error:
        raise TokenizerError(
            f"{source}: is not a whole SentencePiece model ({error}); it is damaged or cut short, so fetch it again"
        ) from None
    if trainer.get(3) != _BPE or not trainer.get(35):
        raise TokenizerError(
            f"{source}: a Gemma tokenizer is byte-pair encoding with byte fallback, but this SentencePiece model "
            "does not say so; it belongs to another model, or is cut short"
        )
    return b"".join((*parts, data[copied:]))


def _with_type(data: bytes, entry: _Field, kind: PieceType) -> bytes:
    kept = [data[inner.start : inner.end] for inner in _fields(data, entry.value_start, entry.end) if inner.number != 3]
    return b"".join(kept) + _varint_field(3, kind)


def _fields(data: bytes, position: int, end: int) -> Iterator[_Field]:
    """Yields the fields of the message in data[position:end]."""
    while position < end:
        start = position
        key, position = _read_varint(data, position, end)
        wire = key & 7
        value = 0
        value_start = position
        if wire == _BYTES:
            length, value_start = _read_varint(data, position, end)
            position = value_start + length
        elif wire == _VARINT:
            value, position = _read_varint(data, position, end)
        elif wire == _FIXED32:
            position += 4
        elif wire == _FIXED64:
            position += 8
        else:
            raise _DamagedError(f"an unknown kind of field at byte {start}")
        if position > end:
            raise _DamagedError(f"the field at byte {start} ends after the data")
        yield _Field(key >> 3, start, value_start, position, value)


def _read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _DamagedError(f"a number at byte {position} does not end")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint_field(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    if (
        number < 16 and len(value) < 128
    ):  # two varints of one byte each: nearly always, and a model has 512,000 of these
        return bytes((number << 3 | _BYTES, len(value))) + value
    return _key(number, _BYTES) + _varint(len(value)) + value
