"""A corpus, examples, a random base model, and two processes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import BASE
from several_processes import Processes

from gemma2.api import BUNDLED_FOLDER
from gemma2.checkpoints import save_checkpoint
from gemma2.model.loading import state_arrays
from gemma2.model.modeling import Gemma2ForCausalLM

TEXT = "the cat sees a dog then slowly runs from old house to new green river and she was where he is"


@pytest.fixture(scope="session")
def pair() -> Iterator[Processes]:
    """Two processes."""
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 40 documents."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "train.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(40):
            sentences = (" ".join(draw.choices(TEXT.split(), k=draw.randint(4, 12))) + "." for _ in range(20))
            file.write(json.dumps({"text": "\n".join(sentences)}) + "\n")
    return path


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions and answers, and with preference pairs."""
    folder = tmp_path_factory.mktemp("examples")
    rows = [{"question": f"How much is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(23)]
    pairs = [
        {"prompt": f"How much is {i} and {i}?", "chosen": f"It is {2 * i}.", "rejected": "I do not know."}
        for i in range(16)
    ]
    other = [{"question": "Who are you?", "answer": f"Call me {name}, if you must."} for name in ("Ishmael", "Emma")]
    (folder / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the bundled tokenizer, in two files."""
    model = Gemma2ForCausalLM(BASE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15, generator=generator)
    files = [BUNDLED_FOLDER / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    folder = tmp_path_factory.mktemp("base")
    return save_checkpoint(folder, BASE, state_arrays(model), tokenizer_files=files, max_shard_bytes=2_200_000)
