"""Several processes train as one does: losses, validation, and the model that is written, whatever they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import FSDP, TENSOR, Curve, distill_settings, pretrain_settings, run, tune_settings, write_cache
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


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora, fsdp": (FSDP, {}),
    "lora, tensor": (TENSOR, {}),
    "every weight, fsdp, checkpointing": (FSDP, {"adapter": None, "run": {"gradient_checkpointing": True}}),
    "dora, fsdp": (FSDP, {"adapter": {"r": 3, "use_dora": True}}),
    "pissa, tensor": (TENSOR, {"adapter": {"r": 3, "init_lora_weights": "pissa"}, "data": {"packing": False}}),
    "preferences, every weight, fsdp": (FSDP, {"adapter": None, "objective": {"kind": "dpo"}}),
    "preferences, tensor": (TENSOR, {"objective": {"kind": "dpo"}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tuning(tmp_path: Path, examples: Path, base: Path, pair: Processes, name: str) -> None:
    """The last batch of an epoch has rows of padding, so that one process may have nothing to learn from."""
    parallel, changes = VARIANTS[name]
    alone = tune_settings(examples, base, tmp_path / "alone", **changes)
    if "objective" in changes:
        alone["data"] = {key: [str(examples / "pairs.jsonl")] for key in ("train", "validation")}
    expected = run(alone)
    shared = {**alone, "output": str(tmp_path / "shared")}
    curve = pair.all_do(run, shared, parallel)[0]
    assert_same(curve, expected)
    kind = "adapter" if alone.get("adapter") else "model"
    assert_same_tensors(tmp_path / "shared" / kind, tmp_path / "alone" / kind)


@pytest.mark.parametrize("source", ["shared teacher", "engine", "cache"])
def test_distillation(tmp_path: Path, corpus: Path, base: Path, pair: Processes, source: str) -> None:
    """The teacher's weights are shared, too; or whole in each process; or it has been asked before."""
    teacher = {"name": str(base), "backend": "cpu" if source == "engine" else "torch"}
    if source == "engine":
        teacher["weights"] = "float32"
    if source == "cache":
        teacher["cache"] = str(tmp_path / "cache")
    settings = distill_settings(corpus, base, tmp_path / "a", teacher=teacher)
    if source == "cache":
        write_cache(settings)
    expected = run(settings)
    begun = pair.all_do(run, {**settings, "output": str(tmp_path / "b")}, TENSOR if source == "cache" else FSDP, 2)[0]
    assert_same(begun, expected)
    if source == "shared teacher":
        ended = pair.all_do(run, {**settings, "output": str(tmp_path / "b")}, TENSOR)[0]
        assert_same(ended, expected)
        assert_same_tensors(tmp_path / "b" / "model", tmp_path / "a" / "model")


def test_four_processes_that_share_both(tmp_path: Path, corpus: Path, examples: Path, base: Path) -> None:
    """Two parts of a batch, two of each product, and from there to one process."""
    both = {"data": 2, "tensor": 2}
    pretraining = pretrain_settings(corpus, tmp_path / "pretraining", run={"num_steps": 3, "checkpoint_every": 2})
    tuning = tune_settings(examples, base, tmp_path / "tuning", run={"num_steps": 2})
    with Processes(4) as processes:
        begun = processes.all_do(run, pretraining, both, 2)[0]
        tuned = processes.all_do(run, tuning, both)[0]
    ended = run(pretraining)
    again = run({**pretraining, "output": str(tmp_path / "again")})
    for curve in (begun, ended):
        assert_same(curve, again)
    assert_same_tensors(tmp_path / "pretraining" / "model", tmp_path / "again" / "model")
    assert_same(tuned, run({**tuning, "output": str(tmp_path / "alone")}))
    assert_same_tensors(tmp_path / "tuning" / "adapter", tmp_path / "alone" / "adapter")


def test_the_best_is_kept_by_whoever_ends(tmp_path: Path, examples: Path, base: Path, pair: Processes) -> None:
    """The best validation is early; its weights are written by two processes and read by one, and the other way."""
    changes = {
        "data": {"validation": [str(examples / "other.jsonl")]},
        "optimizer": {"learning_rate": 0.3, "warmup_steps": 5},
        "run": {"validate_every": 1, "checkpoint_every": 1, "keep_best": True, "num_steps": 5},
    }
    settings = {name: tune_settings(examples, base, tmp_path / name, **changes) for name in ("a", "b", "c")}
    expected = run(settings["a"])
    best = min(expected.validations, key=lambda step: expected.validations[step])
    assert 0 < best < 4, "the settings of this test must make the loss rise again"
    pair.all_do(run, settings["b"], FSDP, 4)
    assert (tmp_path / "b" / "checkpoints" / "best").is_dir()
    run(settings["b"])
    run(settings["c"], None, 4)
    pair.all_do(run, settings["c"], TENSOR)
    for name in ("b", "c"):
        assert_same_tensors(tmp_path / name / "adapter", tmp_path / "a" / "adapter", tolerance=1e-3)


def test_streams_belong_to_the_data_and_not_to_the_processes(
    tmp_path: Path, corpus: Path, alone: tuple[Curve, Path], pair: Processes
) -> None:
    settings = pretrain_settings(corpus, tmp_path / "a", data={"num_streams": 2}, run={"num_steps": 5})
    expected = run(settings)
    assert expected.losses[1] != alone[0].losses[1], "other documents stand together"
    shared = {**settings, "output": str(tmp_path / "b")}
    assert_same(pair.all_do(run, shared, FSDP, 4)[0], expected)
    assert len(list((tmp_path / "b" / "checkpoints" / "step-00000003").glob("loader-*"))) == 2
    assert_same(run(shared), expected)


def test_quantized_weights_are_whole_in_each_process(
    tmp_path: Path, examples: Path, base: Path, pair: Processes
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = tune_settings(examples, base, tmp_path / "a", model={"name": str(base), "quantization": "nf4"})
    expected = run(settings)
    assert_same(pair.all_do(run, {**settings, "output": str(tmp_path / "b")}, FSDP)[0], expected)


def test_bf16_is_gathered_as_it_is_multiplied(tmp_path: Path, corpus: Path, pair: Processes) -> None:
    """Float32 weights, products in bf16: layers travel as bf16, which changes no product."""
    settings = pretrain_settings(corpus, tmp_path / "a", run={"dtype": "bfloat16", "num_steps": 4})
    expected = run(settings)
    curve = pair.all_do(run, {**settings, "output": str(tmp_path / "b")}, FSDP)[0]
    assert curve.losses[1] == pytest.approx(expected.losses[1], rel=1e-6)
    assert_same(curve, expected, tolerance=1e-4)
