"""Which files a name means, and that damaged ones are noticed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from corpus import compress, write_bytes

from gemma2.data.files import STREAM_ERRORS, expand_files, open_bytes
from gemma2.errors import DataError, MissingDependencyError

ENDINGS = ("", ".xz", ".gz", ".zst")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.jsonl.xz", "c.json.zst", "README.md", ".hidden.txt", "more/d.TXT.GZ", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def names(files: list[Path], folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in files]


def test_a_folder_is_searched_in_sorted_order(folder: Path) -> None:
    assert names(expand_files(folder), folder) == ["a.jsonl.xz", "b.txt", "c.json.zst", "more/d.TXT.GZ"]


def test_patterns_keep_their_order_and_a_file_comes_once(folder: Path) -> None:
    patterns: list[str | Path] = [folder / "c*", str(folder / "*"), folder / "b.txt"]
    assert names(expand_files(patterns), folder) == ["c.json.zst", "a.jsonl.xz", "b.txt"]


def test_a_name_that_looks_like_a_glob_is_taken_as_a_name(tmp_path: Path) -> None:
    file = tmp_path / "part[1].txt"
    file.write_text("x")
    assert expand_files(file) == [file]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a.jsonl.gz", r"no such file or folder. Did you mean 'a.jsonl.xz'\?"),
        ("README.md", "its ending does not say how to read it"),
        ("*.md", r"holds no data file; it holds 1 other files, such as README.md"),
        ("*.parquet", "holds no data file; data files end in"),
    ],
)
def test_what_means_no_file_is_an_error(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand_files(folder / pattern)


@pytest.mark.parametrize("nothing", ["", [], [""]])
def test_no_name_at_all_is_an_error(nothing: str | list[str]) -> None:
    with pytest.raises(DataError, match="empty"):
        expand_files(nothing)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("offset", [0, 1, 70_000, 300_000])
def test_reading_begins_at_an_offset(tmp_path: Path, ending: str, offset: int) -> None:
    data = bytes(range(256)) * 1200
    file = write_bytes(tmp_path / f"x.txt{ending}", data)
    with open_bytes(file, offset=offset) as stream:
        assert stream.read() == data[offset:]


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zst"])
def test_several_streams_in_one_file_are_one_text(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"x.txt{ending}"
    file.write_bytes(compress(b"one\n", ending) + compress(b"two\n", ending) + compress(b"", ending))
    with open_bytes(file) as stream:
        assert list(stream) == [b"one\n", b"two\n"]


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.3, 0.999])
def test_a_truncated_file_is_noticed(tmp_path: Path, ending: str, kept: float) -> None:
    data = compress(b"".join(b"%d\n" % number for number in range(50_000)), ending)
    file = tmp_path / f"x.txt{ending}"
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(STREAM_ERRORS), open_bytes(file) as stream:
        stream.read()


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_noticed(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"x.txt{ending}"
    file.write_bytes(b"plain text")
    with pytest.raises(STREAM_ERRORS), open_bytes(file) as stream:
        stream.read()


def test_zst_without_zstandard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_bytes(tmp_path / "x.txt.zst", b"text")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match="pip install zstandard"):
        open_bytes(file)
