"""`gemma2 pretrain`: text files to a folder with a tokenizer and a Gemma 2, trained from scratch.

The run's folder holds, in the order in which they come: settings.yaml, tokenizer/, checkpoints/, log.jsonl, loss.png,
and at the end model/, a Hugging Face folder. Called again with the same settings it goes on where it was.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma2.checkpoints import TOKENIZER_FILES
from gemma2.config import Gemma2Config
from gemma2.data import PackedLoader, StreamLoader, expand_files, iter_documents, tokenize_for_validation
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import ConfigError
from gemma2.model.device import choose_device
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.text import Tokenizer, train_tokenizer
from gemma2.training.activation_checkpointing import checkpoint_layers
from gemma2.training.loop import Progress, Trainer
from gemma2.training.objectives import next_token_objective
from gemma2.training.optimizer import check_optimizer
from gemma2.training.run_folder import RunFolder
from gemma2.training.settings import DataSettings, PretrainSettings, TokenizerSettings
from gemma2.training.shared_model import new_shared, save_model

SAMPLE_PIECE_CHARACTERS = 20_000
"""A tokenizer's sample is drawn in pieces of a few pages, so that every book can be in it."""


def pretrain(
    settings: PretrainSettings,
    *,
    progress: Progress,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ONE_PROCESS,
) -> Path | None:
    """Trains, or goes on training, and returns the model's folder; None if it was stopped before the end.

    Args:
        settings: what to train, on what, for how long.
        progress: is told of steps, validations and checkpoints.
        say: is given a line for each stage.
        should_stop: asked after each step; with several processes all stop if one says so.
        ranks: the processes, all of which must call this with the same settings.

    Raises:
        ConfigError: the output folder holds a run with other settings, or the device is not there.
        DataError: the data cannot be read.
        CheckpointError: a checkpoint cannot be read or written.
    """
    device = check_settings(settings, ranks=ranks).device
    folder = RunFolder(settings.output, settings, ranks)
    with folder.locked():
        return _pretrain(settings, folder, device, progress=progress, say=say, should_stop=should_stop)


@dataclass(frozen=True, kw_only=True)
class PretrainPlan:
    """What settings come to, found out before anything is written."""

    files: list[Path]
    device: torch.device
    config: Gemma2Config
    """The architecture. Its vocabulary is the one asked for, if the tokenizer is still to be trained."""


def check_settings(settings: PretrainSettings, *, ranks: Ranks = ONE_PROCESS) -> PretrainPlan:
    """Checks what a settings file names against this machine: data, tokenizer, device, compiler, earlier runs.

    Raises:
        ConfigError: the settings do not fit each other, this machine, or the run that the output folder holds.
        DataError: a file is not there.
        TokenizerError: the tokenizer cannot be read, or has other special tokens than the model.
        CheckpointError: the output folder's newest checkpoint cannot be read.
    """
    run = settings.run
    device = ranks.device or choose_device(run.device, setting="run.device")
    ranks.check_batch(run.batch_size, run.micro_batch_size)
    check_optimizer(settings.optimizer, ranks.world_size)
    if run.batch_size % settings.data.num_streams:
        raise ConfigError(
            f"run.batch_size is {run.batch_size}, and must be a multiple of data.num_streams, which is "
            f"{settings.data.num_streams}"
        )
    files = expand_files(settings.data.train)
    if settings.data.validation:
        expand_files(settings.data.validation)
    vocab_size = settings.tokenizer.vocab_size
    if settings.tokenizer.folder is not None:
        tokenizer = Tokenizer.from_folder(settings.tokenizer.folder)
        vocab_size = tokenizer.vocab_size
        tokenizer.check_fits(settings.gemma2_config(vocab_size))
    config = settings.gemma2_config(vocab_size)
    check_split(config, ranks.tensor)
    if run.sequence_length > config.max_position_embeddings:
        raise ConfigError(
            f"run.sequence_length ({run.sequence_length}) must not pass model.max_position_embeddings "
            f"({config.max_position_embeddings})"
        )
    if run.compile and device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError(
            "run.compile needs a C++ compiler, and none is found; install g++, or set run.compile to false"
        )
    RunFolder(settings.output, settings, ranks).last_state()
    return PretrainPlan(files=files, device=device, config=config)


def _pretrain(
    settings: PretrainSettings,
    folder: RunFolder,
    device: torch.device,
    *,
    progress: Progress,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Path | None:
    run, ranks = settings.run, folder.ranks
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    output = settings.output
    state = folder.last_state()
    files = expand_files(settings.data.train)

    def find_tokenizer() -> Path:
        if state is None:  # what a run left that was stopped before its first checkpoint
            shutil.rmtree(output / "tokenizer", ignore_errors=True)
        return _tokenizer(settings.tokenizer, settings.data, files, output / "tokenizer", run.seed, say)

    tokenizer_folder = ranks.first_does(find_tokenizer)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    config = settings.gemma2_config(tokenizer.vocab_size)
    tokenizer.check_fits(config)
    folder.write_settings()
    special_ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    objective = next_token_objective(compute_dtype=dtype, compiled=run.compile)
    generator = torch.Generator(device=device).manual_seed(run.seed)
    if ranks.world_size == 1:
        model = Gemma2ForCausalLM(config, device="meta").to_empty(device=device)
        model.initialize(generator)
        checkpoint_layers(model, run.gradient_checkpointing)
    else:
        gathered = new_shared(
            config,
            ranks,
            generator=generator,
            gather_dtype=torch.bfloat16 if run.dtype == "bfloat16" else None,
            checkpointing=run.gradient_checkpointing,
        )
        model = gathered.model
        objective = gathered.around(objective)
    count = config.count_parameters()
    say(f"model: {count.total:,} parameters, {count.embedding:,} of them in the embedding; on {ranks.describe(device)}")
    validation = None
    if settings.data.validation:
        validation = tokenize_for_validation(
            settings.data.validation,
            encode,
            sequence_length=run.sequence_length,
            batch_size=run.micro_batch_size or run.batch_size // ranks.data,
            rank=ranks.data_rank,
            world_size=ranks.data,
            max_tokens=settings.data.validation_max_tokens,
            text_key=settings.data.text_key,
            newlines="keep",  # the text as it is, whatever the model was trained on
            on_error=settings.data.on_error,
            **special_ids,
        )
        say(f"validation: {validation.num_tokens:,} tokens, {validation.num_bytes:,} bytes")

    def make_stream(number: int, num_streams: int, num_rows: int) -> PackedLoader:
        return PackedLoader(
            files,
            encode,
            sequence_length=run.sequence_length,
            batch_size=num_rows,
            shuffle_buffer=settings.data.shuffle_buffer,
            seed=run.seed,
            text_key=settings.data.text_key,
            newlines=settings.data.newlines,
            on_error=settings.data.on_error,
            rank=number,
            world_size=num_streams,
            **special_ids,
        )

    with StreamLoader(
        make_stream,
        batch_size=run.batch_size,
        num_streams=settings.data.num_streams,
        rank=ranks.data_rank,
        world_size=ranks.data,
    ) as loader:
        trainer = Trainer(
            model=model,
            objective=objective,
            loader=loader,
            validation=validation,
            run=run,
            num_steps=run.num_steps,
            optimizer=settings.optimizer,
            folder=output,
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
    return save_model(
        output / "model",
        model,
        ranks,
        dtype=run.save_dtype,
        tokenizer_files=[path for name in TOKENIZER_FILES if (path := tokenizer_folder / name).is_file()],
    )


def _tokenizer(
    settings: TokenizerSettings,
    data: DataSettings,
    files: list[Path],
    folder: Path,
    seed: int,
    say: Callable[[str], None],
) -> Path:
    """The folder of the tokenizer to use; trains one if there is none yet."""
    if settings.folder is not None:
        return settings.folder
    if folder.exists():
        return folder
    say(f"tokenizer: training {settings.vocab_size:,} pieces on {settings.sample_bytes / 1e6:.0f} MB of text")
    beside = folder.with_name("tokenizer.partial")
    shutil.rmtree(beside, ignore_errors=True)
    train_tokenizer(
        _sample_texts(files, data, settings.sample_bytes, seed), vocab_size=settings.vocab_size, folder=beside
    )
    beside.replace(folder)
    return folder


def _sample_texts(files: list[Path], data: DataSettings, sample_bytes: int, seed: int) -> Iterator[str]:
    """A uniform sample of pieces of all documents (reservoir sampling), in the order of the documents."""
    num_pieces = max(1, sample_bytes // SAMPLE_PIECE_CHARACTERS)
    draw = random.Random(seed)
    kept: list[tuple[int, str]] = []
    count = 0
    for document in iter_documents(files, text_key=data.text_key, newlines=data.newlines, on_error=data.on_error):
        for first in range(0, len(document.text), SAMPLE_PIECE_CHARACTERS):
            piece = document.text[first : first + SAMPLE_PIECE_CHARACTERS]
            if len(kept) < num_pieces:
                kept.append((count, piece))
            else:
                place = draw.randrange(count + 1)
                if place < num_pieces:
                    kept[place] = (count, piece)
            count += 1
    for _, piece in sorted(kept):
        yield piece
