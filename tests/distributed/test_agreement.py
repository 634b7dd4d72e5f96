"""What processes agree on: how they stand, when to stop, who speaks; and what becomes of a run of which one dies."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import BASE, FSDP, TENSOR, command, embedding_gradients, pretrain_settings, run, tune_settings
from several_processes import Processes

import gemma2
from gemma2.distributed import Ranks, joined_ranks
from gemma2.distributed.tensor_files import read_whole_tensors
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import CheckpointError, ConfigError
from gemma2.training.run_state import list_run_states, load_run_state


def test_the_grid() -> None:
    ranks = [Ranks(rank=rank, data=3, tensor=2) for rank in range(6)]
    assert [one.data_rank for one in ranks] == [0, 0, 1, 1, 2, 2]
    assert [one.tensor_rank for one in ranks] == [0, 1] * 3
    assert [one.is_first for one in ranks] == [True] + [False] * 5


@pytest.mark.parametrize(
    ("world_size", "data", "tensor", "message"),
    [
        ("6", None, 4, "parallel.tensor is 4, but 6 processes were started, which must be a multiple of it"),
        ("4", 4, 2, "need 8 processes, but 4 processes were started; start with torchrun --nproc-per-node 8"),
        (None, 2, 1, "need 2 processes, but 1 process was started; start with torchrun --nproc-per-node 2"),
        (None, None, 2, "parallel.tensor is 2, but 1 process was started"),
    ],
)
def test_processes_that_cannot_be_arranged(
    monkeypatch: pytest.MonkeyPatch, world_size: str | None, data: int | None, tensor: int, message: str
) -> None:
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=message), joined_ranks(data=data, tensor=tensor, device="cpu"):
        pass


def test_batches_and_models_that_cannot_be_cut() -> None:
    ranks = Ranks(data=3, tensor=2)
    ranks.check_batch(12, 2)
    with pytest.raises(ConfigError, match=r"run.batch_size is 8.*must be a multiple of the 3"):
        ranks.check_batch(8, None)
    with pytest.raises(ConfigError, match=r"each of 3 parts has 4 rows, which must be a multiple of it"):
        ranks.check_batch(12, 3)
    check_split(BASE, 2)
    with pytest.raises(ConfigError, match=r"parallel.tensor is 4.*but it has 2 key/value heads; lower it"):
        check_split(BASE, 4)
    with pytest.raises(ConfigError, match=r"8,191 words of the vocabulary"):
        check_split(BASE.replace(vocab_size=8191), 2)


def test_every_word_learns_but_padding(pair: Processes) -> None:
    """Also the first one that the second process has, whose place there is that of padding in the first."""
    assert pair.all_do(embedding_gradients, [0, 1, 4, 5, 5, 9]) == [[0, 1, 0, 0, 1], [2, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"quantization": "nf4"}}, "parallel.tensor is 2, but weights in nf4 cannot be cut"),
        ({"adapter": {"r": 3, "use_dora": True}}, "parallel.tensor is 2, but adapter.use_dora"),
        ({"run": {"micro_batch_size": 3}}, "batch_size must be a multiple of micro_batch_size"),
    ],
)
def test_settings_that_cannot_be_shared_are_refused_by_one_voice(
    tmp_path: Path, examples: Path, base: Path, pair: Processes, changes: dict[str, Any], message: str
) -> None:
    settings = tune_settings(examples, base, tmp_path / "run", **changes)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "parallel": TENSOR}))
    answers = pair.all_do(command, ["tune", str(tmp_path / "run.yaml")])
    assert [status for status, _ in answers] == [1, 1]
    said = [text for _, text in answers if text]
    assert len(said) == 1 and message in said[0], "one of them says it, once"


def test_all_stop_when_one_is_asked_to(tmp_path: Path, corpus: Path, pair: Processes) -> None:
    settings = pretrain_settings(corpus, tmp_path / "run")
    curves = pair.all_do(run, settings, FSDP, None, (1, 2))
    assert [(max(curve.losses), curve.finished) for curve in curves] == [(2, False), (2, False)]
    (path,) = list_run_states(tmp_path / "run" / "checkpoints")
    assert path.name == "step-00000002"


def test_a_run_of_which_one_process_is_killed(tmp_path: Path, corpus: Path) -> None:
    """The real program: it ends soon, says so, leaves whole checkpoints, and goes on when it is started again."""
    settings = pretrain_settings(corpus, tmp_path / "run", run={"num_steps": 100_000, "validate_every": 100_000})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launch, "-m", "gemma2", "pretrain", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and not list_run_states(checkpoints) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(_second_worker(process.pid), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # and torchrun its workers
    assert process.returncode != 0
    assert "another process of this run ended; its message says why, unless it was killed" in errors
    assert "This is a defect" not in errors
    step = int(list_run_states(checkpoints)[-1].name.removeprefix("step-"))
    resumed = run({**settings, "run": {**settings["run"], "log_every": 1}}, stop=(0, step + 2))
    assert sorted(resumed.losses) == [step + 1, step + 2]


def _second_worker(launcher: int) -> int:
    """The process that torchrun started as number 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if parent == launcher and b"RANK=1" in environment:
            return int(folder.name)
    raise AssertionError("torchrun has started no process 1")


def test_damaged_checkpoints_of_several_processes(tmp_path: Path, corpus: Path, pair: Processes) -> None:
    settings = pretrain_settings(corpus, tmp_path / "run", run={"num_steps": 4, "checkpoint_every": 2})
    pair.all_do(run, settings, FSDP)
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    state = load_run_state(folder)
    assert state["step"] == 4 and state["optimizer"]["state"][0]["exp_avg"].abs().max() > 0
    part = folder / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-00000004: the checkpoint cannot be read.*remove it"):
        load_run_state(folder)


class Harmful:
    """Runs a program when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def test_a_folder_from_elsewhere_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(pickle.UnpicklingError, match="system, which has no place in it"):
        read_whole_tensors(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(torch.nn.Linear))
    with pytest.raises(pickle.UnpicklingError, match="Linear"):
        read_whole_tensors(tmp_path)


def test_the_example_files_call_the_same_command() -> None:
    examples = Path(__file__).parents[2] / "examples"
    script = examples / "slurm-tune.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    task = yaml.safe_load((examples / "skypilot-tune.yaml").read_text())
    for text in (script.read_text(), task["run"]):
        assert re.search(r"torchrun .*-m gemma2 tune \"\$", text, re.S)
