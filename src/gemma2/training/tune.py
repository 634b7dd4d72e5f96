"""`gemma2 tune`: a model and examples to a tuned model, or to an adapter for it.

The run's folder holds settings.yaml, checkpoints/, log.jsonl, loss.png, and at the end adapter/ in PEFT's format, or
model/, a Hugging Face folder. Called again with the same settings it goes on where it was.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from gemma2.checkpoints import Checkpoint, open_checkpoint
from gemma2.data import ExampleLoader, TokenizedExamples, TokenizingProgress, batch_for_validation, tokenize_examples
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.fsdp import GatheredModel
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import ConfigError, DataError
from gemma2.model.device import choose_device
from gemma2.model.loading import DTYPES, load_model
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.text import Tokenizer
from gemma2.training.activation_checkpointing import checkpoint_layers
from gemma2.training.adapters import adapter_first_values, adapters_disabled, add_adapter, save_adapter
from gemma2.training.loop import Progress, Trainer
from gemma2.training.objectives import CountUnits, MetricSums, Objective, count_labels, next_token_objective
from gemma2.training.optimizer import check_optimizer
from gemma2.training.packed_base import load_packed
from gemma2.training.preference import count_pairs, model_reference, preference_objective
from gemma2.training.quantized_base import quantized_linear
from gemma2.training.run_folder import RunFolder
from gemma2.training.shared_model import load_shared, save_model
from gemma2.training.tune_settings import ENGINE_FORMATS, ExampleDataSettings, TuneSettings

DEFAULT_SEQUENCE_LENGTH: Final = 1024

OnTokenizing = Callable[[str, TokenizingProgress], None]
"""Is told which examples ("train" or "validation") are tokenized, and how far that is."""


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
    device = ranks.device or choose_device(run.device, setting="run.device")
    ranks.check_batch(run.batch_size, run.micro_batch_size)
    check_optimizer(settings.optimizer, ranks.world_size)
    if settings.model.quantization in ENGINE_FORMATS and device.type != "cpu":
        raise ConfigError(
            f"model.quantization is {settings.model.quantization}, whose kernels are for the CPU, but run.device is "
            f"{device}; set run.device to cpu, or model.quantization to nf4"
        )
    checkpoint = open_checkpoint(base_folder)
    _check_parallel(settings, checkpoint, ranks)
    longest = checkpoint.config.max_position_embeddings
    sequence_length = run.sequence_length or min(longest, DEFAULT_SEQUENCE_LENGTH)
    if sequence_length > longest:
        raise ConfigError(f"run.sequence_length ({sequence_length}) must not pass the model's {longest} tokens")
    tokenizer = Tokenizer.from_folder(base_folder)
    tokenizer.check_fits(checkpoint.config)
    RunFolder(settings.output, settings, ranks).last_state()
    examples = partial(tokenize, settings.data, tokenizer, sequence_length, on_tokenizing)
    train = examples("train", settings.data.train, settings.data.max_train_examples)
    validation = None
    if settings.data.validation:
        validation = examples("validation", settings.data.validation, settings.data.max_validation_examples)
    for name, given in (("train", train), ("validation", validation)):
        if given is not None and given.are_pairs != (settings.objective.kind == "dpo"):
            has = "preference pairs" if given.are_pairs else "single examples"
            needs = "dpo, which learns from pairs" if not given.are_pairs else "next_token, which learns from examples"
            raise DataError(f"data.{name} holds {has}, but objective.kind is {needs}")
    num_epochs = run.num_epochs or (1 if run.num_steps is None else None)
    loader = ExampleLoader(
        train,
        batch_size=run.batch_size // ranks.data,
        packing=settings.data.packing,
        seed=run.seed,
        num_epochs=num_epochs,
        rank=ranks.data_rank,
        world_size=ranks.data,
    )
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
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    state = folder.last_state()
    folder.write_settings()
    for examples in (plan.train, plan.validation):
        if examples is not None:
            for choice in examples.choices:
                say(str(choice))
    say(describe_examples("training", plan.train))
    if plan.validation is not None:
        say(describe_examples("validation", plan.validation))

    if _is_shared(settings, ranks):
        gathered = _load_shared(settings, plan, ranks)
        model = gathered.model
        objective, count_units, metrics = _objective(settings, plan, model, ranks)
        objective = gathered.around(objective)
    else:
        model = _load(settings, plan)
        objective, count_units, metrics = _objective(settings, plan, model, ranks)
        if settings.adapter is not None:
            add_adapter(model, settings.adapter, seed=run.seed)
        checkpoint_layers(model, run.gradient_checkpointing)
    first_values = None if settings.adapter is None else adapter_first_values(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = plan.checkpoint.config.count_parameters().total
    say(f"model: {total:,} parameters, {trained:,} of them trained; on {ranks.describe(plan.device)}")

    validation = None
    if plan.validation is not None:
        validation = batch_for_validation(
            plan.validation,
            plan.tokenizer,
            batch_size=run.micro_batch_size or run.batch_size // ranks.data,
            packing=settings.data.packing,
            rank=ranks.data_rank,
            world_size=ranks.data,
        )
    trainer = Trainer(
        model=model,
        objective=objective,
        loader=plan.loader,
        validation=validation,
        run=run,
        num_steps=plan.num_steps,
        optimizer=settings.optimizer,
        folder=folder.path,
        progress=progress,
        fingerprint=folder.fingerprint,
        count_units=count_units,
        metrics=metrics,
        ranks=ranks,
    )
    if state is not None:
        name, values = state
        trainer.load_state_dict(values)
        say(f"resumed from {name}: step {trainer.step}, {trainer.tokens_seen:,} tokens seen")
    result = trainer.train(should_stop=should_stop)
    if not trainer.is_done:
        return None
    if trainer.stopped_early:
        say(f"stopped early at step {trainer.step}: the validation loss was lowest, {trainer.best_loss:.4f}, before")
    if result is not None and settings.objective.kind == "next_token":
        say(f"validation: perplexity {math.exp(min(result.loss, 700)):.3f}")
    if settings.adapter is not None:
        return save_adapter(
            folder.path / "adapter",
            model,
            settings.adapter,
            base_model=settings.model.name,
            first_values=first_values,
            extra_files=generation_config(plan.tokenizer, settings.data.template),
            ranks=ranks,
        )
    return save_model(
        folder.path / "model",
        model,
        ranks,
        dtype=run.save_dtype,
        tokenizer_files=plan.checkpoint.tokenizer_files,
        extra_files=generation_config(plan.tokenizer, settings.data.template),
    )


def describe_examples(name: str, examples: TokenizedExamples) -> str:
    """Says how many examples there are, and what was left out: one line, or one more for each reason."""
    lines = [
        f"{name}: {len(examples):,} {'pairs' if examples.are_pairs else 'examples'}, "
        f"{len(examples.tokens):,} tokens, {int(examples.num_trained.sum()):,} of them trained"
    ]
    if examples.num_truncated:
        lines.append(f"{examples.num_truncated:,} were cut to {examples.sequence_length} tokens")
    if examples.skipped.total:
        lines.append(f"{examples.skipped}; the last one: {examples.skipped.last_message}")
    return "; ".join(lines)


def tokenize(
    data: ExampleDataSettings,
    tokenizer: Tokenizer,
    sequence_length: int,
    on_tokenizing: OnTokenizing,
    name: str,
    files: list[str],
    max_examples: int | None,
) -> TokenizedExamples:
    """Reads and encodes the examples of `files`, as the settings of the data say; see `tokenize_examples`."""
    return tokenize_examples(
        files,
        tokenizer,
        sequence_length=sequence_length,
        format=data.format,
        columns=data.columns,
        template=data.template,
        train_on=data.train_on,
        too_long=data.too_long,
        on_error=data.on_error,
        max_examples=max_examples,
        on_progress=partial(on_tokenizing, name),
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


def _is_shared(settings: TuneSettings, ranks: Ranks) -> bool:
    """Whether processes share the weights. Quantized ones they do not: each has them all, and cuts the batch only."""
    return ranks.world_size > 1 and settings.model.quantization == "none"


def _load_shared(settings: TuneSettings, plan: TunePlan, ranks: Ranks) -> GatheredModel:
    """As `_load`, of which this process has a part, with the adapter and checkpointing of activations."""
    run, is_full = settings.run, settings.adapter is None
    return load_shared(
        plan.checkpoint,
        ranks,
        dtype=torch.float32 if is_full else DTYPES[run.dtype],
        adapter=settings.adapter,
        seed=run.seed,
        gather_dtype=torch.bfloat16 if is_full and run.dtype == "bfloat16" else None,
        checkpointing=run.gradient_checkpointing,
    )


def _load(settings: TuneSettings, plan: TunePlan) -> Gemma2ForCausalLM:
    """The model to train: float32 weights if they are trained, else in the dtype of the products, or quantized."""
    if settings.adapter is None:
        return load_model(plan.checkpoint, dtype="float32", device=plan.device)
    kind = settings.model.quantization
    if kind in ENGINE_FORMATS:
        return load_packed(plan.checkpoint, kind, dtype=DTYPES[settings.run.dtype], num_threads=torch.get_num_threads())
    replace = None
    if kind != "none":
        replace = partial(quantized_linear, settings.model.quantization, settings.run.dtype)
    return load_model(plan.checkpoint, dtype=settings.run.dtype, device=plan.device, replace_linear=replace)


def _objective(
    settings: TuneSettings, plan: TunePlan, model: Gemma2ForCausalLM, ranks: Ranks
) -> tuple[Objective, CountUnits, MetricSums | None]:
    dtype = DTYPES[settings.run.dtype]
    if settings.objective.kind == "next_token":
        return next_token_objective(compute_dtype=dtype, compiled=settings.run.compile), count_labels, None
    metrics = MetricSums()
    if settings.adapter is not None:
        reference = model_reference(model, compute_dtype=dtype, as_reference=partial(adapters_disabled, model))
    elif _is_shared(settings, ranks):
        gathered = load_shared(plan.checkpoint, ranks, dtype=dtype)
        gathered.requires_grad_(False)
        reference = gathered.around(model_reference(gathered.model, compute_dtype=dtype))
    else:
        before = copy.deepcopy(model).to(dtype).requires_grad_(False)
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


def generation_config(tokenizer: Tokenizer, template: str) -> dict[str, str]:
    """generation_config.json of a model that learned from examples: answers end with <end_of_turn> if it learned so.

    Args:
        tokenizer: whose ids.
        template: "chat" or "none", of the examples.
    """
    stop_ids = [tokenizer.eos_id]
    if template == "chat":
        stop_ids.append(tokenizer.end_of_turn_id)
    values = {
        "_from_model_config": True,
        "bos_token_id": tokenizer.bos_id,
        "cache_implementation": "hybrid",
        "eos_token_id": stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    return {"generation_config.json": json.dumps(values, indent=2) + "\n"}
