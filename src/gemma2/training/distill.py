"""`gemma2 distill`: a teacher and text, or examples, to a student; `gemma2 distill cache`: the teacher's words to disk.

The report trains its 2B and 9B so: the student learns the teacher's whole distribution of the next token, where a text
alone shows one word of it. The run's folder is that of `gemma2 tune`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from gemma2.checkpoints import TOKENIZER_FILES, Checkpoint, generation_stop_ids, open_checkpoint
from gemma2.config import Gemma2Config
from gemma2.data import TokenizedExamples, ValidationSet
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import ConfigError, DataError
from gemma2.model.loading import DTYPES
from gemma2.text import Tokenizer
from gemma2.training.distill_settings import DistillSettings
from gemma2.training.distillation import Divergence, distillation_objective
from gemma2.training.example_data import (
    OnTokenizing,
    describe_examples,
    example_loader,
    example_validation,
    read_examples,
)
from gemma2.training.loop import Loader, Progress, Trainer
from gemma2.training.objectives import Batch, next_token_objective
from gemma2.training.on_policy import OnPolicyLoader
from gemma2.training.run_folder import RunFolder
from gemma2.training.run_stages import (
    check_layers,
    check_machine,
    generation_config,
    resume_and_train,
    say_stopped_early,
    use_threads,
)
from gemma2.training.teacher_cache import (
    CachedTeacher,
    CacheInfo,
    TeacherCache,
    teacher_fingerprint,
    write_teacher_cache,
)
from gemma2.training.teachers import is_teacher_shared, live_teacher, teacher_weights
from gemma2.training.text_data import check_text, text_loader, text_validation
from gemma2.training.trained_model import TrainedModel, model_from_checkpoint, new_model, save_trained

_TOKENIZER_PROBE = "The quick brown fox\njumps over 42 lazy dogs;\n\n\tça va, Οδυσσεύς? 漢字 🦊"
"""Shows other merges or another treatment of spaces, where all pieces are the same."""


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
    needs_cache: bool = True,
    ranks: Ranks = ONE_PROCESS,
) -> DistillPlan:
    """Checks settings against this machine, opens the models and tokenizes examples.

    Args:
        settings: what to distil, from what, on what.
        teacher_folder: of `settings.teacher.name`.
        student_folder: of `settings.student.name`; None for a new student.
        on_tokenizing: see `OnTokenizing`.
        for_cache: whether the teacher's words are to be written, and nothing is trained.
        needs_cache: whether the cache that is read, if settings name one, must be there.
        ranks: the processes, all of which must call this with the same settings.

    Raises:
        ConfigError: the settings do not fit each other, this machine, the models, or what the folders hold.
        DataError: data cannot be read or used.
        CheckpointError, TokenizerError: a model or the cache cannot be read.
    """
    run = settings.run
    device = check_machine(run, settings.optimizer, ranks)
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
        own.check_fits(config)
        if difference := _tokenizer_difference(own, tokenizer):
            raise ConfigError(
                f"{student_folder} and {teacher_folder} have other tokenizers ({difference}); a student learns the "
                "teacher's words, so both must cut texts alike"
            )
        if config.vocab_size != teacher.config.vocab_size:
            raise ConfigError(
                f"{student_folder} and {teacher_folder} have {config.vocab_size:,} and {teacher.config.vocab_size:,} "
                "words; a student learns the teacher's, so both must have as many"
            )
    check_layers(config, run, settings.adapter)
    check_split(config, ranks.tensor)
    if is_teacher_shared(settings.teacher, ranks):
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
        RunFolder(settings.output, settings, ranks).check()
    files: list[Path] = []
    train = validation = None
    num_steps = run.num_steps
    if settings.text is not None:
        files = check_text(settings.text, run)
    else:
        assert settings.examples is not None
        train, validation = read_examples(
            settings.examples, tokenizer, run.sequence_length, on_tokenizing, with_validation=not for_cache
        )
        for name, examples in (("train", train), ("validation", validation)):
            if examples is not None and examples.are_pairs:
                raise DataError(
                    f"examples.{name} holds preference pairs, but a teacher's words are learned from single examples"
                )
        if num_steps is None:
            num_steps = example_loader(settings.examples, train, run, ranks).total_batches
    assert num_steps is not None
    cache = None
    if settings.teacher.cache is not None and not for_cache and (needs_cache or settings.teacher.cache.exists()):
        cache = TeacherCache(
            settings.teacher.cache,
            identity=_cache_identity(settings, teacher),
            vocab_size=config.vocab_size,
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
        identity=_cache_identity(settings, plan.teacher),
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
    say: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Runs the teacher over the batches of the run and writes what it says; see `write_teacher_cache`."""
    use_threads(settings.run)
    teacher, _ = live_teacher(settings.teacher, plan.teacher, settings.run, ONE_PROCESS, plan.device, say)
    with _loader(settings, plan, ONE_PROCESS) as loader:
        return write_teacher_cache(
            folder,
            cache_info(settings, plan),
            loader,
            teacher,
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
    use_threads(run)
    dtype = DTYPES[run.dtype]
    state = folder.last_state()
    folder.write_settings()
    for name, examples in (("training", plan.train), ("validation", plan.validation)):
        if examples is not None:
            say(describe_examples(name, examples))
    is_chat = settings.examples is not None and settings.examples.template == "chat"
    before = generation_stop_ids(plan.student.folder, plan.config) if plan.student is not None else ()
    extra_files = generation_config(plan.tokenizer, is_chat=is_chat, before=before)
    trained = _student(settings, plan, ranks)
    teacher_size, size = plan.teacher.config.count_parameters().total, plan.config.count_parameters().total
    source = f"cached in {settings.teacher.cache}" if plan.cache is not None else settings.teacher.backend
    say(f"teacher: {teacher_size:,} parameters ({source}); student: {size:,}; on {ranks.describe(plan.device)}")
    # What is cached is asked for by whole batches, of which each process then takes its rows.
    with _loader(settings, plan, ranks if plan.cache is None else ONE_PROCESS) as source_loader:
        loader, shared_teacher = source_loader, None
        if plan.cache is not None:
            cached = CachedTeacher(source_loader, plan.cache, rank=ranks.data_rank, world_size=ranks.data)
            loader = cached
            teacher: Callable[[Batch], Any] = cached
        else:
            teacher, shared_teacher = live_teacher(settings.teacher, plan.teacher, run, ranks, plan.device, say)
        if settings.on_policy is not None:
            loader = OnPolicyLoader(source_loader, trained.model, plan.tokenizer, settings.on_policy, seed=run.seed)
        objective = distillation_objective(
            teacher=teacher, divergence=Divergence(**settings.objective.model_dump()), compute_dtype=dtype
        )
        objective = trained.around(objective)
        if shared_teacher is not None:  # the loss asks for both heads
            objective = shared_teacher.around(objective)
        # What the student is measured by is the text itself, so that it can be compared with one trained on it.
        validation_objective = next_token_objective(compute_dtype=dtype, compiled=False)
        trainer = Trainer(
            model=trained.model,
            objective=objective,
            loader=loader,
            validation=_validation(settings, plan, ranks),
            validation_objective=trained.around(validation_objective),
            minimized="divergence from the teacher",
            run=run,
            num_steps=plan.num_steps,
            optimizer=settings.optimizer,
            folder=folder.path,
            progress=progress,
            fingerprint=folder.fingerprint,
            ranks=ranks,
        )
        result = resume_and_train(trainer, state, say=say, should_stop=should_stop)
    if not trainer.is_done:
        return None
    say_stopped_early(trainer, say)
    if result is not None:
        say(f"validation: perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte")
    return save_trained(
        folder.path,
        trained,
        ranks,
        base_model=str(settings.student.name),
        dtype=run.save_dtype,
        tokenizer_files=[path for path in plan.tokenizer_files if path.name in TOKENIZER_FILES],
        extra_files=extra_files,
    )


def _cache_identity(settings: DistillSettings, teacher: Checkpoint) -> dict[str, Any]:
    """What decides batches and words: all else may differ between the run that wrote a cache and one that reads it."""
    values = settings.model_dump(mode="json")
    given = settings.teacher
    weights = teacher_weights(given, settings.run)
    dtypes = {"dtype": settings.run.dtype} if weights == "nf4" else {}
    words = {"files": teacher_fingerprint(teacher.files), "backend": given.backend, "weights": weights, **dtypes}
    run = {name: values["run"][name] for name in ("batch_size", "sequence_length", "seed")}
    data = {
        section: {
            name: value
            for name, value in (values[section] or {}).items()
            if "validation" not in name and (name, value) != ("num_streams", 1)
        }
        for section in ("text", "examples")
    }
    return {"teacher": words, "run": run, **data}


def _tokenizer_difference(a: Tokenizer, b: Tokenizer) -> str:
    """Says where two tokenizers part; empty if they do not."""
    if a.vocab_size != b.vocab_size:
        return f"{a.vocab_size:,} and {b.vocab_size:,} pieces"
    for index in range(a.vocab_size):
        if a.id_to_piece(index) != b.id_to_piece(index):
            return f"piece {index} is {a.id_to_piece(index)!r} and {b.id_to_piece(index)!r}"
    return "the same pieces, joined otherwise" if a.encode(_TOKENIZER_PROBE) != b.encode(_TOKENIZER_PROBE) else ""


def _student(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> TrainedModel:
    if plan.student is None:
        return new_model(plan.config, settings.run, ranks, plan.device)
    return model_from_checkpoint(plan.student, settings.run, ranks, plan.device, adapter=settings.adapter)


@contextlib.contextmanager
def _loader(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> Iterator[Loader]:
    run = settings.run
    if plan.train is not None:
        assert settings.examples is not None
        yield cast(Loader, example_loader(settings.examples, plan.train, run, ranks))
        return
    assert settings.text is not None
    with text_loader(settings.text, plan.files, plan.tokenizer, run, run.sequence_length, ranks) as loader:
        yield cast(Loader, loader)


def _validation(settings: DistillSettings, plan: DistillPlan, ranks: Ranks) -> ValidationSet | None:
    run = settings.run
    if settings.text is not None:
        return text_validation(settings.text, plan.tokenizer, run, run.sequence_length, ranks)
    assert settings.examples is not None
    if plan.validation is None:
        return None
    return example_validation(settings.examples, plan.validation, plan.tokenizer, run, ranks)
