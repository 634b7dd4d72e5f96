"""What the tests of training data share: a tokenizer that can be undone, and files to read."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import zstandard

from gemma2.data import IGNORED_LABEL, PackedBatch

BOS, EOS, PAD = 2, 1, 0


def encode(text: str) -> list[int]:
    """Bytes as ids, from 3 on."""
    return [byte + 3 for byte in text.encode()]


def decode(ids: Iterable[int]) -> str:
    return bytes(token - 3 for token in ids).decode()


def random_text(generator: random.Random, num_characters: int) -> str:
    return "".join(generator.choices("abcde \n\ré", weights=[5, 5, 5, 5, 5, 8, 2, 1, 1], k=num_characters))


def random_texts(*, seed: int, count: int, longest: int) -> list[str]:
    generator = random.Random(seed)
    # Each begins with its number, so that no two are equal.
    return [f"{number}:" + random_text(generator, generator.randint(0, longest)) for number in range(count)]


def write_jsonl(file: Path, texts: Sequence[str], *, key: str = "text") -> Path:
    return write_bytes(file, "".join(json.dumps({key: text}) + "\n" for text in texts).encode())


def write_bytes(file: Path, data: bytes) -> Path:
    file.write_bytes(compress(data, file.suffix))
    return file


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".xz":
        return lzma.compress(data)
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return zstandard.compress(data)
    return data


def segments(batches: Iterable[PackedBatch]) -> list[list[int]]:
    """The labels of each segment, after a check of all that must hold in a row."""
    found = []
    for batch in batches:
        for row in range(len(batch.input_ids)):
            inputs, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
            positions, ids = batch.positions[row].tolist(), batch.segment_ids[row].tolist()
            place = 0
            for segment in range(1, max(ids) + 1):
                length = ids.count(segment)
                assert length, "segments are numbered without gaps"
                end = place + length
                assert ids[place:end] == [segment] * length
                assert positions[place:end] == list(range(length))
                assert inputs[place:end] == [BOS, *labels[place : end - 1]]
                assert IGNORED_LABEL not in labels[place:end]
                found.append(labels[place:end])
                place = end
            padding = len(inputs) - place
            assert inputs[place:] == [PAD] * padding
            assert labels[place:] == [IGNORED_LABEL] * padding
            assert ids[place:] == [0] * padding
            assert positions[place:] == [0] * padding
    return found


def assert_same(left: PackedBatch, right: PackedBatch) -> None:
    for name in ("input_ids", "labels", "positions", "segment_ids"):
        assert getattr(left, name).tolist() == getattr(right, name).tolist(), name
