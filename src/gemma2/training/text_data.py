"""Documents in a run: the rows that it learns from, and what it is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gemma2.data import (
    PackedLoader,
    StreamLoader,
    ValidationSet,
    expand_files,
    iter_documents,
    tokenize_for_validation,
)
from gemma2.distributed import Ranks
from gemma2.errors import ConfigError
from gemma2.text import Tokenizer
from gemma2.training.settings import DataSettings, LoopSettings


def check_text(data: DataSettings, run: LoopSettings) -> list[Path]:
    """Looks for the files, and whether a text can be read from the first of each kind; returns those to learn from.

    Raises:
        ConfigError: a batch cannot be dealt out to the streams.
        DataError: a file is not there, or cannot be read.
    """
    if run.batch_size % data.num_streams:
        raise ConfigError(
            f"run.batch_size is {run.batch_size}, and must be a multiple of num_streams, which is {data.num_streams}"
        )
    files = expand_files(data.train)
    for names in (data.train, data.validation):
        if names:
            next(iter(iter_documents(names, text_key=data.text_key, on_error=data.on_error)))
    return files


def text_loader(
    data: DataSettings,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    run: LoopSettings,
    sequence_length: int,
    ranks: Ranks,
) -> StreamLoader:
    """The packed rows of a process; to be closed, as by `with`.

    Args:
        data: how files are read.
        files: those that are learned from.
        tokenizer: whose ids.
        run: how many rows in a batch, and the seed of their order.
        sequence_length: places in a row.
        ranks: the processes, each of which takes its rows.
    """

    def make_stream(number: int, num_streams: int, num_rows: int) -> PackedLoader:
        return PackedLoader(
            list(files),
            partial(tokenizer.encode, add_bos=False),
            sequence_length=sequence_length,
            batch_size=num_rows,
            shuffle_buffer=data.shuffle_buffer,
            seed=run.seed,
            text_key=data.text_key,
            newlines=data.newlines,
            on_error=data.on_error,
            rank=number,
            world_size=num_streams,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    return StreamLoader(
        make_stream,
        batch_size=run.batch_size,
        num_streams=data.num_streams,
        rank=ranks.data_rank,
        world_size=ranks.data,
    )


def text_validation(
    data: DataSettings, tokenizer: Tokenizer, run: LoopSettings, sequence_length: int, ranks: Ranks
) -> ValidationSet | None:
    """What a run is measured by, if the settings name files for it; the arguments are those of `text_loader`.

    Raises:
        DataError: they cannot be read.
    """
    if not data.validation:
        return None
    return tokenize_for_validation(
        data.validation,
        partial(tokenizer.encode, add_bos=False),
        sequence_length=sequence_length,
        batch_size=ranks.rows_at_once(run.batch_size, run.micro_batch_size),
        max_tokens=data.validation_max_tokens,
        text_key=data.text_key,
        newlines="keep",  # the text as it is, whatever the model is trained on
        on_error=data.on_error,
        rank=ranks.data_rank,
        world_size=ranks.data,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
