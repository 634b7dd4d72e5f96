"""`gemma2 quantize`: a folder in, a packed folder out, and what became of the weights."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_terminal import Terminal

from gemma2.api import BUNDLED_FOLDER
from gemma2.checkpoints import expected_tensors, open_packed, save_checkpoint
from gemma2.cli.main import EXIT_FAILED, main
from gemma2.cli.model_options import _Waiting
from gemma2.cli.quantize import _Work
from gemma2.cli.terminal import PlainProgress
from gemma2.config import Gemma2Config

SMALL = Gemma2Config(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    query_pre_attn_scalar=32,
    vocab_size=320,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small model in bfloat16, without a tokenizer."""
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in expected_tensors(SMALL).items()}
    return save_checkpoint(tmp_path / "source", SMALL, tensors.items(), dtype="bfloat16")


def quantize(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["quantize", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["quantize", *map(str, arguments)]) == EXIT_FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_q4_of_the_bundled_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = quantize(capsys, BUNDLED_FOLDER, tmp_path / "new")
    table = rows(text)
    assert list(table)[:8] == [
        "tensor",
        "embed_tokens",
        "norms",
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "total",
    ]
    assert "8 of 1,792 × 256" in text
    assert table["embed_tokens"][-2] == "8.50" and table["o_proj"][-2] == "4.25" and table["total"][-1] == "5.25"
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert 7.5 < float(table[name][-1].rstrip("%")) < 8.5
    assert float(table["embed_tokens"][-1].rstrip("%")) < 0.7
    packed = open_packed(tmp_path / "new")
    assert packed.format == "q4" and packed.has_second_plane
    assert {path.name for path in packed.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("weight_format", "bits", "least", "most"),
    [("q8", 8.25, 0.004, 0.008), ("bfloat16", 16, 0, 0), ("float32", 32, 0, 0), ("q4", 4.25, 0.07, 0.09)],
)
def test_the_formats_for_programs(
    capsys: pytest.CaptureFixture[str],
    source: Path,
    tmp_path: Path,
    weight_format: str,
    bits: float,
    least: float,
    most: float,
) -> None:
    options = ["--one-plane"] if weight_format == "q4" else []
    text = quantize(capsys, source, tmp_path / "new", "--format", weight_format, "--json", "--threads", "2", *options)
    values: dict[str, Any] = json.loads(text)
    tensors = {tensor["name"]: tensor for tensor in values["tensors"]}
    assert values["format"] == weight_format
    assert values["before_bytes"] == SMALL.count_parameters().total * 2
    assert values["after_bytes"] == sum(tensor["after_bytes"] for tensor in tensors.values())
    assert tensors["norms"]["count"] == 13 and tensors["norms"]["output_error"] is None
    for name in ("embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert tensors[name]["bits_per_weight"] == bits
        assert least <= tensors[name]["output_error"] <= most
    assert open_packed(tmp_path / "new").format == weight_format


def test_inspect_shows_the_format(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    quantize(capsys, source, tmp_path / "new")
    assert main(["inspect", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "Packed for the CPU engine: q4, the embedding in two planes of 4 bits" in text
    assert rows(text)["model-q4.gemma2.safetensors"][1:7] == ["14", "tensors", "in", "q4,", "13", "tensors"]
    assert main(["inspect", str(tmp_path / "new"), "--json", "--tensors"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["packed"] == {"format": "q4", "second_plane": True, "calibrated": False}
    assert values["dtypes"] == {"q4": 14, "F32": 13}
    tensors = {tensor["name"]: tensor for tensor in values["tensors"]}
    assert tensors["model.layers.2.mlp.gate_up_proj.weight"]["shape"] == [256, 64]
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packed"] is None


def test_a_packed_folder_is_replaced_and_no_other(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    quantize(capsys, source, tmp_path / "new")
    quantize(capsys, source, tmp_path / "new", "--format", "q8")
    assert open_packed(tmp_path / "new").format == "q8"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "is not empty (it has thesis.txt); choose another folder\n" in refusal(capsys, source, tmp_path / "mine")
    assert "is not empty" in refusal(capsys, source, source)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert "use the model that they were made from" in refusal(capsys, packed_from(capsys, source, tmp_path), new)
    message = "2b is a size, which has no weights; name a folder, or google/gemma-2-2b"
    assert message in refusal(capsys, "2b", new)
    assert "there is no such folder" in refusal(capsys, tmp_path / "missing/", new)
    assert "--threads must be at least 1" in refusal(capsys, source, new, "--threads", "0")
    assert "--one-plane is for q4" in refusal(capsys, source, new, "--format", "q8", "--one-plane")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(capsys, source, tmp_path / "file")
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(new), "--format", "q5"])
    assert "invalid choice: 'q5'" in capsys.readouterr().err
    assert not new.exists()


def packed_from(capsys: pytest.CaptureFixture[str], source: Path, folder: Path) -> Path:
    quantize(capsys, source, folder / "packed")
    return folder / "packed"


def test_weights_that_are_not_finite_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in expected_tensors(SMALL).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][5, 6] = np.nan
    save_checkpoint(tmp_path / "source", SMALL, tensors.items())
    message = refusal(capsys, tmp_path / "source", tmp_path / "new")
    assert "model.layers.1.mlp.up_proj.weight holds nan in row 5, column 6" in message.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from gemma2.cli.main import main\ntry: main(['quantize', '--help'])\nexcept SystemExit: pass\n"
    code += (
        "assert not {'numpy', 'rich', 'torch', 'gemma2._kernels', 'gemma2.checkpoints'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_terminal_sees_a_bar_and_can_stop(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED_FOLDER, model)
    with Terminal("quantize", str(model), "new", "--format", "q4", fake_model={}, folder=tmp_path) as terminal:
        terminal.wait_for("→ q4")
        assert terminal.wait_for_end() == 0
        assert b"left" in terminal.raw
    assert open_packed(tmp_path / "new").format == "q4"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_run_leaves_nothing(name: str, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; import gemma2.quantization.packing as packing; from gemma2.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "signal.signal(signal.SIGTERM, signal.SIG_DFL); signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "original = packing.Packer.pack\n"
        "def pack(self, rows, out, **options):\n"
        f"    if rows.shape[0] == 1792: os.kill(os.getpid(), signal.{name})\n"
        "    return original(self, rows, out, **options)\n"
        "packing.Packer.pack = pack\n"
        f"sys.exit(main(['quantize', {str(BUNDLED_FOLDER)!r}, {str(tmp_path / 'stopped')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": "src"})
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert not (tmp_path / "stopped").exists()


def test_the_usage_names_every_option_and_works_in_its_order(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    usage, _, options = capsys.readouterr().out.partition("positional arguments")
    assert usage.startswith("usage: gemma2 quantize SRC DST [")
    assert {option for option in re.findall(r"^  (--[a-z-]+)", options, re.M) if f"[{option}" not in usage} == set()


def test_the_result_says_what_it_is(capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert f"{new}: q4, the embedding in two planes; written in " in quantize(capsys, source, new)
    text = quantize(capsys, source, new, "--one-plane")
    assert f"{new}: q4, the embedding in one plane; written in " in text and "million" not in text
    assert main(["inspect", str(new)]) == 0
    assert "Packed for the CPU engine: q4, the embedding in one plane of 4 bits" in capsys.readouterr().out


def test_a_full_disk_or_a_limit_is_named_once(
    capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("gemma2.checkpoints.packed_folder.write_packed_file", refuse)
    message = refusal(capsys, source, tmp_path / "new").splitlines()[-1]
    assert message == f"gemma2: error: {tmp_path / 'new'}: cannot be written: File too large"


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = PlainProgress("model → q4", clock=lambda: now)
    for now in (5.0, 20.0, 25.0, 60.0, 100.0):
        progress.update(now, 100)
    assert capsys.readouterr().err.splitlines() == [
        "model → q4: 20% after 0:20, about 1:20 left",
        "model → q4: 60% after 1:00, about 0:40 left",
    ]


def test_calibration_and_rounding_make_one_share_of_the_time() -> None:
    shown: list[float] = []
    work = _Work(lambda done, total: shown.append(done / total), lambda sentence: None)
    work.plan_calibration(900, 100)
    work.follow_calibration(1, 2)
    work.follow_rounding(1, 2)
    work.follow_calibration(2, 2)
    work.follow_rounding(2, 2)
    assert shown == [0.45, 0.5, 0.95, 1.0]


def test_waiting_for_the_cache_tells_no_rate_before_it_knows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    waiting = _Waiting(is_shown=True, is_quiet=False)
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    waiting.show_progress(1_000_000_000, 5_000_000_000)
    assert terminal.getvalue().endswith("quantizing  20%")
    now = 102.0
    waiting.show_progress(2_000_000_000, 5_000_000_000)
    assert "quantizing  40%, 500 MB/s, 6 s left" in terminal.getvalue()
