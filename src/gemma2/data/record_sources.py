"""From names to sources of records: files, folders, datasets on disk and on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.data.dataset_records import HUB_PREFIX, is_saved, parse_hub_name, read_hub, read_saved
from gemma2.data.files import EXAMPLE_ENDINGS, PARQUET_ENDING, ending_of, expand_files
from gemma2.data.json_records import read_json
from gemma2.data.parquet_records import read_parquet
from gemma2.data.records import RecordOrError


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """A file, a folder or a dataset that holds records."""

    name: str
    """As errors call it."""
    short_name: str
    """The name without its folder: what stays the same where the data is moved."""
    size_bytes: int | None
    """On disk; None for a dataset of the Hub."""
    read: Callable[[], Iterator[RecordOrError]]
    """Reads from the beginning. Raises `MissingDependencyError` without the library that this kind needs, and
    `DataError` where there is nothing to begin with."""


def find_sources(names: str | Path | Sequence[str | Path]) -> list[RecordSource]:
    """Lists what names mean.

    Args:
        names: file names, globs and folders as for `expand_files`, of `.jsonl`, `.json` and `.parquet`; folders that
            the library datasets wrote with `save_to_disk`; "hf:name", "hf:name:split" or "hf:name:configuration:split"
            for a dataset of the Hugging Face Hub, of which the split "train" is meant if none is named.

    Returns:
        The sources, in the order of the names; one that several names mean comes once.

    Raises:
        DataError: a name means nothing that can be read.
    """
    if isinstance(names, str | Path):
        names = [names]
    found: dict[str, RecordSource] = {}
    for name in names or [""]:
        for source in _find(name):
            found.setdefault(source.name, source)
    return list(found.values())


def _find(name: str | Path) -> list[RecordSource]:
    if isinstance(name, str) and name.startswith(HUB_PREFIX):
        hub_name = parse_hub_name(name)
        return [RecordSource(name=name, short_name=name, size_bytes=None, read=lambda: read_hub(hub_name))]
    folder = Path(name).expanduser()
    if name and is_saved(folder):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return [
            RecordSource(name=str(folder), short_name=folder.name, size_bytes=size, read=lambda: read_saved(folder))
        ]
    return [_file_source(file) for file in expand_files(name, endings=EXAMPLE_ENDINGS)]


def _file_source(file: Path) -> RecordSource:
    reader = read_parquet if ending_of(file, EXAMPLE_ENDINGS) == PARQUET_ENDING else read_json
    return RecordSource(name=str(file), short_name=file.name, size_bytes=file.stat().st_size, read=lambda: reader(file))
