"""A loader that is stopped and resumed gives the batches that one gives that was not; epochs and shares are exact."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import EOS, assert_same, decode, encode, random_texts, segments, write_jsonl

from gemma2.data import PackedBatch, PackedLoader, Source
from gemma2.data.packing import encode_slices
from gemma2.errors import DataError

TEXTS = random_texts(seed=5, count=40, longest=400)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes documents longer than a slice."""
    assert encode_slices.__kwdefaults__
    monkeypatch.setitem(encode_slices.__kwdefaults__, "min_characters", 50)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "a.jsonl.xz", TEXTS[:25])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[25:])
    return tmp_path


def loader(files: Any, **settings: Any) -> PackedLoader:
    return PackedLoader(
        files, **{"encode": encode, "sequence_length": 16, "batch_size": 12, "shuffle_buffer": 20, **settings}
    )


def tokens(batches: Iterable[PackedBatch]) -> Counter[int]:
    return Counter(token for segment in segments(batches) for token in segment)


def texts_in_order(batches: Iterable[PackedBatch]) -> list[str]:
    """The documents, if nothing was shuffled, split or packed out of order."""
    flat = [token for segment in segments(batches) for token in segment]
    assert flat[-1] == EOS
    documents: list[list[int]] = [[]]
    for token in flat[:-1]:
        if token == EOS:
            documents.append([])
        else:
            documents[-1].append(token)
    return [decode(document) for document in documents]


def through_npz(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state, default=lambda array: array.tolist()))
    return loaded


WAYS: dict[str, dict[str, Any]] = {
    "one epoch after the other": {},
    "slices of several pieces": {"encode": lambda text: [token for token in encode(text) for _ in range(3)]},
    "buffer larger than an epoch": {"shuffle_buffer": 1000},
    "no shuffling": {"shuffle_buffer": 1},
    "long rows": {"sequence_length": 190, "batch_size": 1},
    "tiny rows": {"sequence_length": 2, "batch_size": 70},
    "alternating newlines": {"newlines": "both"},
    "one of two ranks": {"rank": 1, "world_size": 2},
    "three epochs": {"epochs": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_is_as_if_never_stopped(folder: Path, way: str) -> None:
    settings = WAYS[way]
    whole = loader(folder, **settings)
    states, batches, progress = [whole.state_dict()], [], []
    for batch in islice(whole, 170):
        batches.append(batch)
        states.append(whole.state_dict())
        progress.append((whole.epoch, whole.documents_seen, whole.tokens_seen))
    assert whole.epoch >= 1, "the borders between epochs are among what is tried"
    segments(batches)

    generator = random.Random(way)
    for trip in (dict, through_json, through_npz) * 4:
        stop = generator.randrange(len(states))
        resumed = loader(folder, **settings)
        resumed.load_state_dict(trip(states[stop]))
        more = generator.randint(1, 40)
        for number in range(stop, min(stop + more, len(batches))):
            assert_same(next(resumed), batches[number])
            assert (resumed.epoch, resumed.documents_seen, resumed.tokens_seen) == progress[number]
        if stop + more < len(batches):
            # Stopped a second time: the state after resuming is the state of the whole run.
            assert through_json(resumed.state_dict()) == through_json(states[stop + more])
    if "epochs" in settings:
        resumed = loader(folder, **settings)
        resumed.load_state_dict(states[-1])
        with pytest.raises(StopIteration):
            next(resumed)


def test_states_inside_documents_and_at_epochs_are_among_those_tried(folder: Path) -> None:
    whole = loader(folder)
    states = [whole.state_dict() for _ in islice(whole, 170)]
    assert any(state["source0_read_character"] for state in states)
    assert any(len(state["source0_read_waiting"]) for state in states)
    assert any(state["source0_read_position"] == [0, 0, 0, 0] for state in states)
    assert any(len(state["source0_upcoming_lengths"]) for state in states)
    assert any(len(state["pool_lengths"]) for state in states)
    assert {state["source0_read_position"][0] for state in states} == {0, 1}


def test_resuming_does_not_encode_again_what_came_before(folder: Path) -> None:
    texts: list[str] = []

    def recording(text: str) -> list[int]:
        texts.append(text)
        return encode(text)

    first = loader(folder, encode=recording, epochs=1)
    for _ in range(10):
        next(first)
    state, done = first.state_dict(), len(texts)
    remaining = [batch.num_tokens for batch in first]
    after = texts[done:]
    assert remaining and after and done > 10

    texts.clear()
    resumed = loader(folder, encode=recording, epochs=1)
    probe = len(texts)
    resumed.load_state_dict(state)
    assert [batch.num_tokens for batch in resumed] == remaining
    assert texts[probe:] == after


def test_without_shuffling_documents_come_in_order(tmp_path: Path) -> None:
    texts = [f"{number}" * 31 for number in range(8)]
    file = write_jsonl(tmp_path / "x.jsonl", texts)
    assert texts_in_order(loader(file, shuffle_buffer=1, epochs=1, sequence_length=32)) == texts


@pytest.mark.parametrize("shuffle_buffer", [1, 20, 1000])
def test_an_epoch_holds_every_token_once(folder: Path, shuffle_buffer: int) -> None:
    once = Counter(token for text in TEXTS for token in [*encode(text), EOS])
    whole = loader(folder, epochs=3, shuffle_buffer=shuffle_buffer)
    batches = list(whole)
    assert tokens(batches) == Counter({token: 3 * count for token, count in once.items()})
    assert whole.documents_seen == 3 * len(TEXTS)
    assert whole.tokens_seen == sum(batch.num_tokens for batch in batches) == 3 * sum(once.values())
    assert {batch.input_ids.shape for batch in batches} == {(12, 16)}


def test_epochs_do_not_mix(tmp_path: Path) -> None:
    # Full pieces, one a document: no rows to share, so that the order is the order of the draws.
    texts = [chr(ord("A") + number) * 15 for number in range(26)]
    file = write_jsonl(tmp_path / "x.jsonl", texts)
    for shuffle_buffer in (1, 10, 26, 40, 1000):
        whole = loader(file, shuffle_buffer=shuffle_buffer, sequence_length=16, batch_size=13)
        epochs = []
        for epoch in range(4):
            both = [next(whole), next(whole)]
            assert whole.epoch == epoch
            epochs.append([decode(segment[:-1]) for segment in segments(both)])
        assert [sorted(epoch) for epoch in epochs] == [texts] * 4
        if shuffle_buffer > 1:
            assert len({tuple(epoch) for epoch in [*epochs, texts]}) == 5, "every epoch has its own order"


def test_every_document_is_seen_with_both_newlines(tmp_path: Path) -> None:
    texts = [f"{number}\r\n" * 10 for number in range(4)]
    file = write_jsonl(tmp_path / "x.jsonl", texts)
    seen = texts_in_order(loader(file, newlines="both", shuffle_buffer=1, epochs=2, sequence_length=1000))
    assert sorted(seen) == sorted(texts + [text.replace("\r", "") for text in texts])


def test_the_seed_sets_the_order(folder: Path) -> None:
    def inputs(**settings: Any) -> list[Any]:
        return [batch.input_ids.tolist() for batch in islice(loader(folder, **settings), 5)]

    assert inputs(seed=1) == inputs(seed=1)
    assert inputs(seed=1) != inputs(seed=2)
    assert inputs(seed=2**64 - 1) != inputs(seed=0)


def test_ranks_and_sources_are_shuffled_each_in_its_own_way(tmp_path: Path) -> None:
    letters = "abcdefghij"
    twice = write_jsonl(tmp_path / "x.jsonl", [letter for letter in letters for _ in range(2)])
    capitals = write_jsonl(tmp_path / "y.jsonl", list(letters.upper()) * 2)

    def order(files: Any, **settings: Any) -> str:
        batches = loader(files, sequence_length=2, epochs=1, **settings)
        return "".join(decode(segment[:-1]) for segment in segments(batches))

    ranks = [order(twice, rank=rank, world_size=2) for rank in range(2)]
    assert [sorted(rank) for rank in ranks] == [list(letters)] * 2
    assert ranks[0] != ranks[1]
    mixed = order([Source(files=capitals), Source(files=write_jsonl(tmp_path / "z.jsonl", list(letters) * 2))])
    assert sorted(mixed.lower()) == sorted(letters * 4)
    assert "".join(filter(str.isupper, mixed)).lower() != "".join(filter(str.islower, mixed))


def test_the_order_never_changes_between_versions(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [chr(ord("A") + number) for number in range(10)])
    whole = loader(file, sequence_length=2, batch_size=10, seed=7)
    orders = ["".join(decode(segment[:-1]) for segment in segments([next(whole)])) for _ in range(2)]
    assert orders == ["CJABHEIFDG", "HBEDAIFCJG"]


def test_shuffling_spreads_as_far_as_the_buffer(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [f"{number:04}" for number in range(2000)])
    order = [int(decode(s[:-1])) for s in segments(loader(file, sequence_length=5, shuffle_buffer=500, epochs=1))]
    assert sorted(order) == list(range(2000))
    assert all(number < place + 500 for place, number in enumerate(order))
    first = order[:200]
    assert 180 < np.mean(first) < 420, "the first come from the whole buffer and not from its beginning"
    assert max(place - number for place, number in enumerate(order)) > 1000, "one in for one out, not block by block"


def test_random_numbers_do_not_repeat(folder: Path) -> None:
    stream = loader(folder)._streams[0]
    assert len({stream._random_number() for _ in range(2000)}) == 2000


def test_ranks_see_documents_of_their_own(folder: Path) -> None:
    shares = [tokens(loader(folder, rank=rank, world_size=3, epochs=1)) for rank in range(3)]
    assert [share[EOS] for share in shares] == [14, 13, 13]
    assert sum(shares, Counter()) == tokens(loader(folder, epochs=1))


def test_sources_are_mixed_by_tokens(tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / "long.jsonl", ["a" * 999] * 30),
        write_jsonl(tmp_path / "short.jsonl", ["b" * 9] * 30),
        write_jsonl(tmp_path / "rare.jsonl", ["c" * 50] * 2),
    ]
    weights = (6.0, 3.0, 1.0)
    sources = [Source(files=file, weight=weight) for file, weight in zip(files, weights, strict=True)]
    mixed = loader(sources)
    seen = Counter[int]()
    for number, batch in enumerate(islice(mixed, 150), start=1):
        seen += tokens([batch])
        if number % 30 == 0:
            shares = [seen[token] / mixed.tokens_seen for token in encode("abc")]
            assert shares == pytest.approx([0.6, 0.3 * 9 / 10, 0.1 * 50 / 51], abs=0.05)
    state = mixed.state_dict()
    resumed = loader(sources)
    resumed.load_state_dict(through_npz(state))
    for _ in range(20):
        assert_same(next(resumed), next(mixed))


def test_sources_with_epochs_are_each_read_to_their_end(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [name * 40] * count) for name, count in (("a", 9), ("b", 2))]
    seen = tokens(loader([Source(files=file) for file in files], epochs=2))
    assert [seen[token] for token in [*encode("ab"), EOS]] == [720, 160, 22]


def test_bad_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", TEXTS[:10])
    file.write_bytes(file.read_bytes() + b"nonsense\n")
    whole = loader(file, epochs=2, on_error="skip")
    states = [(whole.state_dict(), whole.documents_skipped) for _ in whole]
    assert whole.documents_seen == 20
    assert whole.documents_skipped == 2
    for state, skipped in states:
        resumed = loader(file, epochs=2, on_error="skip")
        resumed.load_state_dict(state)
        assert resumed.documents_skipped == skipped
        for _ in resumed:
            pass
        assert resumed.documents_skipped == 2


def test_an_error_comes_again_and_is_never_the_end_of_the_data(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", TEXTS[:10])
    file.write_bytes(file.read_bytes() + b"nonsense\n")
    whole = loader(file, shuffle_buffer=1, batch_size=1, sequence_length=8)
    before = tokens([next(whole)])
    for _ in range(2):
        with pytest.raises(DataError, match="line 11: not JSON"):
            list(whole)
    resumed = loader(file, shuffle_buffer=1, batch_size=1, sequence_length=8, on_error="skip", epochs=1)
    resumed.load_state_dict(whole.state_dict())
    assert resumed.tokens_seen >= before.total()
    list(resumed)
    assert resumed.documents_seen == 10


def test_a_state_fits_files_that_moved_and_other_batch_sizes(folder: Path, tmp_path: Path) -> None:
    whole = loader(folder)
    next(whole)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in list(folder.glob("*.jsonl*")):
        file.rename(elsewhere / file.name)
    resumed = loader(elsewhere, batch_size=1)
    resumed.load_state_dict(whole.state_dict())
    expected = next(loader_after(elsewhere, whole.state_dict()))
    rows = [next(resumed) for _ in range(12)]
    assert [row.input_ids[0].tolist() for row in rows] == expected.input_ids.tolist()


def loader_after(files: Path, state: dict[str, Any]) -> PackedLoader:
    resumed = loader(files)
    resumed.load_state_dict(state)
    return resumed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 32}, "sequence_length changed: it was 16 and is 32"),
        ({"seed": 1}, "seed changed: it was 0 and is 1"),
        ({"rank": 1, "world_size": 2}, "rank changed: it was 0 and is 1"),
        ({"newlines": "both"}, "newlines changed: it was 'keep' and is 'both'"),
        ({"encode": lambda text: encode(text.lower())}, "tokenizer changed. Resume with"),
    ],
)
def test_a_state_of_other_settings_is_refused(folder: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader(folder, **changed).load_state_dict(loader(folder).state_dict())


def test_a_state_of_other_files_is_refused(folder: Path) -> None:
    state = loader(folder).state_dict()
    size = (folder / "b.jsonl").stat().st_size
    write_jsonl(folder / "b.jsonl", TEXTS[26:])
    with pytest.raises(DataError, match=rf"files changed: it was \['b.jsonl', {size}\] and is \['b.jsonl', \d+\]"):
        loader(folder).load_state_dict(state)


def test_a_damaged_state_is_refused(folder: Path) -> None:
    state = loader(folder).state_dict()
    for damaged, message in [
        ({}, "no state of a PackedLoader"),
        ({name: value for name, value in state.items() if name != "source0_num_draws"}, "num_draws"),
        ({**state, "version": 99}, "version 99, but only 1"),
        ({**state, "pool_lengths": [3]}, "pool needs 3 tokens but has 0"),
        ({**state, "settings": "{"}, "damaged"),
    ]:
        with pytest.raises(DataError, match=message):
            loader(folder).load_state_dict(damaged)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1, but is 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"rank": 1}, "rank must be from 0 to world_size - 1 = 0, but is 1"),
        ({"newlines": "crlf"}, "newlines must be one of"),
    ],
)
def test_settings_out_of_range_are_refused_when_made(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader(folder, **settings)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_must_be_a_number_above_zero(folder: Path, weight: float) -> None:
    with pytest.raises(DataError, match=rf"weight of a source must be a number above 0, but is {weight}"):
        loader([Source(files=folder, weight=weight)])


def test_names_and_sources_do_not_mix(folder: Path) -> None:
    with pytest.raises(DataError, match="names only or Sources only"):
        loader([Source(files=folder), str(folder)])
