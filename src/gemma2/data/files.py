"""From names to bytes: which files a pattern means, and reading them whether or not they are compressed.

Formats are told by the ending: `.txt` is one document a file, `.jsonl` and `.json` one JSON object a line; each may be
followed by `.xz`, `.gz` or `.zst`. Examples for fine-tuning may also come as `.parquet`, or as an array in a `.json`.
"""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Final, cast

from gemma2.errors import DataError, MissingDependencyError, nearest_name

TEXT_ENDINGS: Final = (".txt",)
JSON_ENDINGS: Final = (".jsonl", ".json")
PARQUET_ENDING: Final = ".parquet"
DOCUMENT_ENDINGS: Final = (*TEXT_ENDINGS, *JSON_ENDINGS)
EXAMPLE_ENDINGS: Final = (*JSON_ENDINGS, PARQUET_ENDING)
COMPRESSIONS: Final = (".xz", ".gz", ".zst")
_SKIP_BYTES: Final = 1 << 20

STREAM_ERRORS: Final = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a damaged or truncated compressed stream raises. `gzip.BadGzipFile` is an `OSError`."""


def expand_files(
    patterns: str | Path | Sequence[str | Path], *, endings: tuple[str, ...] = DOCUMENT_ENDINGS
) -> list[Path]:
    """Lists the files that names, globs and folders mean.

    Args:
        patterns: file names, globs (`**` crosses folders), or folders, which are searched with all their subfolders.
            Files of other kinds and hidden files that a glob or a folder holds are passed over.
        endings: of the kinds of files that are meant; all but Parquet may be compressed.

    Returns:
        The files, in the order of the patterns and sorted within each; a file that several patterns mean comes once.

    Raises:
        DataError: a pattern means no file that can be read, or a file named outright is of an unknown kind.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns or "" in patterns:
        raise DataError("a file, a glob or a folder to read is needed, but the name or the list of names is empty")
    found: dict[Path, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_expand_one(Path(pattern).expanduser(), endings)))
    return list(found)


def is_json_lines(file: Path) -> bool:
    """Whether `file` holds one JSON object a line; if not it is one text.

    Raises:
        DataError: the ending is not known.
    """
    return ending_of(file, DOCUMENT_ENDINGS) in JSON_ENDINGS


def ending_of(file: Path, endings: tuple[str, ...]) -> str:
    """Which of `endings` a file's name has, that of its compression left out.

    Raises:
        DataError: none of them.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS and suffixes[-2:-1] != [PARQUET_ENDING]:
        suffixes.pop()
    if suffixes and suffixes[-1] in endings:
        return suffixes[-1]
    raise DataError(f"{file}: its ending does not say how to read it; {_in_words(endings)}")


def open_bytes(file: Path, *, offset: int = 0) -> BinaryIO:
    """Opens a file for reading, decompressed, at a position.

    Args:
        file: the file; `.xz`, `.gz` and `.zst` are decompressed.
        offset: where to begin, in bytes of the decompressed contents. Plain files are sought; compressed ones are
            decompressed up to there and thrown away.

    Returns:
        A stream; reading it may raise one of `STREAM_ERRORS`.

    Raises:
        DataError: the file cannot be opened.
        STREAM_ERRORS: the compressed data are damaged or end before `offset`.
        MissingDependencyError: a `.zst` file, and zstandard is not installed.
    """
    try:
        compression = file.suffix.lower()
        if compression == ".xz":
            stream = cast(BinaryIO, lzma.LZMAFile(file))  # noqa: SIM115 (the caller closes it)
        elif compression == ".gz":
            stream = cast(BinaryIO, gzip.GzipFile(file))
        elif compression == ".zst":
            stream = cast(BinaryIO, io.BufferedReader(_ZstandardStream(file), _SKIP_BYTES))
        else:
            stream = file.open("rb")
            stream.seek(offset)
            return stream
    except OSError as error:
        raise DataError(f"{file}: cannot be opened: {error.strerror or error}") from None
    try:
        while offset and (skipped := stream.read(min(offset, _SKIP_BYTES))):
            offset -= len(skipped)
    except STREAM_ERRORS:
        stream.close()
        raise
    return stream


class _ZstandardStream(io.RawIOBase):
    """Reads a .zst file of one or more frames; unlike zstandard's own reader it notices a truncated last frame."""

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise MissingDependencyError(
                f"{file}: reading .zst needs the package zstandard; install it with: pip install zstandard"
            ) from None
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._frame_begun = False
        self._raw = file.open("rb")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._frame_begun = self._decompressor.decompressobj(), False
            chunk = chunk or self._raw.read(1 << 16)
            if not chunk:
                if self._frame_begun:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._frame_begun = True
            try:
                self._pending = self._frame.decompress(chunk)
            except self._error as error:
                raise OSError(str(error)) from None
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _expand_one(pattern: Path, endings: tuple[str, ...]) -> list[Path]:
    if pattern.is_file():
        ending_of(pattern, endings)
        return [pattern]
    if pattern.is_dir():
        candidates: Iterable[Path] = (
            path
            for path in pattern.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(pattern).parts)
        )
        kind = "the folder"
    elif glob.has_magic(str(pattern)):
        candidates = (Path(name) for name in glob.glob(str(pattern), recursive=True))
        kind = "the pattern"
    else:
        siblings = [path.name for path in pattern.parent.iterdir()] if pattern.parent.is_dir() else []
        raise DataError(f"{pattern}: there is no such file or folder.{nearest_name(pattern.name, siblings)}")
    files = sorted(path for path in candidates if path.is_file())
    known = [path for path in files if _has_ending(path, endings)]
    if not known:
        others = f"; it holds {len(files)} other files, such as {files[0].name}" if files else ""
        raise DataError(f"{pattern}: {kind} holds no data file{others}; {_in_words(endings)}")
    return known


def _has_ending(file: Path, endings: tuple[str, ...]) -> bool:
    try:
        ending_of(file, endings)
    except DataError:
        return False
    return True


def _in_words(endings: tuple[str, ...]) -> str:
    compressible = [ending for ending in endings if ending != PARQUET_ENDING]
    parquet = f"; or in {PARQUET_ENDING}" if PARQUET_ENDING in endings else ""
    names = f"{', '.join(compressible[:-1])} or {compressible[-1]}"
    return f"data files end in {names}, each also with .xz, .gz or .zst{parquet}"
