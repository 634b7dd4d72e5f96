"""The settings file: every mistake at once, each with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma2.errors import ConfigError
from gemma2.training.distill_settings import load_distill_settings
from gemma2.training.settings import load_pretrain_settings

GOOD = """
output: runs/x
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, head_dim: 16, query_pre_attn_scalar: 16, sliding_window: 8,
        max_position_embeddings: 64}
data: {train: [a.txt]}
optimizer: {learning_rate: 1.0e-3}
run: {num_steps: 5, batch_size: 2, sequence_length: 32}
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_reads_and_fills_in_defaults(tmp_path: Path) -> None:
    settings = load_pretrain_settings(_write(tmp_path, GOOD))
    assert settings.run.num_steps == 5
    assert settings.tokenizer.vocab_size == 8192
    assert settings.gemma2_config(1000).layer_types == ("sliding_attention", "full_attention")


def test_overrides_from_the_command_line(tmp_path: Path) -> None:
    settings = load_pretrain_settings(_write(tmp_path, GOOD), ["run.num_steps=7", "data.train=[b.txt, c.txt]"])
    assert settings.run.num_steps == 7
    assert settings.data.train == ["b.txt", "c.txt"]


def test_all_mistakes_are_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("num_steps: 5", "num_stepz: 5").replace("hidden_size: 32", "hiden_size: 32")
    text = text.replace("learning_rate: 1.0e-3", "learning_rate: -1")
    with pytest.raises(ConfigError) as caught:
        load_pretrain_settings(_write(tmp_path, text))
    message = str(caught.value)
    assert "4 mistakes" in message
    assert "Did you mean 'num_steps'?" in message
    assert "Did you mean 'hidden_size'?" in message
    assert "run.num_steps: is needed" in message
    assert "optimizer.learning_rate" in message and "-1" in message


def test_what_follows_from_a_mistake_is_not_told_as_another(tmp_path: Path) -> None:
    text = (
        "output: x\nstudent: {name: [3]}\ntext: {train: [a.txt]}\noptimizer: {learning_rate: 1.0}\n"
        "run: {num_steps: many, batch_size: 2, sequence_length: 32, keep_best: true}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_distill_settings(_write(tmp_path, text))
    message = str(caught.value)
    assert (
        "3 mistakes: student.name: " in message and "run.num_steps: " in message and "run.keep_best goes by" in message
    )
    assert "needs either name" not in message and "is needed with text" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "must hold settings"),
        ("a: [1\n", "is not valid YAML"),
        (GOOD.replace("num_key_value_heads: 1", "num_key_value_heads: 3"), "multiple of num_key_value_heads"),
        (GOOD.replace("hidden_size: 32", "vocab_size: 9, hidden_size: 32"), "set it under tokenizer"),
        (GOOD.replace("batch_size: 2", "batch_size: 2, micro_batch_size: 3"), "multiple of micro_batch_size"),
        (GOOD.replace("train: [a.txt]", "train: []"), "data.train"),
    ],
)
def test_one_mistake(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_pretrain_settings(_write(tmp_path, text))


@pytest.mark.parametrize("override", ["run.num_steps", "=3", "run.num_steps.x=3", "run.num_steps=[1"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_pretrain_settings(_write(tmp_path, GOOD), [override])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file"):
        load_pretrain_settings(tmp_path / "absent.yaml")


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    settings = load_pretrain_settings(_write(tmp_path, GOOD), ["model.rms_norm_eps=1e-5"])
    assert settings.gemma2_config(100).rms_norm_eps == 1e-5
