"""A corpus of a few pages and settings of a model that trains on it in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from small_run import settings_for

SENTENCE = "the cat sees a dog then slowly runs from old house to new green river and she was where he is"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 40 documents, made of whole sentences."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(40):
            sentences = (" ".join(draw.choices(SENTENCE.split(), k=draw.randint(4, 12))) + "." for _ in range(40))
            file.write(json.dumps({"text": "\n".join(sentences)}) + "\n")
    return path


@pytest.fixture
def settings_text(corpus: Path) -> str:
    """Settings for `corpus`, with {output} to fill in."""
    return settings_for(corpus)
