"""`gemma2 plan`: its arguments, its figures and its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma2.cli.main import main
from gemma2.config import PRESETS
from gemma2.memory.training import activation_bytes
from gemma2.memory.weights import weight_bytes

MIB = 2**20


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_running_a_9b_at_its_whole_context(capsys: pytest.CaptureFixture[str]) -> None:
    values = plan(capsys, "9b", "--memory", "24GiB")
    assert (values["parameters"], values["context"]) == (9_241_705_984, 8192)
    assert values["kv_cache_of_one_sequence"]["bfloat16"] == {"bounded": 2016 * MIB, "whole": 2688 * MIB}
    running = {entry["weight_format"]: entry for entry in values["running"]}
    assert running["bfloat16"]["weights"] == 2 * 9_241_705_984
    assert running["q4"]["weights"] == weight_bytes(PRESETS["9b"], "q4", second_plane=True)
    assert running["float32"]["kv_cache"] == 2 * running["bfloat16"]["kv_cache"]
    for entry in running.values():
        assert entry["total"] == entry["weights"] + entry["kv_cache"] + entry["prefill"] + entry["logits"]
    verdicts = {name: entry["verdicts"]["24.0 GiB"] for name, entry in running.items()}
    assert verdicts == {"float32": "too large", "bfloat16": "fits", "q8": "fits", "q4": "fits"}


def test_a_batch_takes_a_cache_for_each_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    one, four = plan(capsys, "2b", "--context", "5000"), plan(capsys, "2b", "--context", "5000", "--batch", "4")
    for before, after in zip(one["running"], four["running"], strict=True):
        assert after["kv_cache"] == 4 * before["kv_cache"] and after["logits"] == 4 * before["logits"]
        assert (after["weights"], after["prefill"]) == (before["weights"], before["prefill"])


def test_as_many_sequences_as_it_says_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "2b", "--memory", "8GiB"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bfloat16"))
    most = int(line.rpartition("up to ")[2])
    for batch, verdict in ((most, "fits"), (most + 1, "too large")):
        bf16 = plan(capsys, "2b", "--memory", "8GiB", "--batch", str(batch))["running"][1]
        assert bf16["verdicts"] == {"8.00 GiB": verdict}


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("2b", "--context", "1024", "--batch", "2", "--memory", "80GiB")
    full = plan(capsys, *options, "--train", "full")["training"]
    expected = activation_bytes(PRESETS["2b"], batch_size=2, length=1024, checkpointing=True)
    assert full["with_checkpointing"]["activations"] == expected
    assert full["without_checkpointing"]["activations"] > 8 * expected
    assert full["with_checkpointing"]["verdicts"] == {"80.0 GiB": "fits"}
    lora = plan(capsys, *options, "--train", "lora", "--rank", "8", "--modules", "q_proj,v_proj")["training"]
    assert lora["with_checkpointing"]["master_weights"] == 4 * 8 * 26 * (2304 + 2048 + 2304 + 1024)
    qlora = plan(capsys, *options, "--train", "qlora")["training"]
    assert qlora["with_checkpointing"]["weights"] < lora["with_checkpointing"]["weights"] / 2


def test_training_on_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("27b", "--context", "4096", "--memory", "80GiB", "--train")
    one, shared, both = (
        plan(capsys, *options, "full", *more)["training"]["with_checkpointing"]
        for more in ([], ["--gpus", "8"], ["--gpus", "8", "--tensor", "4"])
    )
    norms = (4 * 46 + 1) * 4608
    part = (27_227_128_320 - norms) // 8 + norms
    assert (shared["master_weights"], shared["gradients"], shared["optimizer"]) == (4 * part, 4 * part, 8 * part)
    assert shared["activations"] == one["activations"] and both["activations"] < one["activations"]
    assert both["gathered"] == shared["gathered"] // 4
    assert both["verdicts"] == {"80.0 GiB": "fits"} and one["verdicts"] == {"80.0 GiB": "too large"}
    lora = plan(capsys, *options, "lora", "--gpus", "8")["training"]["with_checkpointing"]
    assert lora["weights"] == 27_227_128_320 * 2 // 8
    qlora = [plan(capsys, *options, "qlora", *more)["training"] for more in ([], ["--gpus", "8"])]
    assert qlora[0] == qlora[1], "quantized weights are whole in each process"


@pytest.mark.parametrize("train", [[], ["--train", "full"], ["--train", "lora"], ["--train", "qlora"]])
def test_what_people_read_has_no_escape_codes_in_a_pipe(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "27b", *train]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Gemma 2 27B: 27,227,128,320 parameters\n1 sequence of 8,192 tokens\n")
    assert "\x1b" not in text and "─" not in text


def test_a_folder_needs_only_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PRESETS["2b"].replace(num_hidden_layers=2).to_json_file(tmp_path / "config.json")
    values = plan(capsys, str(tmp_path))
    assert values["name"] == str(tmp_path)
    assert values["parameters"] == PRESETS["2b"].replace(num_hidden_layers=2).count_parameters().total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2b", "--context", "8193"], "Gemma 2 2B reads up to 8192 tokens, but --context asks for 8193"),
        (["2b", "--context", "0"], "--context must be at least 1, but is 0"),
        (["2b", "--batch", "0"], "--batch must be at least 1, but is 0"),
        (["2b", "--chunk", "-1"], "--chunk must be at least 1, but is -1"),
        (["2b", "--rank", "4"], "--rank and --modules are those of adapters; add --train lora or --train qlora"),
        (["2b", "--train", "lora", "--rank", "0"], "the rank of an adapter must be at least 1, but is 0"),
        (["2b", "--train", "lora", "--modules", "q_prj"], "Did you mean 'q_proj'?"),
        (["2b", "--train", "lora", "--modules", ","], "--modules names no linear map"),
        (["2b", "--gpus", "2"], "--gpus is for training; add --train full, lora or qlora"),
        (["2b", "--train", "full", "--gpus", "0"], "--gpus must be at least 1, but is 0"),
        (
            ["2b", "--train", "full", "--gpus", "6", "--tensor", "4"],
            "--tensor must divide --gpus, but they are 4 and 6",
        ),
        (["2b", "--train", "full", "--gpus", "8", "--tensor", "8"], "is 8, and it has 4 key/value heads"),
        (["2b", "--train", "qlora", "--gpus", "2", "--tensor", "2"], "--tensor is for weights that are not quantized"),
        (["2b", "--memory", "lots"], "a size of memory is a number with GiB or MiB"),
        (["2B"], "there is no model '2B'; the published size is written '2b'"),
        (["nowhere/at/all"], "nowhere/at/all: there is no such folder"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("gemma2: error: ") and message in output.err
