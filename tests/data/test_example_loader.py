"""Batches of examples: each once an epoch, whole, apart from each other, the same for any number of processes."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import assert_same
from examples_in_files import random_chats, random_pairs, write_records
from hypothesis import given
from hypothesis import strategies as st

from gemma2.data import (
    IGNORED_LABEL,
    ExampleLoader,
    PackedBatch,
    TokenizedExamples,
    batch_for_validation,
    tokenize_examples,
)
from gemma2.data.example_packing import plan_packed_rows, shuffled_order
from gemma2.errors import DataError
from gemma2.text import Tokenizer

LENGTH = 200
NAMES = ("input_ids", "labels", "positions", "segment_ids")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenizedExamples:
    file = write_records(tmp_path_factory.mktemp("chats") / "x.jsonl", random_chats(seed=1, count=61, longest=60))
    return tokenize_examples(file, tokenizer, sequence_length=LENGTH)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> TokenizedExamples:
    file = write_records(tmp_path_factory.mktemp("pairs") / "x.jsonl", random_pairs(seed=2, count=37, longest=60))
    return tokenize_examples(file, tokenizer, sequence_length=LENGTH)


WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "a row each": {"packing": False},
    "in order": {"shuffle": False},
    "a row each, in order": {"packing": False, "shuffle": False},
    "large batches": {"batch_size": 1000},
}
Sequence = tuple[tuple[int, ...], tuple[int, ...]]


def loader(examples: TokenizedExamples, **settings: Any) -> ExampleLoader:
    return ExampleLoader(examples, **{"batch_size": 3, "num_epochs": 2, **settings})


def sequences(batch: PackedBatch, *, bos_id: int = 2, pad_id: int = 0) -> list[list[Sequence]]:
    """What each segment of each row reads and is to say, after a check of all that must hold in a row."""
    assert {getattr(batch, name).dtype for name in NAMES} == {np.dtype(np.int64)}
    rows = []
    for row in range(len(batch.input_ids)):
        inputs, labels, positions, ids = (getattr(batch, name)[row].tolist() for name in NAMES)
        found: list[Sequence] = []
        place = 0
        for segment in range(1, max(ids) + 1):
            end = place + ids.count(segment)
            assert ids[place:end] == [segment] * (end - place) and end > place
            assert positions[place:end] == list(range(end - place))
            assert inputs[place] == bos_id and bos_id not in inputs[place + 1 : end]
            assert labels[end - 1] != IGNORED_LABEL, "a sequence ends with what is trained"
            for current, following in zip(labels[place : end - 1], inputs[place + 1 : end], strict=True):
                assert current in (IGNORED_LABEL, following)
            found.append((tuple(inputs[place:end]), tuple(labels[place:end])))
            place = end
        padding = len(inputs) - place
        assert inputs[place:] == [pad_id] * padding
        assert labels[place:] == [IGNORED_LABEL] * padding
        assert ids[place:] == positions[place:] == [0] * padding
        rows.append(found)
    return rows


def all_sequences(examples: TokenizedExamples) -> list[Sequence]:
    count = len(examples) * examples.sequences_per_example
    both = (examples.inputs_and_labels(sequence) for sequence in range(count))
    return [(tuple(inputs.tolist()), tuple(labels.tolist())) for inputs, labels in both]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_every_example_comes_once_an_epoch(request: pytest.FixtureRequest, kind: str, way: str) -> None:
    examples: TokenizedExamples = request.getfixturevalue(kind)
    expected = Counter(all_sequences(examples))
    assert set(expected.values()) == {1}
    whole = loader(examples, num_epochs=3, **WAYS[way])
    assert whole.total_batches == sum(whole.num_batches(epoch) for epoch in range(3)) == whole.batches_left
    orders = []
    for epoch in range(3):
        batches = list(islice(whole, whole.num_batches(epoch)))
        assert whole.epoch == epoch
        rows = [row for batch in batches for row in sequences(batch)]
        assert Counter(sequence for row in rows for sequence in row) == expected
        # Padding rows come last, and fewer than a batch.
        real = [row for row in rows if row]
        assert rows[: len(real)] == real and len(real) == whole.num_rows(epoch)
        assert len(rows) - len(real) < len(batches[0].input_ids)
        assert whole.examples_seen == (epoch + 1) * len(examples)
        assert whole.tokens_seen == (epoch + 1) * sum(batch.num_tokens for batch in batches)
        orders.append([sequence for row in rows for sequence in row])
    assert whole.batches_left == 0
    with pytest.raises(StopIteration):
        next(whole)
    same = WAYS[way].get("shuffle", True) is False
    assert (orders[0] == orders[1] == orders[2]) == same
    if "packing" in WAYS[way] and same:
        assert orders[0] == all_sequences(examples)


def test_packed_and_not_packed_train_the_same(chats: TokenizedExamples) -> None:
    packed, single = loader(chats, num_epochs=1), loader(chats, num_epochs=1, packing=False)
    assert packed.num_rows(0) <= single.num_rows(0) / 2
    trained = []
    for one in (packed, single):
        found = Counter[Any]()
        for batch in one:
            for row in sequences(batch):
                for inputs, labels in row:
                    # Each trained token with all that it can see.
                    found.update((inputs[: place + 1], label) for place, label in enumerate(labels) if label >= 0)
        trained.append(found)
    assert trained[0] == trained[1]
    assert trained[0].total() == chats.num_trained.sum()


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_are_neighbours_in_one_row(pairs: TokenizedExamples, packing: bool) -> None:
    every = all_sequences(pairs)
    chosen_then_rejected = dict(zip(every[::2], every[1::2], strict=True))
    for batch in loader(pairs, packing=packing):
        for row in sequences(batch):
            assert len(row) % 2 == 0
            assert packing or len(row) in (0, 2)
            # Segment 2k - 1 is the chosen one, 2k the rejected one.
            for chosen, rejected in zip(row[::2], row[1::2], strict=True):
                assert chosen_then_rejected[chosen] == rejected


def test_rows_of_one_example_are_as_wide_as_the_longest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "x.jsonl", random_chats(seed=5, count=60, longest=80))
    chats = tokenize_examples(file, tokenizer, sequence_length=150, too_long="truncate")
    widths = set()
    for batch in loader(chats, packing=False, batch_size=1, num_epochs=1):
        longest = max(np.count_nonzero(row) for row in batch.segment_ids)
        assert batch.input_ids.shape[1] == min(150, -(-longest // 64) * 64)
        widths.add(batch.input_ids.shape[1])
    assert widths == {64, 128, 150}
    assert {batch.input_ids.shape for batch in loader(chats)} == {(3, 150)}


# Processes


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("batch_size", "world_size"), [(6, 2), (6, 3), (4, 4), (24, 2)])
def test_processes_together_see_the_rows_of_one(
    chats: TokenizedExamples, packing: bool, batch_size: int, world_size: int
) -> None:
    one = loader(chats, packing=packing, batch_size=batch_size)
    ranks = [
        loader(chats, packing=packing, batch_size=batch_size // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {rank.total_batches for rank in ranks} == {one.total_batches}
    for batch in one:
        parts = [next(rank) for rank in ranks]
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in NAMES}
        assert_same(batch, PackedBatch(**joined))
        states = [json.dumps(rank.state_dict()) for rank in ranks]
        assert set(states) == {json.dumps(one.state_dict())}
        assert {(rank.examples_seen, rank.tokens_seen) for rank in ranks} == {(one.examples_seen, one.tokens_seen)}
    for rank in ranks:
        with pytest.raises(StopIteration):
            next(rank)


# Resuming


def through_npz(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("trip", [dict, lambda state: json.loads(json.dumps(state)), through_npz])
@pytest.mark.parametrize("way", ["packed", "a row each"])
@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_resuming_is_exact_at_every_batch(request: pytest.FixtureRequest, kind: str, way: str, trip: Any) -> None:
    examples: TokenizedExamples = request.getfixturevalue(kind)
    whole = loader(examples, **WAYS[way])
    states, batches, progress = [whole.state_dict()], [], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
        progress.append((whole.epoch, whole.examples_seen, whole.tokens_seen, whole.batches_left))
    assert len(batches) == whole.total_batches
    for stop, state in enumerate(states):
        resumed = loader(examples, **WAYS[way])
        resumed.load_state_dict(trip(state))
        assert resumed.batches_left == len(batches) - stop
        for number in range(stop, min(stop + 2, len(batches))):
            assert_same(next(resumed), batches[number])
            assert progress[number] == (
                resumed.epoch,
                resumed.examples_seen,
                resumed.tokens_seen,
                resumed.batches_left,
            )
            assert resumed.state_dict() == states[number + 1]
    assert len(json.dumps(states[-1])) < 2000


def test_another_number_of_processes_goes_on_with_the_same_rows(chats: TokenizedExamples) -> None:
    whole = loader(chats, batch_size=1, num_epochs=3)
    rows = [next(whole).input_ids[0].tolist() for _ in range(11)]
    two = [loader(chats, batch_size=2, world_size=2, rank=rank, num_epochs=None) for rank in range(2)]
    first = [next(rank).input_ids.tolist() for rank in two]
    assert first[0] + first[1] == rows[:4]
    resumed = loader(chats, batch_size=7)
    resumed.load_state_dict(two[1].state_dict())
    assert next(resumed).input_ids.tolist() == rows[4:11]
    assert resumed.batches_left is not None
    assert len(list(resumed)) == resumed.num_batches(1) + -(-(resumed.num_rows(0) - 11) // 7)


def test_more_or_fewer_epochs_than_before(chats: TokenizedExamples) -> None:
    whole = loader(chats, num_epochs=2)
    states = [whole.state_dict() for _ in whole]
    more = loader(chats, num_epochs=3)
    more.load_state_dict(states[-1])
    assert more.batches_left == more.num_batches(2) == len(list(more))
    fewer = loader(chats, num_epochs=1)
    fewer.load_state_dict(states[-1])
    assert fewer.batches_left == 0
    assert list(fewer) == []


def test_without_a_number_of_epochs_it_never_ends(chats: TokenizedExamples) -> None:
    endless = loader(chats, num_epochs=None, batch_size=20)
    assert endless.total_batches is None and endless.batches_left is None
    for _ in islice(endless, 30):
        pass
    assert endless.epoch > 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "the loader cannot go on: seed changed: it was 0 and is 1"),
        ({"packing": False}, "packing changed: it was True and is False"),
        ({"shuffle": False}, "shuffle changed"),
    ],
)
def test_a_state_of_other_settings_is_refused(chats: TokenizedExamples, changed: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader(chats, **changed).load_state_dict(loader(chats).state_dict())


def test_a_state_of_other_examples_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = random_chats(seed=4, count=10, longest=20)
    file = write_records(tmp_path / "x.jsonl", records)

    def state(**settings: Any) -> ExampleLoader:
        return loader(tokenize_examples(file, tokenizer, **{"sequence_length": LENGTH, **settings}))

    saved = state().state_dict()
    state().load_state_dict(saved)
    size = file.stat().st_size
    for settings, message in [
        ({"sequence_length": 100}, "sequence_length changed: it was 200 and is 100"),
        ({"train_on": "last_answer"}, "train_on changed: it was 'answers' and is 'last_answer'"),
        ({"strict_system": True}, "strict_system changed"),
        ({"max_examples": 3}, "contents changed. Resume with"),
    ]:
        with pytest.raises(DataError, match=message):
            state(**settings).load_state_dict(saved)  # type: ignore[arg-type]
    file.write_bytes(file.read_bytes().replace(b'"0 ', b'"9 '))
    with pytest.raises(DataError, match="contents changed"):
        state().load_state_dict(saved)
    write_records(file, records[:-1])
    with pytest.raises(DataError, match=rf"files changed: it was \['x.jsonl', {size}\] and is \['x.jsonl', \d+\]"):
        state().load_state_dict(saved)
    write_records(file, records)
    (tmp_path / "elsewhere").mkdir()
    file = file.rename(tmp_path / "elsewhere" / "x.jsonl")
    state(on_error="skip").load_state_dict(saved)


def test_a_damaged_state_is_refused(chats: TokenizedExamples) -> None:
    state = loader(chats).state_dict()
    for damaged, message in [
        ({}, "this is no state of an ExampleLoader"),
        ({**state, "version": 9}, "version 9, but only 1"),
        ({**state, "fingerprint": "{"}, "damaged"),
        ({**state, "row": 10_000}, "there is no row 10000 in epoch 0"),
        ({**state, "epoch": -1}, "there is no row 0 in epoch -1"),
        ({name: value for name, value in state.items() if name != "row"}, "row"),
    ]:
        with pytest.raises(DataError, match=message):
            loader(chats).load_state_dict(damaged)


# Order and packing


def test_the_order_never_changes_between_versions() -> None:
    assert shuffled_order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert shuffled_order(8, seed=0, epoch=1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    assert shuffled_order(8, seed=7, epoch=0).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]


def test_seeds_and_epochs_set_the_order() -> None:
    orders = {tuple(shuffled_order(30, seed=seed, epoch=epoch)) for seed in (0, 1, 2**64 - 1) for epoch in range(4)}
    assert len(orders) == 12
    assert all(sorted(order) == list(range(30)) for order in orders)


@given(
    places=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    lookahead=st.integers(1, 100),
    seed=st.integers(0, 5),
)
def test_packing_neither_loses_nor_splits(places: list[int], lookahead: int, seed: int) -> None:
    order = shuffled_order(len(places), seed=seed, epoch=0)
    plan = plan_packed_rows(np.array(places), order, sequence_length=50, lookahead=lookahead)
    rows = [row.tolist() for row in plan.rows(0, plan.num_rows)]
    assert sorted(example for row in rows for example in row) == list(range(len(places)))
    assert all(rows)
    came = {example: place for place, example in enumerate(order.tolist())}
    taken: set[int] = set()
    arrived = 0
    for row in rows:
        while arrived < len(places) and arrived - len(taken) < lookahead:
            arrived += 1
        pool = {int(example) for example in order[:arrived]} - taken
        # The one that has waited longest, and then the longest that fits, of equal ones the first to come.
        assert row[0] == min(pool, key=lambda example: came[example])
        room = 50
        for example in row:
            pool.remove(example)
            room -= places[example]
            assert room >= 0
        assert all(places[example] > room for example in pool)
        left = 50 - places[row[0]]
        for example in row[1:]:
            better = [other for other in pool | set(row[row.index(example) :]) if places[other] <= left]
            assert min(better, key=lambda other: (-places[other], came[other])) == example
            left -= places[example]
        taken.update(row)


def test_rows_are_nearly_full() -> None:
    generator = np.random.default_rng(0)
    places = np.minimum(2048, generator.lognormal(5.3, 0.8, size=5000).astype(np.int64) + 1)
    plan = plan_packed_rows(places, np.arange(5000), sequence_length=2048)
    assert places.sum() / (plan.num_rows * 2048) > 0.99


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"seed": -1}, r"seed must be from 0 to 2\*\*64 - 1, but is -1"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1, but is 2"),
    ],
)
def test_settings_out_of_range_are_refused(chats: TokenizedExamples, setting: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loader(chats, **setting)


# Validation


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_a_validation_set_counts_what_is_trained(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, kind: str
) -> None:
    examples: TokenizedExamples = request.getfixturevalue(kind)
    found = batch_for_validation(examples, tokenizer, batch_size=4)
    again = batch_for_validation(examples, tokenizer, batch_size=4)
    for left, right in zip(found.batches, again.batches, strict=True):
        assert_same(left, right)
    segments = [sequence for batch in found.batches for row in sequences(batch) for sequence in row]
    assert Counter(segments) == Counter(all_sequences(examples))
    assert found.num_tokens == sum(batch.num_tokens for batch in found.batches)
    answers = [[label for label in labels if label >= 0] for _, labels in all_sequences(examples)]
    assert found.num_bytes == sum(len(tokenizer.decode(answer).encode()) for answer in answers)
    assert found.num_documents == len(examples)
    shares = [batch_for_validation(examples, tokenizer, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert {(share.num_tokens, share.num_bytes) for share in shares} == {(found.num_tokens, found.num_bytes)}
    assert sum(batch.num_tokens for share in shares for batch in share.batches) == found.num_tokens
    assert len(shares[0].batches) == len(shares[1].batches) == len(found.batches)
