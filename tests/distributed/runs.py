"""Runs of a few steps, in one process or as tasks of several: what each gives is its curve."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from small_run import KilledError, changed

from gemma2.config import Gemma2Config
from gemma2.distributed import joined_ranks
from gemma2.training.loop import StepReport

BASE = Gemma2Config(
    vocab_size=8192,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=12,
    sliding_window=16,
    max_position_embeddings=64,
    attn_logit_softcapping=2.0,  # low, so that both caps bite
    final_logit_softcapping=3.0,
)
FSDP: dict[str, Any] = {"data": 2}
TENSOR: dict[str, Any] = {"tensor": 2}


@dataclass
class Curve:
    """What a run told of itself."""

    losses: dict[int, float] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    finished: bool = False
    die_at: int | None = None

    def on_step(self, report: StepReport) -> None:
        self.losses[report.step] = report.loss
        if report.step == self.die_at:
            raise KilledError

    def on_validation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        self.validations[step] = loss

    def on_checkpoint(self, path: Path) -> None:
        pass


def pretrain_settings(corpus: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a model whose vocabulary, 530, and rows of batches divide by two and not by four."""
    return changed(
        {
            "output": str(output),
            "model": {
                "hidden_size": 32,
                "intermediate_size": 66,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "query_pre_attn_scalar": 5,
                "sliding_window": 8,
                "max_position_embeddings": 64,
                "initializer_range": 0.1,
                "attn_logit_softcapping": 1.0,
                "final_logit_softcapping": 4.0,
            },
            "tokenizer": {"vocab_size": 530},
            "data": {
                "train": [str(corpus)],
                "validation": [str(corpus)],
                "validation_max_tokens": 400,
                "shuffle_buffer": 50,
            },
            # A large eps keeps what is only rounding in a gradient from becoming a step of full length.
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2, "max_grad_norm": 0.5, "eps": 1e-5},
            "run": {
                "num_steps": 8,
                "batch_size": 4,
                "sequence_length": 32,
                "num_threads": 1,
                "log_every": 1,
                "validate_every": 4,
                "checkpoint_every": 3,
                "save_dtype": "float32",
                "device": "cpu",
            },
        },
        changes,
    )


def tune_settings(examples: Path, base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of an adapter whose width does not divide by two."""
    return changed(
        {
            "output": str(output),
            "model": {"name": str(base)},
            "adapter": {"r": 3},
            "data": {"train": [str(examples / "sums.jsonl")], "validation": [str(examples / "sums.jsonl")]},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "eps": 1e-5},
            "run": {
                "num_steps": 4,
                "batch_size": 4,
                "dtype": "float32",
                "num_threads": 1,
                "log_every": 1,
                "validate_every": 4,
                "checkpoint_every": 100,
                "save_dtype": "float32",
                "device": "cpu",
            },
        },
        changes,
    )


def distill_settings(corpus: Path, base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a new student of the base model."""
    pretraining = pretrain_settings(corpus, output)
    return changed(
        {
            "output": str(output),
            "teacher": {"name": str(base)},
            "student": {"model": pretraining["model"]},
            "text": pretraining["data"],
            "optimizer": pretraining["optimizer"],
            "run": {**pretraining["run"], "num_steps": 4, "checkpoint_every": 3},
        },
        changes,
    )


def run(
    settings: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    die_at: int | None = None,
    stop: tuple[int, int] | None = None,
) -> Curve:
    """Pretrains or tunes; in each process of several the same.

    Args:
        settings: of one of the two.
        parallel: the section of that name.
        die_at: a step after which an exception ends the run.
        stop: (rank, step) after which one process asks to stop.
    """
    curve = Curve(die_at=die_at)
    settings = {**settings, "parallel": parallel or {}}
    section = {"data": None, "tensor": 1, **(parallel or {})}
    with joined_ranks(**section, device="cpu") as ranks:

        def should_stop() -> bool:
            # It is asked after each step, and before that is told.
            return (ranks.rank, max(curve.losses, default=0) + 1) == stop

        with contextlib.suppress(KilledError), mock.patch("gemma2.training.run_log.plot_losses"):
            curve.finished = _start(settings, curve, should_stop, ranks) is not None
    return curve


def _start(settings: dict[str, Any], curve: Curve, should_stop: Any, ranks: Any) -> Path | None:
    if "tokenizer" in settings:
        from gemma2.training.pretrain import pretrain
        from gemma2.training.settings import PretrainSettings

        checked = PretrainSettings.model_validate(settings)
        return pretrain(checked, progress=curve, say=curve.lines.append, should_stop=should_stop, ranks=ranks)
    if "student" in settings:
        from gemma2.training import distill
        from gemma2.training.distill_settings import DistillSettings

        student = DistillSettings.model_validate(settings)
        plan = distill.check_settings(student, Path(settings["teacher"]["name"]), None, ranks=ranks)
        return distill.distill(
            student, plan, progress=curve, say=curve.lines.append, should_stop=should_stop, ranks=ranks
        )
    from gemma2.training.tune import check_settings, tune
    from gemma2.training.tune_settings import TuneSettings

    tuned = TuneSettings.model_validate(settings)
    tuning = check_settings(tuned, Path(settings["model"]["name"]), ranks=ranks)
    return tune(tuned, tuning, progress=curve, say=curve.lines.append, should_stop=should_stop, ranks=ranks)


def embedding_gradients(ids: list[int]) -> list[float]:
    """Of the sum of the embedding's rows of some words: one number for each word that this process has."""
    import torch

    from gemma2.distributed.placement import own_part
    from gemma2.distributed.tensor_parallel import split_products
    from gemma2.model.modeling import Gemma2ForCausalLM

    with joined_ranks(data=None, tensor=2, device="cpu") as ranks:
        model = Gemma2ForCausalLM(BASE.replace(vocab_size=10, num_hidden_layers=1))
        split_products(model, ranks)
        model.model.embed_tokens(torch.tensor([ids])).sum().backward()  # type: ignore[no-untyped-call]
        gradient = model.model.embed_tokens.weight.grad
        assert gradient is not None
        return own_part(gradient)[:, 0].tolist()


def write_cache(settings: dict[str, Any]) -> None:
    """Asks the teacher of a distillation, in this process."""
    from gemma2.training import distill
    from gemma2.training.distill_settings import DistillSettings

    checked = DistillSettings.model_validate(settings)
    plan = distill.check_settings(checked, Path(settings["teacher"]["name"]), None, for_cache=True)
    assert checked.teacher.cache is not None
    assert distill.write_cache(checked, plan, checked.teacher.cache, on_step=lambda step, tokens: None)


def command(arguments: list[str]) -> tuple[int, str]:
    """The command line in this process: its status and what it wrote to standard error."""
    from gemma2.cli.main import main

    with contextlib.redirect_stderr(io.StringIO()) as written:
        status = main(arguments)
    return status, written.getvalue()
