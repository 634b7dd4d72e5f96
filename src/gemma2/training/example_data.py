"""Examples in a run: from the settings to tokens, to the rows that it learns from, and to what it is measured by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gemma2.data import (
    ExampleLoader,
    TokenizedExamples,
    TokenizingProgress,
    ValidationSet,
    batch_for_validation,
    tokenize_examples,
)
from gemma2.distributed import Ranks
from gemma2.text import Tokenizer
from gemma2.training.distill_settings import DistillRunSettings
from gemma2.training.tune_settings import ExampleDataSettings, TuneRunSettings

OnTokenizing = Callable[[str, TokenizingProgress], None]
"""Is told which examples ("train" or "validation") are tokenized, and how far that is."""


def read_examples(
    data: ExampleDataSettings,
    tokenizer: Tokenizer,
    sequence_length: int,
    on_tokenizing: OnTokenizing,
    *,
    with_validation: bool = True,
) -> tuple[TokenizedExamples, TokenizedExamples | None]:
    """Reads and encodes what is learned from, and what the run is measured by if the settings name files for it.

    Args:
        data: which files, and how they are read.
        tokenizer: whose ids.
        sequence_length: the most places of an example.
        on_tokenizing: see `OnTokenizing`.
        with_validation: whether the second is wanted.

    Raises:
        DataError: examples cannot be read or used.
    """

    def read(name: str, files: list[str], max_examples: int | None) -> TokenizedExamples:
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

    train = read("train", data.train, data.max_train_examples)
    if not data.validation or not with_validation:
        return train, None
    return train, read("validation", data.validation, data.max_validation_examples)


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


def example_loader(
    data: ExampleDataSettings, examples: TokenizedExamples, run: TuneRunSettings | DistillRunSettings, ranks: Ranks
) -> ExampleLoader:
    """The rows of a process, for as many epochs as the settings say: one, if they say nothing of steps either."""
    return ExampleLoader(
        examples,
        batch_size=run.batch_size // ranks.data,
        packing=data.packing,
        seed=run.seed,
        num_epochs=run.num_epochs or (1 if run.num_steps is None else None),
        rank=ranks.data_rank,
        world_size=ranks.data,
    )


def example_validation(
    data: ExampleDataSettings,
    examples: TokenizedExamples,
    tokenizer: Tokenizer,
    run: TuneRunSettings | DistillRunSettings,
    ranks: Ranks,
) -> ValidationSet:
    """What a run is measured by, of this process."""
    return batch_for_validation(
        examples,
        tokenizer,
        batch_size=ranks.rows_at_once(run.batch_size, run.micro_batch_size),
        packing=data.packing,
        rank=ranks.data_rank,
        world_size=ranks.data,
    )
