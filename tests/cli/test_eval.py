"""`gemma2 eval`: tables and JSON of one model and of several, what it refuses before it runs, and Ctrl-C."""

from __future__ import annotations

import json
import lzma
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_terminal import Terminal

from gemma2.api import BUNDLED_FOLDER, load
from gemma2.cli.main import EXIT_FAILED, EXIT_INTERRUPTED, main
from gemma2.cpu import CpuBackend
from gemma2.evaluation import TextScore, score_texts
from gemma2.step import Logits, StepBatch

FIRST = "It was a dark night, and the old man looked at her. “Well,” he said, “it is time to go.”\n" * 3
LINES = ["A line of its own.", "Another one: é🤗▁.", "The third line, which is the last and the longest of them."]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "first.txt").write_text(FIRST, encoding="utf-8")
    with lzma.open(folder / "lines.jsonl.xz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": line, "body": line[::-1]}) + "\n" for line in LINES)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "q4"
    assert main(["quantize", str(BUNDLED_FOLDER), str(folder), "--format", "q4", "--threads", "1"]) == 0
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> str:
    assert main(["eval", *map(str, arguments), "--threads", "1", "--quiet"]) == status
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["eval", *map(str, arguments)]) == EXIT_FAILED
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def score_of(texts: list[str], **options: Any) -> TextScore:
    llm = load(num_threads=1)
    return score_texts(llm.backend, llm.tokenizer, texts, **options)


def test_a_table_of_files(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    text = evaluate(capsys, files)
    table = rows(text)
    for name, texts in {"first.txt": [FIRST], "lines.jsonl.xz": LINES, "all": [FIRST, *LINES]}.items():
        score = score_of(texts)
        assert table[name] == [
            str(len(texts)),
            str(score.num_tokens),
            str(sum(len(text.encode()) for text in texts)),
            f"{score.bits_per_byte:.4f}",
            f"{score.perplexity:.2f}",
        ]
    assert "bundled model, float32; windows of 512 tokens that move on by 256" in text


def test_json(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    values = json.loads(evaluate(capsys, files, "--json", "--context", "30", "--stride", "30", "--max-documents", "3"))
    assert (values["is_complete"], values["max_documents"], values["max_tokens"]) == (True, 3, None)
    (model,) = values["models"]
    score = score_of([FIRST, *LINES[:2]], context=30, stride=30)
    assert (model["model"], model["weights"], model["context"], model["stride"]) == ("bundled model", "float32", 30, 30)
    assert (model["tokens"], model["bytes"]) == (score.num_tokens, score.num_bytes)
    assert model["nats"] == pytest.approx(score.nats, abs=1e-9)
    assert model["bits_per_byte"] == pytest.approx(score.bits_per_byte)
    assert model["perplexity"] == pytest.approx(score.perplexity)
    assert [Path(file["file"]).name for file in model["files"]] == ["first.txt", "lines.jsonl.xz"]
    assert [file["documents"] for file in model["files"]] == [1, 2]
    assert sum(file["tokens"] for file in model["files"]) == model["tokens"]
    assert model["is_complete"] and model["seconds"] > 0 and model["tokens_per_second"] > 0


def test_other_keys_and_a_limit_of_tokens(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    file = files / "lines.jsonl.xz"
    values = json.loads(evaluate(capsys, file, "--json", "--text-key", "body", "--max-tokens", "9"))
    whole = score_of([line[::-1] for line in LINES])
    assert 5 < values["models"][0]["tokens"] <= 9 < whole.num_tokens
    message = refusal(capsys, file, "--text-key", "bodi")
    assert "lines.jsonl.xz, line 1: no key 'bodi'" in message and "Did you mean 'body'?" in message


def test_several_models_and_weights(capsys: pytest.CaptureFixture[str], files: Path, packed: Path) -> None:
    text = evaluate(capsys, files, "--weights", "float32", "--weights", "q8")
    assert [line.split()[:3] for line in text.splitlines()[1:3]] == [
        ["bundled", "model", "float32"],
        ["bundled", "model", "q8"],
    ]
    assert [line.split() for line in text.splitlines() if line.startswith("bits/byte")] == [
        ["bits/byte", "float32", "q8"]
    ]
    assert len(rows(text)["first.txt"]) == 2
    assert "Bits per byte compare any two models" in text
    values = json.loads(evaluate(capsys, files, "--json", "--model", BUNDLED_FOLDER, "--model", packed))
    assert [(model["model"], model["weights"]) for model in values["models"]] == [
        (str(BUNDLED_FOLDER), "float32"),
        (str(packed), "q4"),
    ]
    exact, rounded = (model["bits_per_byte"] for model in values["models"])
    assert 0 < abs(rounded - exact) < 0.05
    assert values["models"][0]["tokens"] == values["models"][1]["tokens"]


def test_mistakes_are_found_before_anything_runs(
    capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma2.api.load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "context must be from 2 to 512" in refusal(capsys, files, "--context", "513")
    assert "stride must be from 1 to 20" in refusal(capsys, files, "--context", "20", "--stride", "21")
    assert "max_tokens must be at least 1" in refusal(capsys, files, "--max-tokens", "0")
    assert "there is no such file" in refusal(capsys, files / "none.txt")
    assert "there is no such folder" in refusal(
        capsys, files, "--model", str(BUNDLED_FOLDER), "--model", str(files / "no/")
    )
    with (files / "second.txt").open("wb") as file:
        file.write(b"fine\nnot \xff\n")
    assert "second.txt, line 2: not UTF-8" in refusal(capsys, files)


def test_a_model_that_cannot_run_leaves_what_is_known(
    capsys: pytest.CaptureFixture[str], files: Path, packed: Path
) -> None:
    status = main(
        ["eval", str(files), "-q", "--threads", "1", "--model", str(packed), "--weights", "q4", "--weights", "q8"]
    )
    captured = capsys.readouterr()
    assert status == EXIT_FAILED
    assert rows(captured.out)["all"][0] == "4" and f"{packed}, q4" in captured.out
    assert "its weights are q4, and q8 cannot be made of them" in captured.err


def test_ctrl_c_gives_what_is_known(
    capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, num_steps = CpuBackend.forward, 0

    def forward(self: CpuBackend, batch: StepBatch) -> Logits:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch)

    monkeypatch.setattr("gemma2.cpu.CpuBackend.forward", forward)
    (files / "first.txt").write_text(FIRST * 20, encoding="utf-8")
    arguments = [files, "--context", "400", "--weights", "float32", "--weights", "q8"]
    values = json.loads(evaluate(capsys, *arguments, "--json", status=EXIT_INTERRUPTED))
    assert not values["is_complete"]
    (model,) = values["models"]
    assert 0 < model["tokens"] < score_of([FIRST * 20]).num_tokens
    assert 0 < model["bytes"] < len(FIRST.encode() * 20)
    num_steps = 0
    text = evaluate(capsys, *arguments, status=EXIT_INTERRUPTED)
    assert f"bundled model, float32: stopped after {model['tokens']} of " in text


def test_a_terminal_sees_a_bar(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("so many letters" * 2000, encoding="utf-8")
    model = {"answers": None, "seconds": 0.05}
    with Terminal("eval", "book.txt", "--context", "300", fake_model=model, folder=tmp_path) as terminal:
        terminal.wait_for("bits per byte, left")
        terminal.type("\x03")
        terminal.wait_for("stopped after ")
        assert terminal.wait_for_end() == EXIT_INTERRUPTED


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.cli.eval._SECONDS_BETWEEN_LINES", 0.0)
    assert main(["eval", str(files), "--threads", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    total = score_of([FIRST, *LINES]).num_tokens
    assert lines[0] == f"bundled model, float32: {total} tokens …"
    assert lines[-1].startswith(f"bundled model, float32: {total} of {total} tokens, ")
