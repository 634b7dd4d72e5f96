"""Documents come whole, in order, from wherever one begins; what is wrong is named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpus import compress, random_texts, write_bytes, write_jsonl

from gemma2.data import SkipCount, iter_documents
from gemma2.errors import DataError

ENDINGS = ("", ".xz", ".gz", ".zst")


@pytest.mark.parametrize("ending", ENDINGS)
def test_json_lines(tmp_path: Path, ending: str) -> None:
    file = write_bytes(
        tmp_path / f"x.jsonl{ending}",
        b'\xef\xbb\xbf{"id": 7, "body": "one\\r\\n"}\r\n\n  \n{"body": ""}\n{"body": "\xc3\xa9\xe2\x80\xa8"}',
    )
    skipped = SkipCount()
    documents = list(iter_documents(file, text_key="body", skipped=skipped))
    assert [(document.text, document.line, document.index) for document in documents] == [
        ("one\r\n", 1, 0),
        ("é\u2028", 5, 2),
    ]
    assert (skipped.empty, skipped.errors) == (1, 0)
    assert all(document.file == file for document in documents)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    write_bytes(tmp_path / f"a.txt{ending}", "\ufeffone\r\ntwo\n".encode())
    write_bytes(tmp_path / f"b.txt{ending}", b"three")
    assert [(d.text, d.index) for d in iter_documents(tmp_path)] == [("one\r\ntwo\n", 0), ("three", 1)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_reading_goes_on_before_and_after_each_document(tmp_path: Path, ending: str) -> None:
    texts = random_texts(seed=1, count=20, longest=300)
    write_jsonl(tmp_path / f"a.jsonl{ending}", texts[:8])
    write_bytes(tmp_path / f"b.txt{ending}", texts[8].encode())
    write_jsonl(tmp_path / f"c.jsonl{ending}", ["", *texts[9:], ""])
    documents = list(iter_documents(tmp_path, newlines="both"))
    assert len(documents) == 20
    for number, document in enumerate(documents):
        assert list(iter_documents(tmp_path, start=document.position, newlines="both")) == documents[number:]
        assert list(iter_documents(tmp_path, start=document.next_position, newlines="both")) == documents[number + 1 :]


def test_what_lies_before_the_start_is_not_parsed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", ["one", "two"])
    first = next(iter_documents(file))
    data = file.read_bytes()
    file.write_bytes(b"#" * first.next_position.offset + data[first.next_position.offset :])
    assert [document.text for document in iter_documents(file, start=first.next_position)] == ["two"]


def test_newlines_alternate_by_document_and_by_epoch(tmp_path: Path) -> None:
    crlf, lf = "a\r\nb\rc\nd\n\r\n", "a\nb\nc\nd\n\n"
    file = write_jsonl(tmp_path / "x.jsonl", [crlf] * 3)

    def texts(newlines: str, epoch: int) -> list[str]:
        return [document.text for document in iter_documents(file, newlines=newlines, epoch=epoch)]  # type: ignore[arg-type]

    assert texts("keep", 0) == [crlf] * 3
    assert texts("lf", 0) == [lf] * 3
    assert texts("both", 0) == texts("both", 2) == [crlf, lf, crlf]
    assert texts("both", 1) == [lf, crlf, lf]


def test_ranks_share_the_documents(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{number}" for number in range(5)])
    shares = [[d.text for d in iter_documents(tmp_path, rank=rank, world_size=3)] for rank in range(3)]
    assert shares == [["a0", "a3", "b1", "b4"], ["a1", "a4", "b2"], ["a2", "b0", "b3"]]


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "not JSON": (b'{"text": "x"\n', r"x.jsonl, line 2: not JSON: Expecting ',' delimiter at column 13"),
    "a list": (b'["text"]\n', "line 2: a JSON object is needed, but the line is a list"),
    "key missing": (
        b'{"txt": "x", "id": 1}\n',
        r"line 2: no key 'text'; the keys are 'txt', 'id'. Did you mean 'txt'\?",
    ),
    "no keys": (b"{}\n", "line 2: no key 'text'; the keys are none"),
    "a number": (b'{"text": 3}\n', "line 2: 'text' must be a string, but is a number"),
    "null": (b'{"text": null}\n', "line 2: 'text' must be a string, but is a null"),
    "broken UTF-8": (b'{"text": "\xff"}\n', "line 2: not UTF-8: byte 0xff at byte 10 of the line"),
    "half a surrogate pair": (
        b'{"text": "a\\ud800"}\n',
        "line 2: 'text' holds half of a surrogate pair at character 1",
    ),
    "too deep": (b'{"text": ' + b"[" * 200_000 + b"\n", "line 2: not JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    line, message = BAD_LINES[kind]
    file = write_bytes(tmp_path / "x.jsonl", GOOD + line + GOOD)
    with pytest.raises(DataError, match=message):
        list(iter_documents(file))
    skipped = SkipCount()
    assert [d.index for d in iter_documents(file, on_error="skip", skipped=skipped)] == [0, 2]
    assert skipped.errors == 1
    assert "line 2" in skipped.last_error


def test_broken_utf8_in_a_text_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = write_bytes(tmp_path / "x.txt", b"one\ntwo\nth\xe9ee\n")
    with pytest.raises(DataError, match=r"x.txt, line 3: not UTF-8: byte 0xe9 at byte 2 of the line"):
        list(iter_documents(file))


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zst"])
def test_a_truncated_file_is_named_or_left_early(tmp_path: Path, ending: str) -> None:
    texts = random_texts(seed=2, count=300, longest=1000)
    whole = compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), ending)
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole[: len(whole) // 2])
    write_jsonl(tmp_path / "b.jsonl", ["last"])
    with pytest.raises(DataError, match=rf"a.jsonl{ending}: cannot be read after line \d+: .*truncated or damaged"):
        list(iter_documents(tmp_path))
    skipped = SkipCount()
    found = [document.text for document in iter_documents(tmp_path, on_error="skip", skipped=skipped)]
    assert found == [*texts[: len(found) - 1], "last"]
    assert skipped.errors == 1


def test_an_empty_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.jsonl", b"\n \n")
    write_jsonl(tmp_path / "b.jsonl", ["text"])
    with pytest.raises(DataError, match=r"a.jsonl: the file holds no document"):
        list(iter_documents(tmp_path))
    assert [document.text for document in iter_documents(tmp_path, on_error="skip")] == ["text"]


def test_nothing_left_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.jsonl", b'{"text": ""}\nnonsense\n')
    with pytest.raises(DataError, match=r"no document is left: 1 could not be read, 1 were empty;.*line 2"):
        list(iter_documents(tmp_path, on_error="skip"))


def test_more_ranks_than_documents_is_an_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(DataError, match="2 documents are too few to share among 3 ranks; rank 2 has none"):
        list(iter_documents(file, rank=2, world_size=3))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"newlines": "crlf"}, "newlines must be one of keep, lf, both, but is 'crlf'. Did you mean 'lf'"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1, but is 2"),
    ],
)
def test_settings_are_checked_at_the_call(tmp_path: Path, setting: dict[str, int], message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(DataError, match=message):
        iter_documents(file, **setting)  # type: ignore[arg-type]
