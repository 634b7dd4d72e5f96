"""A large `tokenizer.json`, opened fast: a SentencePiece model of the same pieces stands for it, kept in a cache.

Hugging Face's tokenizers takes a second to read Gemma's 256,000 pieces and 580,000 merges, SentencePiece a twentieth
of that to read the pieces, from which it finds the merges itself. `twin_builder` makes the model where it is certain
that both cut every text into the same ids, and refuses where it is not; then tokenizers is used.

A twin is kept in `tokenizers` under the cache folder, under the hash of the JSON's bytes. It is

    "gemma2 tokenizer twin 1\n"   the format
    SHA-256 of all that follows
    4 bytes                       the header's length, little-endian
    header                        JSON: {"refused": why}, or control_names, longest_run, renamed (see `Twin`)
    tokenizer.model               not there if refused

and can be deleted at any time. Where it is missing, damaged, or cannot be written, opening takes longer, no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import threading
from pathlib import Path
from typing import Any, Final

from gemma2.cache_folder import cache_folder
from gemma2.text.layout import SPACE
from gemma2.text.libraries import Library, TokenizersLibrary
from gemma2.text.twin_builder import Twin, UnlikeGemmaError, build_twin

TWIN_FROM_BYTES: Final = 4_000_000
"""From this size on, a `tokenizer.json` gets a twin. A small one is read at once: the bundled model's in 20 ms."""

_MAGIC: Final = b"gemma2 tokenizer twin 1\n"
_HASH_BYTES: Final = hashlib.sha256().digest_size
_LENGTH: Final = struct.Struct("<I")


class TwinLibrary:
    """What a `tokenizer.json` says, by its twin.

    Args:
        path: the `tokenizer.json`.
        twin: what was made of it.
    """

    def __init__(self, path: Path, twin: Twin) -> None:
        import sentencepiece

        self._path = path
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=twin.model)
        self._renamed = twin.renamed
        self._renamed_ids = {piece: token_id for token_id, piece in twin.renamed.items()}
        self._runs = re.compile(f"({SPACE}{{2,{twin.longest_run}}})")
        self.control_names: frozenset[str] = frozenset(twin.control_names)
        self.vocab_size: int = self._inner.get_piece_size()

    @property
    def source(self) -> str:
        return str(self._path)

    def encode(self, text: str) -> list[int]:
        ids: list[int]
        if SPACE * 2 not in text:
            ids = self._inner.encode(text)
            return ids
        # To tokenizers a run of U+2581 in the text is a token, and what stands beside it another text.
        ids = []
        for index, part in enumerate(self._runs.split(text)):
            if index % 2:
                ids.append(self._inner.piece_to_id(part))
            elif part:
                ids += self._inner.encode(part)
        return ids

    def piece(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        piece: str = self._inner.id_to_piece(token_id)
        return self._renamed.get(token_id, piece)

    def token_id(self, piece: str) -> int | None:
        # SentencePiece answers with the unknown piece's id for what it does not know.
        token_id: int = self._renamed_ids.get(piece, self._inner.piece_to_id(piece))
        return token_id if self.piece(token_id) == piece else None

    def __reduce__(self) -> tuple[Any, ...]:
        return open_json, (self._path, 0)


def open_json(path: Path, twin_from_bytes: int = TWIN_FROM_BYTES) -> Library:
    """Opens a `tokenizer.json`, by its twin if it is large.

    The first time takes longer than without a twin, by up to a second.

    Args:
        path: the file.
        twin_from_bytes: the size of a large file.

    Raises:
        TokenizerError: as `TokenizersLibrary`.
    """
    try:
        twin = _find_twin(path) if path.stat().st_size >= twin_from_bytes else None
    except OSError:  # a cache that cannot be used; or the file, and TokenizersLibrary says what is wrong with it
        twin = None
    return TokenizersLibrary(path) if twin is None else TwinLibrary(path, twin)


def _find_twin(path: Path) -> Twin | None:
    """Returns the file's twin, made and kept if there was none; None if it can have none, or none can be kept."""
    digest = _hash_file(path)
    place = cache_folder() / "tokenizers" / f"{digest.hex()}.twin"
    header, model = _read(place)
    if not header:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(place.parent, os.W_OK):
            return None  # it would be made again each time
        data = path.read_bytes()
        if hashlib.sha256(data).digest() != digest:
            return None  # somebody is writing it
        header, model = _make(data)
        _write(place, header, model)
    if "refused" in header:
        return None
    return Twin(
        model=model,
        control_names=tuple(header["control_names"]),
        longest_run=header["longest_run"],
        renamed={int(token_id): piece for token_id, piece in header["renamed"].items()},
    )


def _hash_file(path: Path) -> bytes:
    """SHA-256 takes 10 ms for Gemma's file where the processor has instructions for it; xxhash, 1, is not installed."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            hasher.update(buffer[:length])
    return hasher.digest()


def _make(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Makes a twin's header and model, or a header that keeps anyone from trying again."""
    try:
        twin = build_twin(data)
    except UnlikeGemmaError as error:
        return {"refused": str(error)}, b""
    header = {"control_names": twin.control_names, "longest_run": twin.longest_run, "renamed": twin.renamed}
    # Through JSON, so that it is what will be read again.
    return json.loads(json.dumps(header)), twin.model


def _read(place: Path) -> tuple[dict[str, Any], bytes]:
    """Reads the header and the model; the header is empty if there is no file, or it is damaged."""
    try:
        data = place.read_bytes()
    except OSError:
        return {}, b""
    start = len(_MAGIC) + _HASH_BYTES
    body = memoryview(data)[start:]
    if data[:start] != _MAGIC + hashlib.sha256(body).digest():
        return {}, b""
    length = _LENGTH.unpack_from(body)[0]
    header: dict[str, Any] = json.loads(bytes(body[_LENGTH.size : _LENGTH.size + length]))
    return header, bytes(body[_LENGTH.size + length :])


def _write(place: Path, header: dict[str, Any], model: bytes) -> None:
    """Writes a twin beside its place, and then renames it, so that nobody ever sees half of it."""
    encoded = json.dumps(header).encode()
    body = b"".join((_LENGTH.pack(len(encoded)), encoded, model))
    beside = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        beside.write_bytes(b"".join((_MAGIC, hashlib.sha256(body).digest(), body)))
        beside.replace(place)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
