"""A fixed list of batches to measure a model by, with the bytes of text that its labels stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma2.data.packing import Encode, PackedBatch, Piece, batch_rows, cut_length, encode_slices, pack_rows
from gemma2.data.sources import Newlines, OnError, iter_documents
from gemma2.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """What to measure by. Bits per byte are the sum of -ln p over all labels / ln 2 / `num_bytes`."""

    batches: tuple[PackedBatch, ...]
    num_bytes: int
    """UTF-8 bytes of the text that the labels spell. The <eos> of a document is a label too, but no bytes."""
    num_tokens: int
    """Labels in all batches, of all processes."""
    num_documents: int
    """Documents in it, the last one perhaps only in part."""


def tokenize_for_validation(
    files: str | Path | Sequence[str | Path],
    encode: Encode,
    *,
    sequence_length: int,
    batch_size: int,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    text_key: str = "text",
    newlines: Newlines = "keep",
    on_error: OnError = "raise",
    rank: int = 0,
    world_size: int = 1,
    bos_id: int = 2,
    eos_id: int = 1,
    pad_id: int = 0,
) -> ValidationSet:
    """Encodes and packs documents in the order of the files, the same each time.

    Every token of a document is a label exactly once, so that the bytes are exact. Where `max_tokens` ends a document
    early, the longest beginning of it that still fits, as far as whole paragraphs and then characters go, is encoded
    as a text of its own, without <eos>.

    Args:
        files: names, globs or folders (see `expand_files`).
        encode: the tokenizer: text to ids, without <bos>.
        sequence_length: L, places in a row.
        batch_size: B, rows of this process in a batch; the last batch is filled up with rows of padding.
        max_documents: read no more documents than this.
        max_tokens: have no more labels than this.
        text_key: the key of a JSON line that holds the text.
        newlines: as for `iter_documents`.
        on_error: as for `iter_documents`.
        rank: this process among `world_size`.
        world_size: how many processes share the batches; all have the same number of them.
        bos_id: begins each segment.
        eos_id: ends each document.
        pad_id: fills rows.

    Returns:
        This process's batches, with the numbers of all processes.

    Raises:
        DataError: the files cannot be read, or a setting is out of range.
    """
    limits = {"max_documents": max_documents, "max_tokens": max_tokens}
    for name, value in {"sequence_length": sequence_length, "batch_size": batch_size, **limits}.items():
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, but is {value}")
    pieces: list[Piece] = []
    num_bytes = num_documents = num_tokens = 0
    for document in iter_documents(files, text_key=text_key, newlines=newlines, on_error=on_error):
        room = None if max_tokens is None else max_tokens - num_tokens
        tokens, covered = _encode_beginning(document.text, encode, room, eos_id)
        num_tokens += len(tokens)
        if tokens:
            num_documents += 1
            num_bytes += len(document.text[:covered].encode())
            pieces += _cut(tokens, sequence_length)
        if num_documents == max_documents or num_tokens == max_tokens or covered < len(document.text):
            break
    if not pieces:
        raise DataError(f"max_tokens = {max_tokens} has no room for the first character of the text; raise it")
    rows = list(pack_rows(pieces, sequence_length=sequence_length))
    batches = tuple(
        batch_rows(
            rows[first + rank * batch_size : first + (rank + 1) * batch_size],
            num_rows=batch_size,
            sequence_length=sequence_length,
            bos_id=bos_id,
            pad_id=pad_id,
        )
        for first in range(0, len(rows), world_size * batch_size)
    )
    return ValidationSet(batches=batches, num_bytes=num_bytes, num_tokens=num_tokens, num_documents=num_documents)


def _encode_beginning(text: str, encode: Encode, room: int | None, eos_id: int) -> tuple[list[int], int]:
    """Encodes as much of a text as fits in `room` tokens, with <eos> if it is all; also says how many characters."""
    tokens: list[int] = []
    if room is None:
        for ids, _ in encode_slices(text, encode):
            tokens += ids
        return [*tokens, eos_id], len(text)
    start = 0
    for ids, end in encode_slices(text, encode, min_characters=0):
        if len(tokens) + len(ids) + (end == len(text)) > room:
            fitting, characters = _longest_fitting(text[start:end], encode, room - len(tokens))
            return [*tokens, *fitting], start + characters
        tokens += ids
        start = end
    return [*tokens, eos_id], len(text)


def _longest_fitting(text: str, encode: Encode, room: int) -> tuple[list[int], int]:
    fits, too_long = 0, len(text)
    ids: list[int] = []
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        tried = encode(text[:middle])
        if len(tried) <= room:
            fits, ids = middle, tried
        else:
            too_long = middle
    return ids, fits


def _cut(tokens: list[int], sequence_length: int) -> list[Piece]:
    rest = np.array(tokens, dtype=np.int32)
    pieces = []
    while size := cut_length(len(rest), sequence_length=sequence_length, last=True):
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces
