"""`gemma2 distill`: a teacher and text, or examples, to a student; `gemma2 distill cache`: the teacher's words to disk.

The report trains its 2B and 9B so: the student learns the teacher's whole distribution of the next token, where a text
alone shows one word of it. The run's folder is that of `gemma2 tune`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from gemma2.checkpoints import TOKENIZER_FILES, Checkpoint, open_checkpoint, packed_model
from gemma2.config import Gemma2Config
from gemma2.data import (
    ExampleLoader,
    PackedLoader,
    StreamLoader,
    TokenizedExamples,
    ValidationSet,
    batch_for_validation,
    expand_files,
    tokenize_for_validation,
)
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.fsdp import GatheredModel
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import ConfigError
from gemma2.model.device import choose_device
from gemma2.model.loading import DTYPES, load_model
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.text import Tokenizer
from gemma2.training.activation_checkpointing import checkpoint_layers
from gemma2.training.adapters import adapter_first_values, add_adapter, save_adapter
from gemma2.training.distill_settings import DistillSettings
from gemma2.training.distillation import Divergence, TeacherLogits, distillation_objective, torch_teacher
from gemma2.training.engine_teacher import engine_teacher
from gemma2.training.loop import Loader, Progress, Trainer
from gemma2.training.objectives import Batch, next_token_objective
from gemma2.training.on_policy import OnPolicyLoader
from gemma2.training.optimizer import check_optimizer
from gemma2.training.quantized_base import quantized_linear
from gemma2.training.run_folder import RunFolder
from gemma2.training.shared_model import load_shared, new_shared, save_model
from gemma2.training.teacher_cache import CachedTeacher, CacheInfo, TeacherCache, write_teacher_cache
from gemma2.training.tune import OnTokenizing, describe_examples, generation_config, tokenize

_TOKENIZER_PROBE = "The quick brown fox\njumps over 42 lazy dogs;\n\n\tça va, Οδυσσεύς? 漢字 🦊"


@dataclass(frozen=True, kw_only=True)
class DistillPlan:
    """What settings come to, found out before anything is written."""

    teacher: Checkpoint
    student: Checkpoint | None
    """None for a new one."""
    config: Gemma2Config
    """The student's."""
    tokenizer: Tokenizer
    tokenizer_files: tuple[Path, ...]
    device: torch.device
    files: tuple[Path, ...]
    """Of text."""
    train: TokenizedExamples | None
    validation: TokenizedExamples | None
    num_steps: int
    cache: TeacherCache | None


def check_settings(
    settings: DistillSettings,
    teacher_folder: Path,
    student_folder: Path | None,
    *,
    on_tokenizing: OnTokenizing = lambda name, progress: None,
    for_cache: bool = False,
    ranks: Ranks = ONE_PROCESS,
) -> DistillPlan:
    """Checks settings against this machine, opens the models and tokenizes examples.

    Args:
        settings: what to distil, from what, on what.
        teacher_folder: of `settings.teacher.name`.
        student_folder: of `settings.student.name`; None for a new student.
        on_tokenizing: see `OnTokenizing`.
        for_cache: whether the teacher's words are to be written, and not read.
        ranks: the processes, all of which must call this with the same settings.

    Raises:
        ConfigError: the settings do not fit each other, this machine, the models, or what the folders hold.
        DataError: data cannot be read or used.
        CheckpointError, TokenizerError: a model or the cache cannot be read.
    """
    run = settings.run
    device = ranks.device or choose_device(run.device, setting="run.device")
    ranks.check_batch(run.batch_size, run.micro_batch_size)
    check_optimizer(settings.optimizer, ranks.world_size)
    if ranks.world_size > 1 and settings.on_policy is not None:
        raise ConfigError(
            f"on_policy needs the whole student in the process that samples, but {ranks.world_size} processes share "
            "it; start one process, or leave on_policy out"
        )
    teacher = open_checkpoint(teacher_folder)
    tokenizer = Tokenizer.from_folder(teacher_folder)
    tokenizer.check_fits(teacher.config)
    student = None
    tokenizer_files = teacher.tokenizer_files
    if student_folder is None:
        config = settings.student.new_config(teacher.config.vocab_size)
    else:
        student = open_checkpoint(student_folder)
        config, tokenizer_files = student.config, student.tokenizer_files
        own = Tokenizer.from_folder(student_folder)
        if config.vocab_size != teacher.config.vocab_size or own.encode(_TOKENIZER_PROBE) != tokenizer.encode(
            _TOKENIZER_PROBE
        ):
            raise ConfigError(
                f"{student_folder} and {teacher_folder} have other tokenizers; a student learns the teacher's words, "
                "so both must cut texts alike"
            )
    check_split(config, ranks.tensor)
    if _is_teacher_shared(settings, ranks):
        check_split(teacher.config, ranks.tensor)
    for whose, longest in (
        ("student", config.max_position_embeddings),
        ("teacher", teacher.config.max_position_embeddings),
    ):
        if run.sequence_length > longest:
            raise ConfigError(
                f"run.sequence_length ({run.sequence_length}) must not pass the {whose}'s {longest} tokens"
            )
    if not for_cache:
        RunFolder(settings.output, settings, ranks).last_state()
    files: list[Path] = []
    train = validation = None
    num_steps = run.num_steps
    if settings.text is not None:
        files = expand_files(settings.text.train)
        if settings.text.validation:
            expand_files(settings.text.validation)
    else:
        assert settings.examples is not None
        data = settings.examples
        examples = partial(tokenize, data, tokenizer, run.sequence_length, on_tokenizing)
        train = examples("train", data.train, data.max_train_examples)
        if data.validation and not for_cache:
            validation = examples("validation", data.validation, data.max_validation_examples)
        if train.are_pairs:
            raise ConfigError("examples.train holds preference pairs, but a teacher's words are learned from examples")
        if num_steps is None:
            num_steps = _example_loader(settings, train, ranks).total_batches
    assert num_steps is not None
    cache = None
    if settings.teacher.cache is not None and not for_cache:
        cache = TeacherCache(
            settings.teacher.cache,
            identity=_cache_identity(settings),
            temperature=settings.objective.temperature,
            num_steps=num_steps,
        )
    return DistillPlan(
        teacher=teacher,
        student=student,
        config=config,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_files,
        device=device,
        files=tuple(files),
        train=train,
        validation=validation,
        num_steps=num_steps,
        cache=cache,
    )


def distill(
    settings: DistillSettings,
    plan: DistillPlan,
    *,
    progress: Progress,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ONE_PROCESS,
) -> Path | None:
    """Distils, or goes on, and returns the student's folder; None if it was stopped before the end.

    Args:
        settings: what to distil.
        plan: what `check_settings` made of them.
        progress: is told of steps, validations and checkpoints.
        say: is given a line for each stage.
        should_stop: asked after each step; with several processes all stop if one says so.
        ranks: the processes, as for `check_settings`.

    Raises:
        ConfigError: another run is at work in the output folder, or it holds one with other settings.
        DataError: the loss is no longer a number, or data cannot be read.
        CheckpointError: a model, the cache or a checkpoint cannot be read or written.
    """
    folder = RunFolder(settings.output, settings, ranks)
    with folder.locked():
        return _distill(settings, folder, plan, progress=progress, say=say, should_stop=should_stop)


def cache_info(settings: DistillSettings, plan: DistillPlan) -> CacheInfo:
    """What `gemma2 distill cache` would write."""
    return CacheInfo(
        identity=_cache_identity(settings),
        vocab_size=plan.teacher.config.vocab_size,
        top_k=min(settings.teacher.cache_top_k, plan.teacher.config.vocab_size),
        temperature=settings.objective.temperature,
        num_steps=plan.num_steps,
    )


def write_cache(
    settings: DistillSettings,
    plan: DistillPlan,
    folder: Path,
    *,
    on_step: Callable[[int, int], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs the teacher over the batches of the run and writes what it says; see `write_teacher_cache`."""
    _set_threads(settings)
    with _loader(settings, plan, ONE_PROCESS) as loader:
        return write_teacher_cache(
            folder,
            cache_info(settings, plan),
            loader,
            _live_teacher(settings, plan, ONE_PROCESS)[0],
            device=plan.device,
            on_step=on_step,
            should_stop=should_stop,
        )


def _distill(
    settings: DistillSettings,
    folder: RunFolder,
    plan: DistillPlan,
    *,
    progress: Progress,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Path | None:
    run, ranks = settings.run, folder.ranks
    _set_threads(settings)
    dtype = DTYPES[run.dtype]
    state = folder.last_state()
    folder.write_settings()
    for name, examples in (("training", plan.train), ("validation", plan.validation)):
        if examples is not None:
            say(describe_examples(name, examples))
    around: list[GatheredModel] = []
    if ranks.world_size > 1:
        around.append(_shared_student(settings, plan, ranks))
        student = around[0].model
    else:
        student = _student(settings, plan)
        if settings.adapter is not None:
            add_adapter(student, settings.adapter, seed=run.seed)
        checkpoint_layers(student, run.gradient_checkpointing)
    first_values = None if settings.adapter is None else adapter_first_values(student)
    teacher_size, size = plan.teacher.config.count_parameters().total, plan.config.count_parameters().total
    source = f"cached in {settings.teacher.cache}" if plan.cache is not None else settings.teacher.backend
    say(f"teacher: {teacher_size:,} parameters ({source}); student: {size:,}; on {ranks.describe(plan.device)}")
    # What is cached is asked for by whole batches, of which each process then takes its rows.
    with _loader(settings, plan, ranks if plan.cache is None else ONE_PROCESS) as source_loader:
        loader: Loader = source_loader
        if plan.cache is not None:
            cached = CachedTeacher(source_loader, plan.cache, rank=ranks.data_rank, world_size=ranks.data)
            loader = cached
            teacher: Callable[[Batch], Any] = cached
        else:
            teacher, shared_teacher = _live_teacher(settings, plan, ranks)
            around += [] if shared_teacher is None else [shared_teacher]
        if settings.on_policy is not None:
            loader = OnPolicyLoader(source_loader, student, plan.tokenizer, settings.on_policy, seed=run.seed)
        objective = distillation_objective(
            teacher=teacher, divergence=Divergence(**settings.objective.model_dump()), compute_dtype=dtype
        )
        # What the student is measured by is the text itself, so that it can be compared with one trained on it.
        validation_objective = next_token_objective(compute_dtype=dtype, compiled=False)
        for gathered in around:  # the loss asks for both heads
            objective = gathered.around(objective)
        for gathered in around[:1]:
            validation_objective = gathered.around(validation_objective)
        trainer = Trainer(
            model=student,
            objective=objective,
            loader=loader,
            validation=_validation(settings, plan, ranks),
            validation_objective=validation_objective,
            run=run,
            num_steps=plan.num_steps,
            optimizer=settings.optimizer,
            folder=folder.path,
            progress=progress,
            fingerprint=folder.fingerprint,
            ranks=ranks,
        )
        if state is not None:
            name, values = state
            trainer.load_state_dict(values)
            say(f"resumed from {name}: step {trainer.step}, {trainer.tokens_seen:,} tokens seen")
        result = trainer.train(should_stop=should_stop)
    if not trainer.is_done:
        return None
    if result is not None:
        say(f"validation: perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte")
    template = "chat" if settings.examples is not None and settings.examples.template == "chat" else "none"
    extra_files = generation_config(plan.tokenizer, template)
    if settings.adapter is not None:
        return save_adapter(
            folder.path / "adapter",
            student,
            settings.adapter,
            base_model=str(settings.student.name),
            first_values=first_values,
            extra_files=extra_files,
            ranks=ranks,
        )
    return save_model(
        folder.path / "model",
        student,
        ranks,
        dtype=run.save_dtype,
        tokenizer_files=[path for path in plan.tokenizer_files if path.name in TOKENIZER_FILES],
        extra_files=extra_files,
    )


def _set_threads(settings: DistillSettings) -> None:
    if settings.run.num_threads is not None:
        torch.set_num_threads(settings.run.num_threads)


def _cache_identity(settings: DistillSettings) -> dict[str, Any]:
    """What decides batches and words: all else may differ between the run that wrote a cache and one that reads it."""
    values = settings.model_dump(mode="json")
    teacher = {name: values["teacher"][name] for name in ("name", "backend", "weights")}
    run = {name: values["run"][name] for name in ("batch_size", "sequence_length", "seed")}
    data = {
        section: {
            name: value
            for name, value in (values[section] or {}).items()
            if "validation" not in name and (name, value) != ("num_streams", 1)
        }
        for section in ("text", "examples")
    }
    return {"teacher": teacher, "run": run, **data}


def _student(settings: DistillSettings, plan: DistillPlan) -> Gemma2ForCausalLM:
    if plan.student is not None:
        return load_model(
            plan.student, dtype="float32" if settings.adapter is None else settings.run.dtype, device=plan.device
        )
    model = Gemma2ForCausalLM(plan.config, device="meta").to_empty(device=plan.device)
    model.initialize(torch.Generator(device=plan.device).manual_seed(settings.run.seed))
    return model


def _shared_student(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> GatheredModel:
    """As `_student`, of which this process has a part, with the adapter and checkpointing of activations."""
    run, is_full = settings.run, settings.adapter is None
    gather_dtype = torch.bfloat16 if is_full and run.dtype == "bfloat16" else None
    if plan.student is None:
        return new_shared(
            plan.config,
            ranks,
            generator=torch.Generator(device=plan.device).manual_seed(run.seed),
            gather_dtype=gather_dtype,
            checkpointing=run.gradient_checkpointing,
        )
    return load_shared(
        plan.student,
        ranks,
        dtype=torch.float32 if is_full else DTYPES[run.dtype],
        adapter=settings.adapter,
        seed=run.seed,
        gather_dtype=gather_dtype,
        checkpointing=run.gradient_checkpointing,
    )


def _is_teacher_shared(settings: DistillSettings, ranks: Ranks) -> bool:
    """Whether processes share the teacher's weights too. Quantized ones and the CPU engine's are whole in each."""
    teacher = settings.teacher
    is_torch = teacher.cache is None and teacher.backend == "torch"
    return ranks.world_size > 1 and is_torch and teacher.weights != "nf4"


def _live_teacher(
    settings: DistillSettings, plan: DistillPlan, ranks: Ranks
) -> tuple[Callable[[Batch], TeacherLogits], GatheredModel | None]:
    """The teacher, and what its logits must be asked for within, if processes share its weights."""
    teacher, run = settings.teacher, settings.run
    if teacher.backend == "cpu":
        from gemma2.cpu import CpuBackend, resolve_num_threads

        weights = "q8" if teacher.weights == "auto" else teacher.weights
        packed = packed_model(plan.teacher, weights, num_threads=resolve_num_threads(run.num_threads))
        return engine_teacher(CpuBackend(packed, num_threads=run.num_threads)), None
    dtype = run.dtype if teacher.weights in ("auto", "nf4") else teacher.weights
    compute_dtype = DTYPES[dtype]
    if _is_teacher_shared(settings, ranks):
        gathered = load_shared(plan.teacher, ranks, dtype=compute_dtype)
        gathered.requires_grad_(False).eval()
        return torch_teacher(gathered.model, compute_dtype=compute_dtype), gathered
    replace = partial(quantized_linear, "nf4", dtype) if teacher.weights == "nf4" else None
    model = load_model(plan.teacher, dtype=dtype, device=plan.device, replace_linear=replace)
    model.requires_grad_(False).eval()
    return torch_teacher(model, compute_dtype=compute_dtype), None


def _example_loader(settings: DistillSettings, train: TokenizedExamples, ranks: Ranks) -> ExampleLoader:
    assert settings.examples is not None
    run = settings.run
    return ExampleLoader(
        train,
        batch_size=run.batch_size // ranks.data,
        packing=settings.examples.packing,
        seed=run.seed,
        num_epochs=run.num_epochs or (1 if run.num_steps is None else None),
        rank=ranks.data_rank,
        world_size=ranks.data,
    )


@contextlib.contextmanager
def _loader(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> Iterator[Loader]:
    run = settings.run
    if plan.train is not None:
        yield cast(Loader, _example_loader(settings, plan.train, ranks))
        return
    text, tokenizer = settings.text, plan.tokenizer
    assert text is not None

    def make_stream(number: int, num_streams: int, num_rows: int) -> PackedLoader:
        return PackedLoader(
            list(plan.files),
            partial(tokenizer.encode, add_bos=False),
            sequence_length=run.sequence_length,
            batch_size=num_rows,
            shuffle_buffer=text.shuffle_buffer,
            seed=run.seed,
            text_key=text.text_key,
            newlines=text.newlines,
            on_error=text.on_error,
            rank=number,
            world_size=num_streams,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    with StreamLoader(
        make_stream,
        batch_size=run.batch_size,
        num_streams=text.num_streams,
        rank=ranks.data_rank,
        world_size=ranks.data,
    ) as loader:
        yield cast(Loader, loader)


def _validation(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> ValidationSet | None:
    rows = settings.run.micro_batch_size or settings.run.batch_size // ranks.data
    if plan.validation is not None:
        assert settings.examples is not None
        return batch_for_validation(
            plan.validation,
            plan.tokenizer,
            batch_size=rows,
            packing=settings.examples.packing,
            rank=ranks.data_rank,
            world_size=ranks.data,
        )
    if settings.text is None or not settings.text.validation:
        return None
    tokenizer = plan.tokenizer
    return tokenize_for_validation(
        settings.text.validation,
        partial(tokenizer.encode, add_bos=False),
        sequence_length=settings.run.sequence_length,
        batch_size=rows,
        max_tokens=settings.text.validation_max_tokens,
        text_key=settings.text.text_key,
        newlines="keep",
        on_error=settings.text.on_error,
        rank=ranks.data_rank,
        world_size=ranks.data,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
