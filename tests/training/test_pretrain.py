"""Pretraining end to end: it learns, it resumes exactly, and a run that is killed loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from small_run import KilledError, Silent, kill_and_finish, settings_for

from gemma2.checkpoints import open_checkpoint
from gemma2.errors import CheckpointError, ConfigError, DataError, Gemma2Error
from gemma2.training.pretrain import pretrain
from gemma2.training.settings import PretrainSettings, load_pretrain_settings


def _settings(tmp_path: Path, text: str, name: str, *overrides: str) -> PretrainSettings:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace("{output}", str(tmp_path / name)))
    return load_pretrain_settings(path, list(overrides))


def _run(settings: PretrainSettings, progress: Any = None, **kwargs: Any) -> Path | None:
    return pretrain(settings, progress=progress or Silent(), say=lambda line: None, **kwargs)


def _weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def test_learns_and_writes_everything(tmp_path: Path, settings_text: str) -> None:
    progress = Silent()
    settings = _settings(tmp_path, settings_text, "run", "run.num_steps=60", "run.checkpoint_every=20")
    folder = _run(settings, progress)
    assert folder == tmp_path / "run" / "model"
    assert progress.losses[-1] < 0.6 * progress.losses[0]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.sliding_window == 8
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    validations = [entry for entry in entries if entry["event"] == "validation"]
    assert [entry["step"] for entry in validations] == list(range(6, 61, 6))
    assert validations[-1]["bits_per_byte"] < validations[0]["bits_per_byte"] < 8
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_bits_per_byte_are_nats_over_bytes(tmp_path: Path, settings_text: str, corpus: Path) -> None:
    """An untrained model says log(vocabulary) nats a token, whatever the text."""
    settings = _settings(
        tmp_path, settings_text, "run", "optimizer.learning_rate=1.0e-9", "model.initializer_range=1.0e-4"
    )
    _run(settings)
    (entry, *_) = [
        entry
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        if (entry := json.loads(line))["event"] == "validation"
    ]
    assert entry["loss"] == pytest.approx(6.273, abs=0.01)  # ln 530
    assert 1.5 < entry["bits_per_byte"] < 4  # words of this corpus take about four bytes a token


@pytest.mark.parametrize("die_at", [1, 3, 7, 11])
def test_a_run_that_dies_ends_with_the_same_weights(
    tmp_path: Path, settings_text: str, die_at: int, uninterrupted: bytes
) -> None:
    settings = _settings(tmp_path, settings_text, "run")
    with pytest.raises(KilledError):
        _run(settings, Silent(die_at))
    _run(settings)
    assert _weights(tmp_path / "run") == uninterrupted
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps), "lines of steps that were done again must be gone"


def test_gradient_accumulation_changes_rounding_only(tmp_path: Path, settings_text: str) -> None:
    whole, parts = Silent(), Silent()
    _run(_settings(tmp_path, settings_text, "whole", "run.num_steps=4"), whole)
    _run(_settings(tmp_path, settings_text, "parts", "run.num_steps=4", "run.micro_batch_size=1"), parts)
    assert parts.losses == pytest.approx(whole.losses, abs=2e-5)


def test_stopping_writes_a_checkpoint_and_resumes(tmp_path: Path, settings_text: str, uninterrupted: bytes) -> None:
    settings = _settings(tmp_path, settings_text, "run")
    asked = iter([False, False, False, False, True])
    assert _run(settings, should_stop=lambda: next(asked)) is None
    assert not (tmp_path / "run" / "model").exists()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000005.pt"
    _run(settings)
    assert _weights(tmp_path / "run") == uninterrupted


def test_killed_with_sigkill_at_any_moment(tmp_path: Path, settings_text: str, uninterrupted: bytes) -> None:
    """The real program, killed twice at random moments, then left to finish."""
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text(settings_text.replace("{output}", str(tmp_path / "run")))
    kill_and_finish(["pretrain", str(settings_file)], tmp_path / "run" / "log.jsonl")
    assert _weights(tmp_path / "run") == uninterrupted


def test_bad_data_ends_a_run_with_a_checkpoint_and_may_be_skipped_from_there(
    tmp_path: Path, settings_text: str, corpus: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = corpus.read_text().splitlines()
    texts.write_text("\n".join([*lines[:20], "no JSON", *lines[20:]]) + "\n")
    _run(_settings(tmp_path, settings_text, "tokens", "run.num_steps=1"))
    changes = [
        f"data.train=[{texts}]",
        "data.validation=[]",
        "data.shuffle_buffer=1",
        "run.checkpoint_every=100",
        f"tokenizer.folder={tmp_path / 'tokens' / 'tokenizer'}",
        "run.num_steps=60",
    ]
    first = Silent()
    with pytest.raises(DataError, match="line 21"):
        _run(_settings(tmp_path, settings_text, "run", *changes), first)
    assert 0 < len(first.losses) < 60
    second = Silent()
    assert _run(_settings(tmp_path, settings_text, "run", *changes, "data.on_error=skip"), second) is not None
    assert len(first.losses) + len(second.losses) == 60


def test_other_settings_do_not_resume(tmp_path: Path, settings_text: str) -> None:
    _run(_settings(tmp_path, settings_text, "run", "run.num_steps=3"))
    with pytest.raises(ConfigError, match=r"run\.num_steps: 3 then, 5 now"):
        _run(_settings(tmp_path, settings_text, "run", "run.num_steps=5"))


def test_settings_that_change_no_weight_may_change(tmp_path: Path, settings_text: str, uninterrupted: bytes) -> None:
    with pytest.raises(KilledError):
        _run(_settings(tmp_path, settings_text, "run"), Silent(5))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    state = torch.load(newest)
    state["fingerprint"]["run"]["gradient_checkpointing"] = False  # as older versions wrote it
    torch.save(state, newest)
    changes = ["run.checkpoint_every=100", "run.validate_every=100", "run.gradient_checkpointing=1"]
    _run(_settings(tmp_path, settings_text, "run", *changes, "data.on_error=skip"))
    assert _weights(tmp_path / "run") == uninterrupted


def test_a_damaged_checkpoint_is_named(tmp_path: Path, settings_text: str) -> None:
    with pytest.raises(KilledError):
        _run(_settings(tmp_path, settings_text, "run"), Silent(7))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{newest.name}.*remove it"):
        _run(_settings(tmp_path, settings_text, "run"))
    newest.unlink()
    assert _run(_settings(tmp_path, settings_text, "run")) is not None


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, settings_text: str) -> None:
    with pytest.raises(DataError, match=r"lower learning_rate"):
        _run(
            _settings(tmp_path, settings_text, "run", "optimizer.learning_rate=1.0e+30", "optimizer.max_grad_norm=null")
        )


def test_sequences_longer_than_the_context_are_refused(tmp_path: Path, settings_text: str) -> None:
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        _run(_settings(tmp_path, settings_text, "run", "run.sequence_length=65"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> bytes:
    """The weights of a run that nothing disturbed."""
    tmp_path = tmp_path_factory.mktemp("uninterrupted")
    _run(_settings(tmp_path, settings_for(corpus), "run"))
    return _weights(tmp_path / "run")


def test_a_gradient_that_is_no_number_is_not_stepped_on(
    tmp_path: Path, settings_text: str, uninterrupted: bytes
) -> None:
    settings = _settings(tmp_path, settings_text, "run")
    calls = 0
    clip = torch.nn.utils.clip_grad_norm_

    def spoil(parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = torch.nan
        return clip(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
        with pytest.raises(DataError, match="norm became nan at step 4"):
            _run(settings)
    _run(settings)
    assert _weights(tmp_path / "run") == uninterrupted


def test_a_run_that_never_began_may_be_corrected(tmp_path: Path, settings_text: str) -> None:
    with pytest.raises(DataError):
        _run(_settings(tmp_path, settings_text, "run", "data.train=[absent.txt]"))
    assert _run(_settings(tmp_path, settings_text, "run", "run.num_steps=2")) is not None


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("run.device=meta", "must be auto, cpu, cuda"),
        ("run.device=cuda:99", "CUDA devices"),
        ("tokenizer.folder=absent", "absent"),
        ("model.bos_token_id=7", "bos"),
        ("data.validation=[absent.txt]", "absent"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    tmp_path: Path, settings_text: str, override: str, match: str
) -> None:
    progress = Silent()
    with pytest.raises(Gemma2Error, match=match):
        _run(_settings(tmp_path, settings_text, "run", override), progress)
    assert not progress.losses


def test_two_runs_do_not_share_a_folder(tmp_path: Path, settings_text: str) -> None:
    settings = _settings(tmp_path, settings_text, "run", "run.num_steps=2")
    settings.output.mkdir()
    with FileLock(settings.output / ".lock"), pytest.raises(ConfigError, match="in use by another run"):
        _run(settings)
