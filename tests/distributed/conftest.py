"""A corpus, examples, a random base model, and two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import BASE
from several_processes import Processes
from small_run import write_corpus, write_examples, write_random_model


@pytest.fixture(scope="session")
def pair() -> Iterator[Processes]:
    """Two processes."""
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_corpus`."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "train.jsonl", num_sentences=20)


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_examples`; their number does not divide by two."""
    return write_examples(tmp_path_factory.mktemp("examples"), num_sums=23)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the bundled tokenizer, in two files."""
    return write_random_model(tmp_path_factory.mktemp("base"), BASE, std=0.15, max_shard_bytes=2_200_000)
