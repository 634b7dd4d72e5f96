"""Several processes train as one does: losses, validation, and the model that is written, whatever they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import FSDP, TENSOR, Curve, pretrain_settings, run, tune_settings
from safetensors.numpy import load_file
from several_processes import Processes

pytest.importorskip("peft")


def assert_same(curve: Curve, expected: Curve, *, tolerance: float = 3e-6) -> None:
    """Steps that both have are the same, to what rounding does in a few steps."""
    assert curve.losses
    for name in ("losses", "validations"):
        ours, theirs = getattr(curve, name), getattr(expected, name)
        assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=tolerance)


def assert_same_tensors(folder: Path, expected: Path, *, tolerance: float = 2e-5) -> None:
    """The one file of weights in both folders holds the same."""
    (ours,), (theirs,) = (list(path.glob("*.safetensors")) for path in (folder, expected))
    first, second = load_file(ours), load_file(theirs)
    assert first.keys() == second.keys()
    for name, value in second.items():
        np.testing.assert_allclose(first[name], value, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Curve, Path]:
    """A pretraining run of one process, and its folder."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return run(pretrain_settings(corpus, folder)), folder


@pytest.mark.parametrize(("first", "second"), [(FSDP, TENSOR), (TENSOR, FSDP)], ids=["fsdp first", "tensor first"])
def test_a_pretraining_that_changes_hands(
    tmp_path: Path, corpus: Path, alone: tuple[Curve, Path], pair: Processes, first: Any, second: Any
) -> None:
    """Two processes begin and die, two others in another arrangement go on and die, and one process ends it."""
    expected, expected_folder = alone
    settings = pretrain_settings(corpus, tmp_path / "run")
    begun = pair.all_do(run, settings, first, 4)[0]
    assert_same(begun, expected)
    assert max(begun.losses) == 4, "it must have died after step 4, one after a checkpoint"
    carried_on = pair.all_do(run, settings, second, 7)[0]
    assert_same(carried_on, expected)
    assert sorted(carried_on.losses) == [4, 5, 6, 7]
    ended = run(settings)
    assert_same(ended, expected)
    assert sorted(ended.losses) == [7, 8]
    assert_same_tensors(tmp_path / "run" / "model", expected_folder / "model")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("parallel", [FSDP, TENSOR], ids=["fsdp", "tensor"])
def test_a_pretraining_that_one_process_began(
    tmp_path: Path, corpus: Path, alone: tuple[Curve, Path], pair: Processes, parallel: Any
) -> None:
    expected, expected_folder = alone
    changes = {"micro_batch_size": 1, "gradient_checkpointing": True}
    settings = pretrain_settings(corpus, tmp_path / "run", run=changes)
    run(settings, None, 4)
    ended = pair.all_do(run, settings, parallel)[0]
    assert_same(ended, expected)
    assert sorted(ended.losses) == [4, 5, 6, 7, 8] and ended.finished
    assert_same_tensors(tmp_path / "run" / "model", expected_folder / "model")
