"""`gemma2 pretrain`: text files to a folder with a tokenizer and a Gemma 2, trained from scratch.

The run's folder holds, in the order in which they come: settings.yaml, tokenizer/, checkpoints/, log.jsonl, loss.png,
and at the end model/, a Hugging Face folder. Called again with the same settings it goes on where it was.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma2.checkpoints import TOKENIZER_FILES
from gemma2.config import Gemma2Config
from gemma2.data import expand_files, iter_documents
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.tensor_parallel import check_split
from gemma2.errors import ConfigError
from gemma2.model.loading import DTYPES
from gemma2.text import Tokenizer, train_tokenizer
from gemma2.training.loop import Progress, Trainer
from gemma2.training.objectives import next_token_objective
from gemma2.training.run_folder import RunFolder
from gemma2.training.run_stages import check_layers, check_machine, resume_and_train, use_threads
from gemma2.training.settings import DataSettings, PretrainSettings, TokenizerSettings
from gemma2.training.shared_model import save_model
from gemma2.training.text_data import check_text, text_loader, text_validation
from gemma2.training.trained_model import new_model

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
    device = check_machine(run, settings.optimizer, ranks)
    files = check_text(settings.data, run)
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
    check_layers(config, run)
    RunFolder(settings.output, settings, ranks).check()
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
    use_threads(run)
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
    trained = new_model(config, run, ranks, device)
    objective = next_token_objective(compute_dtype=DTYPES[run.dtype], compiled=run.compile)
    count = config.count_parameters()
    say(f"model: {count.total:,} parameters, {count.embedding:,} of them in the embedding; on {ranks.describe(device)}")
    validation = text_validation(settings.data, tokenizer, run, run.sequence_length, ranks)
    if validation is not None:
        say(f"validation: {validation.num_tokens:,} tokens, {validation.num_bytes:,} bytes")

    with text_loader(settings.data, files, tokenizer, run, run.sequence_length, ranks) as loader:
        trainer = Trainer(
            model=trained.model,
            objective=trained.around(objective),
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
        result = resume_and_train(trainer, state, say=say, should_stop=should_stop)
    if not trainer.is_done:
        return None
    if result is not None:
        say(f"validation: perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte")
    return save_model(
        output / "model",
        trained.model,
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
