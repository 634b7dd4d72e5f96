"""The state of a prefetcher is that of the batches that were taken, however far it has worked ahead."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
from corpus import assert_same, encode, random_texts, write_jsonl

from gemma2.data import PackedLoader, Prefetcher
from gemma2.errors import DataError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "x.jsonl", random_texts(seed=8, count=30, longest=300))


def loader(file: Path, *, epochs: int | None = None) -> PackedLoader:
    return PackedLoader(file, encode, sequence_length=32, batch_size=4, shuffle_buffer=16, epochs=epochs)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gemma2-prefetcher"]


def wait_until_full(prefetcher: Prefetcher) -> None:
    deadline = time.monotonic() + 60
    while not prefetcher._queue.full() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert prefetcher._queue.full()


def test_batches_and_states_are_those_of_the_loader(file: Path) -> None:
    plain = loader(file, epochs=2)
    with Prefetcher(loader(file, epochs=2), depth=3) as prefetcher:
        count = 0
        for batch in prefetcher:
            assert_same(batch, next(plain))
            count += 1
            if count == 5:
                wait_until_full(prefetcher)
            assert (prefetcher.epoch, prefetcher.tokens_seen) == (plain.epoch, plain.tokens_seen)
            assert (prefetcher.documents_seen, prefetcher.documents_skipped) == (plain.documents_seen, 0)
            assert str(prefetcher.state_dict()) == str(plain.state_dict())
        for ended in (plain, prefetcher, prefetcher):
            with pytest.raises(StopIteration):
                next(ended)
    assert count > 20


def test_resuming_what_was_taken(file: Path) -> None:
    with Prefetcher(loader(file), depth=5) as first:
        for _ in range(7):
            next(first)
        wait_until_full(first)
        state = first.state_dict()
        expected = [next(first) for _ in range(9)]
        first.load_state_dict(state)
        for batch in expected:
            assert_same(next(first), batch)
    with Prefetcher(loader(file)) as second:
        next(second)
        second.load_state_dict(state)
        assert second.tokens_seen == 7 * 4 * 32
        for batch in expected:
            assert_same(next(second), batch)


def test_after_closing_loader_and_prefetcher_go_on_where_taking_ended(file: Path) -> None:
    inner, plain = loader(file), loader(file)
    prefetcher = Prefetcher(inner)
    for _ in range(3):
        assert_same(next(prefetcher), next(plain))
    wait_until_full(prefetcher)
    prefetcher.close()
    assert not threads()
    assert_same(next(inner), next(plain))
    prefetcher = Prefetcher(inner)
    assert_same(next(prefetcher), next(plain))
    prefetcher.close()
    assert_same(next(prefetcher), next(plain))
    prefetcher.close()
    prefetcher.close()


def test_a_state_that_does_not_fit_changes_nothing(file: Path) -> None:
    plain = loader(file)
    with Prefetcher(loader(file)) as prefetcher:
        assert_same(next(prefetcher), next(plain))
        with pytest.raises(DataError):
            prefetcher.load_state_dict({})
        assert_same(next(prefetcher), next(plain))


def test_an_error_comes_where_its_batch_would_have_come(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"nonsense\n")
    plain = loader(file)
    with Prefetcher(loader(file), depth=2) as prefetcher:
        while True:
            try:
                batch = next(plain)
            except DataError:
                break
            assert_same(next(prefetcher), batch)
        for _ in range(2):
            with pytest.raises(DataError, match="line 31: not JSON"):
                next(prefetcher)
        assert str(prefetcher.state_dict()) == str(plain.state_dict())


def test_closing_does_not_wait_until_a_large_buffer_is_full(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", ["word\n" * 10_000] * 1000)
    started = threading.Event()

    def slow(text: str) -> list[int]:
        if len(text) > 1000:
            started.set()
            time.sleep(0.01)
        return encode(text)

    inner = PackedLoader(file, slow, sequence_length=8, batch_size=1, shuffle_buffer=10_000_000)
    prefetcher = Prefetcher(inner)
    taker = threading.Thread(target=lambda: next(prefetcher, None), daemon=True)
    taker.start()
    assert started.wait(60)
    begin = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - begin < 30
    assert inner.tokens_seen == 0


def test_one_that_is_forgotten_ends_its_thread(file: Path) -> None:
    prefetcher = Prefetcher(loader(file))
    next(prefetcher)
    assert threads()
    del prefetcher
    gc.collect()
    for thread in threads():
        thread.join(60)
    assert not threads()


def test_depth_must_be_at_least_one(file: Path) -> None:
    with pytest.raises(DataError, match="depth must be at least 1, but is 0"):
        Prefetcher(loader(file), depth=0)
