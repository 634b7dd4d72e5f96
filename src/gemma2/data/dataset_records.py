"""Records from Hugging Face datasets, read by their library: a folder that it saved, or a name on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from gemma2.data.records import Record, RecordOrError
from gemma2.data.skipping import ExampleError
from gemma2.errors import DataError, MissingDependencyError

HUB_PREFIX: Final = "hf:"
_DEFAULT_SPLIT: Final = "train"
_FORMS_OF_NAMES: Final = "hf:name, hf:name:split or hf:name:configuration:split"


@dataclass(frozen=True)
class HubName:
    """A split of a dataset on the Hugging Face Hub."""

    text: str
    """As the user wrote it."""
    dataset: str
    configuration: str | None
    split: str


def parse_hub_name(text: str) -> HubName:
    """Takes "hf:name", "hf:name:split" or "hf:name:configuration:split" apart.

    Raises:
        DataError: it is none of these.
    """
    # A split may be a slice of one, such as "train[:10%]".
    parts = re.split(r":(?![^\[]*])", text.removeprefix(HUB_PREFIX))
    if not all(parts) or len(parts) > 3:
        raise DataError(f"{text}: a dataset of the Hub is named {_FORMS_OF_NAMES}")
    return HubName(
        text=text,
        dataset=parts[0],
        configuration=parts[1] if len(parts) == 3 else None,
        split=parts[-1] if len(parts) > 1 else _DEFAULT_SPLIT,
    )


def is_saved(folder: Path) -> bool:
    """Whether the library's `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def read_saved(folder: Path) -> Iterator[RecordOrError]:
    """Reads a folder that `save_to_disk` wrote; of one with several splits, the one called "train".

    Raises:
        MissingDependencyError: datasets is not installed.
        DataError: the folder is damaged, or has several splits and none is called "train".
    """
    datasets = _import_datasets(str(folder))
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library lets those of every library under it through
        raise DataError(f"{folder}: cannot be opened as a saved dataset: {_one_line(error)}") from None
    if isinstance(dataset, dict):
        splits = list(dataset)
        split = splits[0] if len(splits) == 1 else _DEFAULT_SPLIT
        if split not in splits:
            raise DataError(
                f"{folder}: has the splits {', '.join(splits) or 'none'}; name the folder of one, such as "
                f"{folder / splits[0] if splits else folder}"
            )
        dataset = dataset[split]
    yield from _rows(dataset, str(folder))


def read_hub(name: HubName) -> Iterator[RecordOrError]:
    """Downloads a dataset into the library's own cache, if it is not there yet, and reads it.

    Raises:
        MissingDependencyError: datasets is not installed.
        DataError: there is no such dataset, configuration or split, or no way to it.
    """
    datasets = _import_datasets(name.text)
    # The library prefers a folder of this name, and one of its own readers, such as "json", which reads whatever lies
    # in the folder that the program runs in.
    if Path(name.dataset).exists():
        raise DataError(f"{name.text}: {name.dataset} is a file or folder here; to read it, leave out {HUB_PREFIX!r}")
    if hasattr(getattr(datasets, "packaged_modules", None), name.dataset):
        raise DataError(f"{name.text}: {name.dataset!r} is a kind of file and no dataset; name the files themselves")
    try:
        dataset = datasets.load_dataset(name.dataset, name.configuration, split=name.split)
    except Exception as error:  # as above, those of the network included
        raise DataError(
            f"{name.text}: cannot be loaded: {_one_line(error)}; a dataset of the Hub is named {_FORMS_OF_NAMES}"
        ) from None
    yield from _rows(dataset, name.text)


def _import_datasets(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"{name}: reading Hugging Face datasets needs the package datasets; install it with: pip install datasets"
        ) from None
    module: ModuleType = datasets
    return module


def _rows(dataset: Any, name: str) -> Iterator[RecordOrError]:
    number, num_rows = 0, len(dataset)
    try:
        for number, values in enumerate(dataset):
            yield Record(values=values, source=name, unit="row", number=number, share=(number + 1) / num_rows)
    except Exception as error:  # as above: a column may need a decoder that fails
        yield ExampleError("damaged file", f"{name}: cannot be read after row {number}: {_one_line(error)}")
    else:
        if not num_rows:
            yield ExampleError("empty file", f"{name}: the dataset holds no example")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
