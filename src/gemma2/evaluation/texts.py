"""Texts to measure a model by: read from files, cut into tokens, and how many bytes each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2.data import iter_documents
from gemma2.errors import DataError
from gemma2.step import TokenIds
from gemma2.text import Tokenizer

_SPACE_IN_PIECES: Final = "\u2581"


@dataclass(frozen=True, kw_only=True)
class FileText:
    """One document, or the beginning of it."""

    text: str
    file: Path
    line: int
    """The line of `file` on which it begins, from 1."""


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """A text as tokens."""

    token_ids: TokenIds
    """(n,) int32, without <bos> and <eos>. Control tokens that stand in the text are text."""
    byte_ends: npt.NDArray[np.int64]
    """(n,) bytes of the text, in UTF-8, up to the end of each token; the last is all of them."""

    def num_bytes(self, first: int, last: int) -> int:
        """UTF-8 bytes of the tokens `first` … `last` - 1. A character of several tokens is shared between them."""
        before = int(self.byte_ends[first - 1]) if first else 0
        return (int(self.byte_ends[last - 1]) if last else 0) - before


def encode_text(tokenizer: Tokenizer, text: str) -> EncodedText:
    """Cuts a text into tokens.

    Args:
        tokenizer: the model's.
        text: any text.

    Raises:
        TokenizerError: the text holds half of a surrogate pair.
    """
    token_ids = np.array(tokenizer.encode(text, add_bos=False), dtype=np.int32)
    kinds, which = np.unique(token_ids, return_inverse=True)
    written = (tokenizer.token_text(token_id) for token_id in kinds.tolist())
    lengths = np.array([len(t if isinstance(t, bytes) else t.encode()) for t in written], dtype=np.int64)
    byte_ends = np.cumsum(lengths[which], dtype=np.int64)
    if _SPACE_IN_PIECES in text:
        byte_ends += _extra_bytes(text, byte_ends)
    num_bytes = len(text.encode())
    assert (byte_ends[-1] if len(byte_ends) else 0) == num_bytes, f"{tokenizer.source} does not keep text as it is"
    return EncodedText(token_ids=token_ids, byte_ends=byte_ends)


def _extra_bytes(text: str, byte_ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes to add to the end of each token, as U+2581 takes three in the text, and tokens write it as a space."""
    starts = [len(part.encode()) for part in text.split(_SPACE_IN_PIECES)[:-1]]
    positions = np.cumsum(starts) + np.arange(len(starts))  # where the spaces stand
    extra = np.zeros(len(byte_ends), dtype=np.int64)
    np.add.at(extra, np.searchsorted(byte_ends, positions, side="right"), len(_SPACE_IN_PIECES.encode()) - 1)
    return np.cumsum(extra)


def read_texts(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    max_documents: int | None = None,
    max_tokens: int | None = None,
) -> list[FileText]:
    """Reads all documents, so that a mistake in the last one is known before the first one is scored.

    Args:
        files: names, globs or folders, as for `gemma2.data.expand_files`.
        tokenizer: counts the tokens of `max_tokens`.
        text_key: the key of a JSON line that holds the text.
        max_documents: read no more documents than this, of all files together.
        max_tokens: read no more tokens than this; the last document is cut after the last whole character that fits.

    Raises:
        DataError: the files cannot be read, hold no text, or a limit is out of range.
    """
    for name, limit in (("max_documents", max_documents), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise DataError(f"{name} must be at least 1, but is {limit}")
    texts: list[FileText] = []
    room = max_tokens
    for document in iter_documents(files, text_key=text_key):
        text = document.text
        if room is not None:
            encoded = encode_text(tokenizer, text)
            if len(encoded.token_ids) > room:
                text = text.encode()[: encoded.num_bytes(0, room)].decode(errors="ignore")
            room -= min(room, len(encoded.token_ids))
        if text:
            texts.append(FileText(text=text, file=document.file, line=document.line))
        if len(texts) == max_documents or room == 0:
            break
    if not texts:
        raise DataError(f"max_tokens = {max_tokens} has no room for the first character of the text; raise it")
    return texts
