"""A fixed list of batches of examples to measure a model by."""

from __future__ import annotations

import numpy as np

from gemma2.data.example_loader import ExampleLoader
from gemma2.data.tokenized import TokenizedExamples
from gemma2.data.validation import ValidationSet
from gemma2.text.tokenizer import Tokenizer


def batch_for_validation(
    examples: TokenizedExamples,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    packing: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> ValidationSet:
    """Puts examples into batches in the order of the files, the same each time.

    Args:
        examples: from `tokenize_examples`.
        tokenizer: that made them.
        batch_size: B, rows of this process in a batch; the last batch is filled up with rows of padding.
        packing: as for `ExampleLoader`.
        rank: this process among `world_size`.
        world_size: how many processes share the batches.

    Returns:
        This process's batches, with the numbers of all processes: labels, examples (a pair is one), and the UTF-8
        bytes of the text that is trained, to which control tokens add none.

    Raises:
        DataError: a setting is out of range.
    """
    loader = ExampleLoader(
        examples,
        batch_size=batch_size,
        packing=packing,
        shuffle=False,
        num_epochs=1,
        rank=rank,
        world_size=world_size,
    )
    return ValidationSet(
        batches=tuple(loader),
        num_bytes=_count_bytes(examples, tokenizer),
        num_tokens=int(examples.num_trained.sum()),
        num_documents=len(examples),
    )


def _count_bytes(examples: TokenizedExamples, tokenizer: Tokenizer) -> int:
    """The UTF-8 bytes that the trained tokens write. A token of one byte of a character counts as one."""
    ids, counts = np.unique(examples.trained_tokens, return_counts=True)
    num_bytes = 0
    for token_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if not tokenizer.is_control(token_id):
            text = tokenizer.token_text(token_id)
            num_bytes += count * len(text if isinstance(text, bytes) else text.encode())
    return num_bytes
