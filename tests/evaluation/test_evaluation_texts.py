"""Which bytes a token stands for, exactly; and how much is read of the files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from gemma2.api import BUNDLED_FOLDER
from gemma2.errors import DataError
from gemma2.evaluation import encode_text, read_texts
from gemma2.text import Tokenizer

TEXTS = [
    "",
    "It was a dark night, and the old man looked at her.",
    "  two spaces,\ttabs\r\nand lines\n\n\n",
    "naïve café, Ωμέγα, 漢字, 🤗🤗 and \x00\x7f",
    "▁",
    "a▁b ▁▁ c▁",
    "▁" * 40 + " é▁🤗",
    "<bos><end_of_turn><unused3><0x41>",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(BUNDLED_FOLDER)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_every_token(tokenizer: Tokenizer, text: str) -> None:
    encoded = encode_text(tokenizer, text)
    assert encoded.token_ids.tolist() == tokenizer.encode(text, add_bos=False)
    assert encoded.token_ids.dtype == np.int32
    assert encoded.num_bytes(0, len(encoded.token_ids)) == len(text.encode())
    # Token by token: the bytes between two ends are what the token writes, but that it writes U+2581 as a space.
    data, start = text.encode(), 0
    for token_id, end in zip(encoded.token_ids.tolist(), encoded.byte_ends.tolist(), strict=True):
        written = tokenizer.token_text(token_id)
        expected = written if isinstance(written, bytes) else written.encode()
        assert data[start:end].replace("▁".encode(), b" ") == expected
        start = end


def test_halves_of_a_text_share_its_bytes(tokenizer: Tokenizer) -> None:
    encoded = encode_text(tokenizer, TEXTS[3])
    n = len(encoded.token_ids)
    for cut in range(n + 1):
        assert encoded.num_bytes(0, cut) + encoded.num_bytes(cut, n) == len(TEXTS[3].encode())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("The first text, in a file of its own.", encoding="utf-8")
    lines = [
        json.dumps({"text": text, "other": "x"}) for text in ("One line.", "", "Another line: é🤗漢字.", "A third.")
    ]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write("\n".join(lines))
    return tmp_path


def test_all_documents_of_all_files(files: Path, tokenizer: Tokenizer) -> None:
    texts = read_texts(files, tokenizer)
    assert [(text.file.name, text.line, text.text) for text in texts] == [
        ("a.txt", 1, "The first text, in a file of its own."),
        ("b.jsonl.gz", 1, "One line."),
        ("b.jsonl.gz", 3, "Another line: é🤗漢字."),
        ("b.jsonl.gz", 4, "A third."),
    ]


def test_max_documents(files: Path, tokenizer: Tokenizer) -> None:
    assert [text.text for text in read_texts(files, tokenizer, max_documents=2)][1:] == ["One line."]


def test_max_tokens_cuts_after_a_whole_character_and_keeps_the_tokens_before(files: Path, tokenizer: Tokenizer) -> None:
    whole = [text.text for text in read_texts(files, tokenizer)]
    all_ids = [tokenizer.encode(text, add_bos=False) for text in whole]
    total = sum(map(len, all_ids))
    for limit in range(1, total + 3):
        texts = [text.text for text in read_texts(files, tokenizer, max_tokens=limit)]
        assert all(text == other for text, other in zip(texts[:-1], whole, strict=False))
        assert whole[len(texts) - 1].startswith(texts[-1])
        ids = [tokenizer.encode(text, add_bos=False) for text in texts]
        assert ids[-1] == all_ids[len(texts) - 1][: len(ids[-1])]
        num_tokens = sum(map(len, ids))
        # A character that is no token of its own is up to four.
        assert min(limit, total) - 4 < num_tokens <= limit


@pytest.mark.parametrize("limit", ["max_documents", "max_tokens"])
def test_limits_are_at_least_one(files: Path, tokenizer: Tokenizer, limit: str) -> None:
    with pytest.raises(DataError, match=f"{limit} must be at least 1, but is 0"):
        read_texts(files, tokenizer, **{limit: 0})  # type: ignore[arg-type]


def test_a_first_character_that_does_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("🤗", encoding="utf-8")
    with pytest.raises(DataError, match="max_tokens = 1 has no room for the first character"):
        read_texts(tmp_path, tokenizer, max_tokens=1)


def test_a_bad_last_line_is_found_at_once(files: Path, tokenizer: Tokenizer) -> None:
    (files / "c.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: no key 'text'"):
        read_texts(files, tokenizer)
