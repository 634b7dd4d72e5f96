"""Tokenizers to test with: a small one that is trained on the spot, and Gemma's own where it is at hand."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from awkward_texts import TRAINING_TEXT

from gemma2.text import Tokenizer, train_tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the twins of large tokenizers out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and tokenizer.model, of 640 entries."""
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer([TRAINING_TEXT] * 3, vocab_size=640, folder=folder, character_coverage=1.0, num_threads=1)
    return folder


@pytest.fixture(scope="session")
def by_json(trained_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(trained_folder / "tokenizer.json")


@pytest.fixture(scope="session")
def by_model(trained_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(trained_folder / "tokenizer.model")


@pytest.fixture(scope="session", params=["json", "model"])
def tokenizer(request: pytest.FixtureRequest, trained_folder: Path) -> Tokenizer:
    """The trained tokenizer, over each of the two libraries."""
    return Tokenizer.from_file(trained_folder / f"tokenizer.{request.param}")


@pytest.fixture(scope="session")
def gemma_folder() -> Path:
    """The folder of Gemma's own tokenizer.json; the test is skipped where there is none."""
    named = os.environ.get("GEMMA2_TEST_TOKENIZER")
    folder = Path(named) if named else Path(__file__).parents[2].parent / "shared" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("needs Gemma's tokenizer.json in the folder that GEMMA2_TEST_TOKENIZER names")
    return folder
