"""What the verbs that train say at the end of a run, whatever it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemma2.cli.source import model_options
from gemma2.cli.training_progress import make_training_console, show_run

pytest.importorskip("torch")


@pytest.mark.parametrize("written", [Path("runs/mine/model"), None])
def test_a_run_is_shown_to_its_end(capsys: pytest.CaptureFixture[str], written: Path | None) -> None:
    from gemma2.distributed import ONE_PROCESS

    def run(*, progress: Any, say: Any, should_stop: Any) -> Path | None:
        say("model: small [so far]")
        progress.on_validation(3, 1.0, 2.0)
        assert not should_stop()
        return written

    status = show_run(make_training_console(ONE_PROCESS), run, next_command=lambda folder: f"gemma2 chat {folder}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "model: small [so far]"
    if written is None:
        assert (status, lines[2:]) == (130, ["stopped; the same command goes on from here"])
    else:
        assert (status, lines[2:]) == (0, ["wrote runs/mine/model", "try: gemma2 chat runs/mine/model"])


def test_an_adapter_is_named_with_its_model() -> None:
    folder = Path("runs/mine")
    assert model_options(folder, base=None) == "--model runs/mine"
    assert model_options(folder, base="bundled") == "--adapter runs/mine"
    assert model_options(folder, base="google/gemma-2-2b") == "--model google/gemma-2-2b --adapter runs/mine"
