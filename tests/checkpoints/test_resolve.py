from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import random_tensors, write_model

from gemma2.checkpoints import resolve_model
from gemma2.checkpoints.resolve import SHORT_NAMES, repo_id_of
from gemma2.errors import CheckpointError


def test_a_path_that_exists_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "google" / "gemma-2-2b-it", random_tensors())
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder / "model.safetensors")) == folder / "model.safetensors"
    monkeypatch.chdir(tmp_path)
    # A folder of the same name goes before the hub's repository.
    assert resolve_model("google/gemma-2-2b-it") == Path("google/gemma-2-2b-it")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/google/gemma-2-2b-it") == folder
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        resolve_model(folder, revision="v1")


def test_what_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refusal(name: str, revision: str | None = None) -> str:
        with pytest.raises(CheckpointError) as caught:
            resolve_model(name, revision=revision, cache_dir=tmp_path)
        return str(caught.value)

    assert "fetch it with `gemma2 pull google/gemma-2-2b-it`." in refusal("google/gemma-2-2b-it")
    assert "fetch it with `gemma2 pull google/gemma-2-9b`." in refusal("gemma-2-9b")
    assert "`gemma2 pull google/gemma-2-9b --revision v1`" in refusal("gemma-2-9b", "v1")
    assert "Did you mean 'google/gemma-2-27b'?" in refusal("google/gemma2-27b")
    assert "models/mine: there is no such folder, and no copy of the hub's models/mine" in refusal("models/mine")
    assert "./models/mine: there is no such folder, and models on the hub are called" in refusal("./models/mine")
    assert "Did you mean 'gemma-2-2b'?" in refusal("gemma2-2b")
    assert "an empty name" in refusal("")


def test_short_names_are_exact() -> None:
    assert len(SHORT_NAMES) == 7
    assert repo_id_of("gemma-2-27b-it") == "google/gemma-2-27b-it"
    assert repo_id_of("gemma-2-27b-IT") is None
    assert repo_id_of("2b") is None
