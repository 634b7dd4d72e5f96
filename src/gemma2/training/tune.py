"""`gemma2 tune`: a model and examples to a tuned model, or to an adapter for it.

The run's folder holds settings.yaml, checkpoints/, log.jsonl, loss.png, and at the end adapter/ in PEFT's format, or
model/, a Hugging Face folder. Called again with the same settings it goes on where it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from gemma2.checkpoints import Checkpoint, generation_stop_ids, open_checkpoint
from gemma2.data import ExampleLoader, TokenizedExamples
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import ConfigError, DataError
from gemma2.model.loading import DTYPES, load_model
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.text import Tokenizer
from gemma2.training.adapters import adapters_disabled
from gemma2.training.example_data import (
    OnTokenizing,
    describe_examples,
    example_loader,
    example_validation,
    read_examples,
)
from gemma2.training.loop import Progress, Trainer
from gemma2.training.objectives import CountUnits, MetricSums, Objective, count_labels, next_token_objective
from gemma2.training.packed_base import load_packed
from gemma2.training.preference import count_pairs, model_reference, preference_objective
from gemma2.training.quantized_base import quantized_linear
from gemma2.training.run_folder import RunFolder
from gemma2.training.run_stages import (
    check_layers,
    check_machine,
    generation_config,
    resume_and_train,
    say_stopped_early,
    use_threads,
)
from gemma2.training.shared_model import load_shared
from gemma2.training.trained_model import TrainedModel, model_from_checkpoint, save_trained
from gemma2.training.tune_settings import ENGINE_FORMATS, TuneSettings

DEFAULT_SEQUENCE_LENGTH: Final = 1024


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """What settings come to, found out before anything is written."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    device: torch.device
    train: TokenizedExamples
    validation: TokenizedExamples | None
    loader: ExampleLoader
    num_steps: int


def check_settings(
    settings: TuneSettings,
    base_folder: Path,
    *,
    on_tokenizing: OnTokenizing = lambda name, progress: None,
    ranks: Ranks = ONE_PROCESS,
) -> TunePlan:
    """Checks settings against this machine, opens the model and tokenizes the examples.

    Args:
        settings: what to tune, on what, for how long.
        base_folder: the folder of `settings.model.name`.
        on_tokenizing: see `OnTokenizing`.
        ranks: the processes, all of which must call this with the same settings.

    Raises:
        ConfigError: the settings do not fit each other, this machine, or the run that the output folder holds.
        DataError: examples cannot be read or used.
        CheckpointError, TokenizerError: the model cannot be read.
    """
    run = settings.run
    device = check_machine(run, settings.optimizer, ranks)
    if settings.model.quantization in ENGINE_FORMATS and device.type != "cpu":
        raise ConfigError(
            f"model.quantization is {settings.model.quantization}, whose kernels are for the CPU, but run.device is "
            f"{device}; set run.device to cpu, or model.quantization to nf4"
        )
    checkpoint = open_checkpoint(base_folder)
    _check_parallel(settings, checkpoint, ranks)
    check_layers(checkpoint.config, run, settings.adapter)
    longest = checkpoint.config.max_position_embeddings
    sequence_length = run.sequence_length or min(longest, DEFAULT_SEQUENCE_LENGTH)
    if sequence_length > longest:
        raise ConfigError(f"run.sequence_length ({sequence_length}) must not pass the model's {longest} tokens")
    tokenizer = Tokenizer.from_folder(base_folder)
    tokenizer.check_fits(checkpoint.config)
    RunFolder(settings.output, settings, ranks).check()
    train, validation = read_examples(settings.data, tokenizer, sequence_length, on_tokenizing)
    for name, given in (("train", train), ("validation", validation)):
        if given is not None and given.are_pairs != (settings.objective.kind == "dpo"):
            has = "preference pairs" if given.are_pairs else "single examples"
            needs = "dpo, which learns from pairs" if not given.are_pairs else "next_token, which learns from examples"
            raise DataError(f"data.{name} holds {has}, but objective.kind is {needs}")
    loader = example_loader(settings.data, train, run, ranks)
    num_steps = run.num_steps or loader.total_batches
    assert num_steps is not None
    return TunePlan(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        device=device,
        train=train,
        validation=validation,
        loader=loader,
        num_steps=num_steps,
    )


def tune(
    settings: TuneSettings,
    plan: TunePlan,
    *,
    progress: Progress,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ONE_PROCESS,
) -> Path | None:
    """Tunes, or goes on tuning, and returns the folder of the adapter or model; None if it was stopped before the end.

    Args:
        settings: what to tune, on what, for how long.
        plan: what `check_settings` made of them.
        progress: is told of steps, validations and checkpoints.
        say: is given a line for each stage.
        should_stop: asked after each step; with several processes all stop if one says so.
        ranks: the processes, as for `check_settings`.

    Raises:
        ConfigError: another run is at work in the output folder, or it holds one with other settings.
        DataError: the loss is no longer a number.
        CheckpointError: the model or a checkpoint cannot be read or written.
    """
    folder = RunFolder(settings.output, settings, ranks)
    with folder.locked():
        return _tune(settings, folder, plan, progress=progress, say=say, should_stop=should_stop)


def _tune(
    settings: TuneSettings,
    folder: RunFolder,
    plan: TunePlan,
    *,
    progress: Progress,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Path | None:
    run, ranks = settings.run, folder.ranks
    use_threads(run)
    state = folder.last_state()
    folder.write_settings()
    for examples in (plan.train, plan.validation):
        if examples is not None:
            for choice in examples.choices:
                say(str(choice))
    say(describe_examples("training", plan.train))
    if plan.validation is not None:
        say(describe_examples("validation", plan.validation))

    before = generation_stop_ids(plan.checkpoint.folder, plan.checkpoint.config)
    extra_files = generation_config(plan.tokenizer, is_chat=settings.data.template == "chat", before=before)
    trained = _load(settings, plan, ranks)
    objective, count_units, metrics = _objective(settings, plan, trained, ranks)
    num_trained = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    total = plan.checkpoint.config.count_parameters().total
    say(f"model: {total:,} parameters, {num_trained:,} of them trained; on {ranks.describe(plan.device)}")

    validation = None
    if plan.validation is not None:
        validation = example_validation(settings.data, plan.validation, plan.tokenizer, run, ranks)
    trainer = Trainer(
        model=trained.model,
        objective=trained.around(objective),
        loader=plan.loader,
        validation=validation,
        run=run,
        num_steps=plan.num_steps,
        optimizer=settings.optimizer,
        folder=folder.path,
        progress=progress,
        fingerprint=folder.fingerprint,
        count_units=count_units,
        measures_text=settings.objective.kind == "next_token",
        metrics=metrics,
        ranks=ranks,
    )
    result = resume_and_train(trainer, state, say=say, should_stop=should_stop)
    if not trainer.is_done:
        return None
    say_stopped_early(trainer, say)
    if result is not None and settings.objective.kind == "next_token":
        say(f"validation: perplexity {math.exp(min(result.loss, 700)):.3f}")
    return save_trained(
        folder.path,
        trained,
        ranks,
        base_model=settings.model.name,
        dtype=run.save_dtype,
        tokenizer_files=plan.checkpoint.tokenizer_files,
        extra_files=extra_files,
    )


def _check_parallel(settings: TuneSettings, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Refuses what cannot be shared among processes."""
    check_split(checkpoint.config, ranks.tensor)
    if ranks.tensor == 1:
        return
    if settings.model.quantization != "none":
        raise ConfigError(
            f"parallel.tensor is {ranks.tensor}, but weights in {settings.model.quantization} cannot be cut; set it to "
            "1, so that processes cut the batch only, or leave model.quantization out"
        )
    if settings.adapter is not None and settings.adapter.use_dora:
        raise ConfigError(
            f"parallel.tensor is {ranks.tensor}, but adapter.use_dora needs whole rows of W + s · B A in one process; "
            "set one of the two otherwise"
        )


def _load(settings: TuneSettings, plan: TunePlan, ranks: Ranks) -> TrainedModel:
    """The model to train. A quantized one is whole in each process: those cut the batch only."""
    kind, dtype = settings.model.quantization, settings.run.dtype

    def quantized() -> Gemma2ForCausalLM:
        if kind in ENGINE_FORMATS:
            return load_packed(plan.checkpoint, kind, dtype=DTYPES[dtype], num_threads=torch.get_num_threads())
        replace = partial(quantized_linear, kind, dtype)
        return load_model(plan.checkpoint, dtype=dtype, device=plan.device, replace_linear=replace)

    return model_from_checkpoint(
        plan.checkpoint,
        settings.run,
        ranks,
        plan.device,
        adapter=settings.adapter,
        load=None if kind == "none" else quantized,
    )


def _objective(
    settings: TuneSettings, plan: TunePlan, trained: TrainedModel, ranks: Ranks
) -> tuple[Objective, CountUnits, MetricSums | None]:
    dtype = DTYPES[settings.run.dtype]
    if settings.objective.kind == "next_token":
        return next_token_objective(compute_dtype=dtype, compiled=settings.run.compile), count_labels, None
    metrics = MetricSums()
    if settings.adapter is not None:
        reference = model_reference(
            trained.model, compute_dtype=dtype, as_reference=partial(adapters_disabled, trained.model)
        )
    elif trained.is_shared:
        gathered = load_shared(plan.checkpoint, ranks, dtype=torch.float32)
        gathered.requires_grad_(False)
        reference = gathered.around(model_reference(gathered.model, compute_dtype=dtype))
    else:
        # In float32 as the model itself, so that both compute alike and the first margins are 0.
        before = copy.deepcopy(trained.model).requires_grad_(False)
        reference = model_reference(before, compute_dtype=dtype)
    objective = preference_objective(
        reference=reference,
        beta=settings.objective.beta,
        loss_type=settings.objective.loss_type,
        label_smoothing=settings.objective.label_smoothing,
        compute_dtype=dtype,
        metrics=metrics,
    )
    return objective, count_pairs, metrics
