"""Records come from every kind of file, and know where they stood; what cannot be read is given out as an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from corpus import compress, write_bytes
from examples_in_files import write_records

from gemma2.data import ExampleError, Record, find_sources
from gemma2.errors import DataError, MissingDependencyError

RECORDS = [{"text": f"one {number}", "more": [{"deep": "é"}]} for number in range(5)]
ENDINGS = ("", ".xz", ".gz", ".zst")


def read(names: Any) -> list[Record | ExampleError]:
    return [record for source in find_sources(names) for record in source.read()]


def records(names: Any) -> list[Record]:
    found = read(names)
    assert all(isinstance(record, Record) for record in found), found
    return [record for record in found if isinstance(record, Record)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_lines(tmp_path: Path, ending: str) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps(RECORDS[0]).encode(), b"", json.dumps(RECORDS[1]).encode() + b"\r", b" \t"]
    file = write_bytes(tmp_path / f"x.jsonl{ending}", b"\n".join([*lines, json.dumps(RECORDS[2]).encode()]))
    found = records(file)
    assert [record.values for record in found] == RECORDS[:3]
    assert [record.where for record in found] == [f"{file}, line {number}" for number in (1, 3, 5)]
    if not ending:
        assert found[-1].share == 1.0
        assert 0 < found[0].share < found[1].share < 1


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array(tmp_path: Path, ending: str, indent: int | None) -> None:
    text = "\n" + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n"
    found = records(write_bytes(tmp_path / f"x.json{ending}", b"\xef\xbb\xbf" + text.encode()))
    assert [record.values for record in found] == RECORDS
    lines = [2 if indent is None else 3 + 8 * number for number in range(5)]
    assert [record.where.split(", ")[1] for record in found] == [
        f"item {number} (line {line})" for number, line in enumerate(lines)
    ]


def test_a_json_file_may_also_hold_lines(tmp_path: Path) -> None:
    assert [record.values for record in records(write_records(tmp_path / "x.json", RECORDS))] == RECORDS


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr("gemma2.data.parquet_records._ROWS_AT_A_TIME", 2)
    file = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file)
    found = records(file)
    assert [record.values for record in found] == RECORDS
    assert [record.where for record in found] == [f"{file}, row {number}" for number in range(5)]
    assert found[-1].share == 1.0

    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"PAR1" + b"?" * 200 + data[204:], b""):
        file.write_bytes(damaged)
        last = read(file)[-1]
        assert isinstance(last, ExampleError)
        assert last.reason == "damaged file"
        assert "x.parquet: cannot be read" in str(last)
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS).slice(0, 0), file)
    assert [str(error) for error in read(file)] == [f"{file}: the file holds no example; remove it or fill it"]


def test_parquet_with_broken_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    error = read(tmp_path / "x.parquet")[-1]
    assert isinstance(error, ExampleError)
    assert error.reason == "not UTF-8"


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match="reading Parquet needs the package pyarrow; install it with: pip"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_saved_dataset(tmp_path: Path, as_dict: bool) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    folder = tmp_path / "saved"
    if as_dict:
        datasets.DatasetDict({"test": dataset.select(range(2)), "train": dataset}).save_to_disk(folder)
    else:
        dataset.save_to_disk(folder)
    found = records(folder)
    assert [record.values for record in found] == RECORDS
    assert found[3].where == f"{folder}, row 3"
    if as_dict:
        assert len(records(folder / "test")) == 2
        datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(tmp_path / "other")
        with pytest.raises(DataError, match=r"has the splits a, b; name the folder of one, such as .*other/a$"):
            read(tmp_path / "other")
    else:
        next(folder.glob("*.arrow")).write_bytes(b"?")
        with pytest.raises(DataError, match="saved: cannot be opened as a saved dataset: "):
            read(folder)


class FakeHub(ModuleType):
    """Stands for the library datasets."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, name: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        self.asked.append((name, configuration, split))
        if name == "nobody/none":
            raise FileNotFoundError("Dataset 'nobody/none' doesn't exist\non the Hub")
        return RECORDS


def test_a_dataset_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for name in ("hf:some/chats", "hf:chats:test", "hf:some/chats:main:train[:10]"):
        found = records(name)
        assert [record.values for record in found] == RECORDS
        assert found[2].where == f"{name}, row 2"
    assert hub.asked[2] == ("some/chats", "main", "train[:10]")
    assert hub.asked[:2] == [("some/chats", None, "train"), ("chats", None, "test")]
    with pytest.raises(
        DataError, match=r"hf:nobody/none: cannot be loaded: Dataset 'nobody/none' doesn't exist on the"
    ):
        read("hf:nobody/none")


def test_a_name_of_the_hub_never_means_files_that_lie_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "x.json", RECORDS)
    with pytest.raises(DataError, match="hf:json: 'json' is a kind of file and no dataset; name the files themselves"):
        read("hf:json")
    (tmp_path / "some" / "chats").mkdir(parents=True)
    with pytest.raises(DataError, match="hf:some/chats: some/chats is a file or folder here; to read it, leave out"):
        read("hf:some/chats")


@pytest.mark.parametrize("name", ["hf:", "hf:a::b", "hf:a:b:c:d"])
def test_a_name_that_the_hub_cannot_have(name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: a dataset of the Hub is named hf:name, hf:name:split or"):
        find_sources(name)


def test_datasets_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="hf:some/chats: reading Hugging Face datasets needs the package"):
        read("hf:some/chats")


def test_a_dataset_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(list[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield RECORDS[0]
            raise RuntimeError("no decoder")

    monkeypatch.setitem(
        sys.modules,
        "datasets",
        SimpleNamespace(load_dataset=lambda *names, split: Broken(RECORDS)),  # type: ignore[arg-type]
    )
    first, error = read("hf:x")
    assert isinstance(first, Record)
    assert str(error) == "hf:x: cannot be read after row 0: no decoder"


def test_several_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json.gz", "more/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_records(tmp_path / name, RECORDS[:1])
    (tmp_path / "d.parquet").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not examples")
    sources = find_sources([tmp_path / "b.jsonl", "hf:x", str(tmp_path)])
    assert [source.short_name for source in sources] == ["b.jsonl", "hf:x", "a.json.gz", "d.parquet", "c.jsonl"]
    assert [source.size_bytes for source in sources][:2] == [(tmp_path / "b.jsonl").stat().st_size, None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.txt", r"data files end in .jsonl or .json, each also with .xz, .gz or .zst; or in .parquet"),
        ("y.jsonl", r"there is no such file or folder. Did you mean 'x.jsonl'\?"),
        ("*.csv", "the pattern holds no data file"),
        ("z.parquet.gz", "its ending does not say how to read it"),
    ],
)
def test_a_name_that_means_nothing(tmp_path: Path, name: str, message: str) -> None:
    for present in ("x.txt", "x.jsonl", "z.parquet.gz"):
        (tmp_path / present).write_text("x")
    with pytest.raises(DataError, match=message):
        find_sources(tmp_path / name)


@pytest.mark.parametrize("nothing", ["", [], [""]])
def test_no_name_at_all(nothing: Any) -> None:
    with pytest.raises(DataError, match="is needed, but the name or the list of names is empty"):
        find_sources(nothing)


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "not JSON": (b'{"text": "x"\n', "not JSON", "line 2: not JSON: Expecting ',' delimiter at column 13; one JSON"),
    "too deep": (b"[" * 200_000 + b"\n", "not JSON", "line 2: not JSON"),
    "too long a number": (b"1" * 5000 + b"\n", "not JSON", "line 2: not JSON: Exceeds the limit"),
    "a list": (b'["text"]\n', "not an object", "line 2: a JSON object is needed, but the line is a list"),
    "null": (b"null\n", "not an object", "line 2: a JSON object is needed, but the line is a null"),
    "broken UTF-8": (b'{"text": "\xff"}\n', "not UTF-8", "line 2: not UTF-8: byte 0xff at byte 10 of the line"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_does_not_end_the_file(tmp_path: Path, kind: str) -> None:
    line, reason, message = BAD_LINES[kind]
    first, error, last = read(write_bytes(tmp_path / "x.jsonl", GOOD + line + GOOD))
    assert isinstance(first, Record) and isinstance(last, Record) and isinstance(error, ExampleError)
    assert last.number == 3
    assert error.reason == reason
    assert str(error).startswith(f"{tmp_path / 'x.jsonl'}, {message}")


BAD_ARRAYS = {
    "an item that is no object": (
        b'[{"a": 1},\n 7, {}]',
        "not an object",
        2,
        "item 1 (line 2): a JSON object is needed",
    ),
    "broken off": (
        b'[{"a": 1},\n {"a": ',
        "not JSON",
        1,
        "line 2: not JSON: Expecting value at column 8; nothing after",
    ),
    "not closed": (b'[{"a": 1}\n', "not JSON", 1, "line 2: not JSON: Expecting ',' delimiter at column 1"),
    "no comma": (b'[{"a": 1} {"a": 1}]', "not JSON", 1, "line 1: not JSON: Expecting ',' delimiter at column 11"),
    "a comma too many": (b'[{"a": 1},]', "not JSON", 1, "line 1: not JSON: Expecting value at column 11"),
    "more after it": (b"[{}]\n{}", "not JSON", 1, "line 2: not JSON: Extra data after the array at column 1"),
    "nonsense": (
        b"[nonsense",
        "not JSON",
        0,
        "line 1: not JSON: Expecting value at column 2; nothing of the array can",
    ),
    "broken UTF-8": (b'[{"a":\n "\xff"}]', "not UTF-8", 0, "line 2: not UTF-8: byte 0xff"),
    "empty": (b" [ ] ", "empty file", 0, "the file holds no example"),
    "too deep": (b"[{}, " + b"[" * 200_000, "not JSON", 1, "item 1: not JSON"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_a_bad_array_is_read_as_far_as_it_goes(tmp_path: Path, kind: str) -> None:
    data, reason, num_good, message = BAD_ARRAYS[kind]
    found = read(write_bytes(tmp_path / "x.json", data))
    (error,) = (record for record in found if isinstance(record, ExampleError))
    assert error.reason == reason
    assert str(error).removeprefix(str(tmp_path / "x.json"))[2:].startswith(message)
    assert len(found) - 1 == num_good


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_an_empty_file(tmp_path: Path, name: str, data: bytes) -> None:
    (error,) = read(write_bytes(tmp_path / name, data))
    assert isinstance(error, ExampleError)
    assert (error.reason, str(error)) == (
        "empty file",
        f"{tmp_path / name}: the file holds no example; remove it or fill it",
    )


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("as_array", [False, True])
def test_a_truncated_file_is_read_as_far_as_it_goes(tmp_path: Path, ending: str, as_array: bool) -> None:
    many = [{"text": f"{number} " * (number % 50)} for number in range(20_000)]
    text = json.dumps(many) if as_array else "".join(json.dumps(record) + "\n" for record in many)
    whole = compress(text.encode(), ending)
    file = tmp_path / f"x.json{ending}"
    file.write_bytes(whole[: len(whole) * 9 // 10])
    *found, error = read(file)
    assert [record.values for record in found if isinstance(record, Record)] == many[: len(found)]
    assert bool(found) != as_array
    assert isinstance(error, ExampleError)
    assert error.reason == "damaged file"
    assert "the file is truncated or damaged" in str(error)
    where = "to its end" if as_array else rf"after line {len(found)}"
    assert f"cannot be read {where}:" in str(error)
