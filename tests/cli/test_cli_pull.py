"""`gemma2 pull`: what it hands on, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gemma2.checkpoints
from gemma2.cli.main import main
from gemma2.errors import DownloadError


def test_pull_hands_on_its_options_and_prints_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def pull(repo: str, **options: Any) -> Path:
        calls.append((repo, options))
        return Path("/models/here")

    monkeypatch.setattr(gemma2.checkpoints, "pull", pull)
    assert main(["pull", "google/gemma-2-2b-it", "--revision", "v1", "--token", "hf_x", "--to", "here"]) == 0
    assert calls == [("google/gemma-2-2b-it", {"revision": "v1", "token": "hf_x", "local_dir": Path("here")})]
    assert capsys.readouterr().out == "/models/here\n"
    assert main(["pull", "gemma-2-2b"]) == 0
    assert calls[1] == ("gemma-2-2b", {"revision": None, "token": None, "local_dir": None})


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pull(repo: str, **options: Any) -> Path:
        raise DownloadError(f"{repo}: access is restricted; accept the terms first")

    monkeypatch.setattr(gemma2.checkpoints, "pull", pull)
    assert main(["pull", "google/gemma-2-2b-it"]) == 1
    assert capsys.readouterr().err == (
        "gemma2: error: google/gemma-2-2b-it: access is restricted; accept the terms first\n"
    )
