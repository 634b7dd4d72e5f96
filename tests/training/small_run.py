"""Data, models and settings of runs that take a second, and a progress that remembers and can kill a run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import yaml

import gemma2
from gemma2.api import BUNDLED_FOLDER
from gemma2.checkpoints import save_checkpoint
from gemma2.config import Gemma2Config
from gemma2.model.loading import state_arrays
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.loop import StepReport
from gemma2.training.settings_file import Section, read_settings

SENTENCE: Final = "the cat sees a dog then slowly runs from old house to new green river and she was where he is"
SHORT_RUN: Final = {
    "num_steps": 6,
    "batch_size": 4,
    "num_threads": 1,
    "log_every": 1,
    "checkpoint_every": 2,
    "save_dtype": "float32",
}
"""The section `run` of settings."""

Settings = TypeVar("Settings", bound=Section)


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others in their place: sections key by key, and None takes one away."""
    result = dict(values)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = {**result[key], **value}
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def written_settings(kind: type[Settings], path: Path, values: Mapping[str, Any]) -> Settings:
    """Settings as they come out of a file, which stays there."""
    path.write_text(yaml.safe_dump(dict(values)))
    return read_settings(kind, path)


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_corpus(file: Path, *, num_sentences: int) -> Path:
    """A JSONL file of 40 documents, made of whole sentences."""
    draw = random.Random(0)

    def document() -> str:
        sentences = (
            " ".join(draw.choices(SENTENCE.split(), k=draw.randint(4, 12))) + "." for _ in range(num_sentences)
        )
        return "\n".join(sentences)

    return write_lines(file, ({"text": document()} for _ in range(40)))


def write_examples(folder: Path, *, num_sums: int = 24) -> Path:
    """Questions and answers (sums.jsonl), others (other.jsonl), and preference pairs (pairs.jsonl)."""
    sums = [{"question": f"How much is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(num_sums)]
    write_lines(folder / "sums.jsonl", sums)
    names = ("Ishmael", "Emma")
    other = [{"question": "Who are you?", "answer": f"Call me {name}, if you must."} for name in names]
    write_lines(folder / "other.jsonl", other)
    pairs = [
        {"prompt": f"How much is {i} and {i}?", "chosen": f"It is {2 * i}.", "rejected": "I do not know."}
        for i in range(16)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


def write_random_model(folder: Path, config: Gemma2Config, *, std: float, **options: Any) -> Path:
    """A model with the bundled tokenizer; options are those of `save_checkpoint`."""
    model = Gemma2ForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
    files = [BUNDLED_FOLDER / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    return save_checkpoint(folder, config, state_arrays(model), tokenizer_files=files, **options)


def settings_for(corpus: Path) -> str:
    """Settings for a corpus, with {output} to fill in."""
    return f"""
output: {{output}}
model: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
         num_key_value_heads: 2, head_dim: 8, query_pre_attn_scalar: 8, sliding_window: 8,
         max_position_embeddings: 64}}
tokenizer: {{vocab_size: 530}}
data: {{train: [{corpus}], validation: [{corpus}], validation_max_tokens: 400, shuffle_buffer: 50}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 2}}
run: {{num_steps: 12, batch_size: 4, sequence_length: 32, num_threads: 1, log_every: 1,
       validate_every: 6, checkpoint_every: 3, save_dtype: float32}}
"""


def kill_and_finish(arguments: list[str], log: Path, *, num_kills: int = 2) -> None:
    """The real program, killed at random moments, then left to finish.

    Args:
        arguments: of `gemma2`.
        log: a file of lines, or a folder of files, that grows while it works; kills come soon after that.
        num_kills: how many.
    """
    command = [sys.executable, "-m", "gemma2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parent.parent)}
    draw = random.Random(os.getpid())

    def num_done() -> int:
        if log.is_dir():
            return len(list(log.iterdir()))
        return len(log.read_text().splitlines()) if log.exists() else 0

    for _ in range(num_kills):
        before = num_done()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        while process.poll() is None and num_done() < min(before, 6) + 1:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), errors  # 0: it was done before it could be killed
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr


class KilledError(Exception):
    """Stands for a process that is killed."""


class Silent:
    """Shows nothing, remembers losses, and dies after a step if told so."""

    def __init__(self, die_at: int | None = None) -> None:
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self._die_at = die_at

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        if report.step == self._die_at:
            raise KilledError

    def on_validation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        self.validations.append((step, loss))

    def on_checkpoint(self, path: Path) -> None:
        pass
