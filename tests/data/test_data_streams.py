"""Streams: what a batch holds depends on how many there are, and never on how many processes read them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from corpus import assert_same, encode, random_texts, write_jsonl

from gemma2.data import PackedBatch, PackedLoader, StreamLoader
from gemma2.errors import DataError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "a.jsonl"
    write_jsonl(path, random_texts(seed=5, count=40, longest=400))
    return path


def packed(file: Path, *, rank: int, world_size: int, batch_size: int) -> PackedLoader:
    return PackedLoader(
        file, encode, sequence_length=16, batch_size=batch_size, shuffle_buffer=20, rank=rank, world_size=world_size
    )


def shared(file: Path, num_streams: int, world_size: int) -> list[StreamLoader]:
    """The loaders of all processes."""

    def make_stream(number: int, count: int, rows: int) -> PackedLoader:
        return packed(file, rank=number, world_size=count, batch_size=rows)

    return [
        StreamLoader(make_stream, batch_size=12, num_streams=num_streams, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def batches(loaders: list[StreamLoader], count: int) -> list[PackedBatch]:
    """Whole batches, put together from the rows of all processes."""
    together = []
    for parts in islice(zip(*loaders, strict=True), count):
        fields = ("input_ids", "labels", "positions", "segment_ids")
        together.append(
            PackedBatch(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})
        )
    return together


def test_one_stream_is_the_plain_loader(file: Path) -> None:
    plain = packed(file, rank=0, world_size=1, batch_size=12)
    for ours, theirs in zip(batches(shared(file, 1, 1), 5), plain, strict=False):
        assert_same(ours, theirs)


@pytest.mark.parametrize("num_streams", [1, 2, 3, 4])
def test_as_many_processes_as_one_likes(file: Path, num_streams: int) -> None:
    expected = batches(shared(file, num_streams, 1), 5)
    for world_size in (2, 3, 4, 12):
        for ours, theirs in zip(batches(shared(file, num_streams, world_size), 5), expected, strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("num_streams", [1, 3])
def test_more_or_fewer_processes_go_on(file: Path, num_streams: int) -> None:
    expected = batches(shared(file, num_streams, 1), 6)[3:]
    loaders = shared(file, num_streams, 3)
    batches(loaders, 3)
    together = {key: value for loader in loaders for key, value in loader.state_dict().items()}
    for world_size in (1, 2, 4):
        others = shared(file, num_streams, world_size)
        for loader in others:
            loader.load_state_dict(together)
        for ours, theirs in zip(batches(others, 3), expected, strict=True):
            assert_same(ours, theirs)


def test_mistakes(file: Path) -> None:
    with pytest.raises(DataError, match="the rows of a batch, 12, must be a multiple of num_streams, which is 5"):
        shared(file, 5, 1)
    with pytest.raises(DataError, match="the rows of a batch, 12, must be a multiple of processes, which is 8"):
        shared(file, 1, 8)
    (one,) = shared(file, 1, 1)
    with pytest.raises(DataError, match="dealt out to 1 streams, and are now to 2"):
        shared(file, 2, 1)[0].load_state_dict(one.state_dict())
