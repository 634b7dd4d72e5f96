"""`gemma2 inspect`: the tree that PyTorch prints, the layers, the counts, and the files of a folder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2.checkpoints import expected_tensors, save_checkpoint
from gemma2.cli.main import main
from gemma2.cli.module_tree import module_tree
from gemma2.config import FULL, PRESETS, SLIDING, Gemma2Config

SMALL = Gemma2Config(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    query_pre_attn_scalar=12,
    vocab_size=320,
    sliding_window=5,
    layer_types=(FULL, SLIDING, FULL),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model in two shards, without a tokenizer."""
    arrays = ((name, np.zeros(shape, np.float32)) for name, shape in expected_tensors(SMALL).items())
    save_checkpoint(tmp_path, SMALL, arrays, max_shard_bytes=30_000)
    return tmp_path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(inspect(capsys, *arguments, "--json"))
    return values


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL, SMALL.replace(num_hidden_layers=1)])
def test_the_tree_is_what_pytorch_prints(config: Gemma2Config) -> None:
    pytest.importorskip("torch")
    from gemma2.model import Gemma2ForCausalLM

    assert module_tree(config) == str(Gemma2ForCausalLM(config, device="meta"))


def test_the_27b_is_the_tree_of_the_post(capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(capsys, "27b")
    for line in (
        "    (embed_tokens): Embedding(256000, 4608, padding_idx=0)",
        "      (0-45): 46 x Gemma2DecoderLayer(",
        "          (q_proj): Linear(in_features=4608, out_features=4096, bias=False)",
        "          (k_proj): Linear(in_features=4608, out_features=2048, bias=False)",
        "          (o_proj): Linear(in_features=4096, out_features=4608, bias=False)",
        "          (down_proj): Linear(in_features=36864, out_features=4608, bias=False)",
        "          (act_fn): PytorchGELUTanh()",
        "        (post_feedforward_layernorm): Gemma2RMSNorm()",
        "  (lm_head): Linear(in_features=4608, out_features=256000, bias=False)",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("2b", ["590,118,912", "2,024,517,888", "2,614,341,888", "1 / √256 = 0.0625", "8 query, 4 key/value heads"]),
        ("9b", ["917,962,752", "8,324,201,984", "9,241,705,984", "1 / √256 = 0.0625", "16 query, 8 key/value heads"]),
        ("27b", ["1,180,237,824", "26,047,480,320", "27,227,128,320", "1 / √144 = 0.0833333", "32 query, 16 key/"]),
    ],
)  # fmt: skip
def test_published_sizes_show_the_reports_counts(
    name: str, figures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = inspect(capsys, name)
    assert [figure for figure in figures if figure not in text] == []
    assert "\x1b" not in text and "─" not in text


def test_layers_are_shown_in_their_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "   0  LGLGLGLGLG LGLGLGLGLG LGLGLG\n" in inspect(capsys, "2b")
    text = inspect(capsys, str(folder))
    assert "   0  GLG\n" in text
    assert "L local: 1 layers, a query sees the last 5 tokens, itself included" in text


def test_a_folder_shows_its_files_and_says_that_it_has_no_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = inspect(capsys, str(folder))
    assert "model-00001-of-00002.safetensors" in text and "tensors in F32" in text
    assert "none that can be used: " in text and "needs a tokenizer.json or a tokenizer.model" in text
    values = inspect_json(capsys, str(folder))
    assert values["tokenizer"] is None and "tokenizer.json" in values["tokenizer_problem"]
    sizes = {file["name"]: file["bytes"] for file in values["files"]}
    assert sizes["config.json"] == (folder / "config.json").stat().st_size
    assert values["dtypes"] == {"F32": 35}
    assert values["tensor_bytes"] == 4 * SMALL.count_parameters().total


def test_packed_weights_beside_the_others_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model-q4.gemma2.safetensors"
    (folder / name).write_bytes(b"123")
    (line,) = (line for line in inspect(capsys, str(folder)).splitlines() if line.startswith(name))
    assert "packed weights, not used beside the others" in line
    assert {"name": name, "bytes": 3} in inspect_json(capsys, str(folder))["files"]


def test_a_folder_shows_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gemma2.text import train_tokenizer

    tokenizers = tmp_path / "tokenizer"
    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshrdlu", k=6)) for _ in range(300)]
    lines = [f"The quick brown fox {word} jumps over the lazy dog {word}" for word in words]
    train_tokenizer(lines, vocab_size=600, folder=tokenizers)
    config = SMALL.replace(vocab_size=1024)
    arrays = ((name, np.zeros(shape, np.float32)) for name, shape in expected_tensors(config).items())
    folder = tmp_path / "model"
    save_checkpoint(folder, config, arrays, tokenizer_files=list(tokenizers.iterdir()))
    values = inspect_json(capsys, str(folder))["tokenizer"]
    assert (values["pad_id"], values["eos_id"], values["bos_id"], values["unk_id"]) == (0, 1, 2, 3)
    assert values["stop_ids"] == [1, 107]
    text = inspect(capsys, str(folder))
    assert f"{values['vocab_size']:,} pieces, {1024 - values['vocab_size']:,} rows spare" in text
    assert "pad 0, eos 1, bos 2, unk 3; an answer stops at 1 <eos>, 107 <end_of_turn>" in text
    assert "a sentence  <bos>|The" in text


def test_tensors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect(capsys, "27b", "--tensors").splitlines()
    assert len(lines) == 1 + 2 + 46 * 11
    assert lines[1].split() == ["model.embed_tokens.weight", "256000", "×", "4608"]
    lines = inspect(capsys, str(folder), "--tensors").splitlines()
    assert lines[-1].split() == ["model.norm.weight", "16", "F32"]
    tensors = inspect_json(capsys, str(folder), "--tensors")["tensors"]
    assert tensors[0] == {"name": "model.embed_tokens.weight", "shape": [320, 16], "dtype": "F32"}
    assert inspect_json(capsys, "2b", "--tensors")["tensors"][0]["dtype"] is None


def test_json_has_the_config_and_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    values = inspect_json(capsys, "9b")
    assert Gemma2Config.from_dict(values["config"]) == PRESETS["9b"]
    assert values["parameters"]["total"] == 9_241_705_984
    assert values["parameters_in_report"]["embedding"] == 917_962_752
    assert values["layers"][0] == {"index": 0, "type": SLIDING, "window": 4096}
    assert values["layers"][41] == {"index": 41, "type": FULL, "window": None}
    assert "tensors" not in values and "files" not in values


def test_a_terminal_gets_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    text = inspect(capsys, "27b")
    assert "\x1b[" in text
    assert "(in_features=4608, out_features=36864, bias=False)\n" in text  # the tree is never folded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("27B", "there is no model '27B'; the published size is written '27b'"),
        ("./nowhere", "./nowhere: there is no such folder"),
        ("google/gemma-2-2b", "gemma2 pull google/gemma-2-2b"),
    ],
)
def test_what_is_not_there_is_one_line(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["inspect", name]) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and message in output.err


def test_a_damaged_folder_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["inspect", str(folder)]) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and shard.name in output.err
    shutil.rmtree(folder)
    assert main(["inspect", str(folder)]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_without_the_bundled_model_it_says_what_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gemma2.api.BUNDLED_FOLDER", tmp_path)
    assert main(["inspect"]) == 1
    assert "came without the bundled model; name one of 2b, 9b, 27b, or a folder" in capsys.readouterr().err
