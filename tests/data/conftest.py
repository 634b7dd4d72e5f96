"""The tokenizer that examples are encoded with: Gemma's own where it is at hand, else the bundled model's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma2.api import BUNDLED_FOLDER
from gemma2.text import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """Gemma's own, if GEMMA2_TEST_TOKENIZER names its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Tokenizer.from_folder(Path(os.environ.get("GEMMA2_TEST_TOKENIZER", BUNDLED_FOLDER)))
