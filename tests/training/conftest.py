"""A corpus of a few pages and settings of a model that trains on it in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import settings_for, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_corpus`."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "train.jsonl", num_sentences=40)


@pytest.fixture
def settings_text(corpus: Path) -> str:
    """Settings for `corpus`, with {output} to fill in."""
    return settings_for(corpus)
