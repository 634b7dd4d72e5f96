"""The contract between scheduling and arithmetic: `StepBatch` and the `Backend` protocol.

A scheduler (`generation/`) decides which tokens of which sequences go through the model next and says so in a
`StepBatch`. A backend (`model/` in PyTorch, later `cpu/` with compiled kernels) owns the KV caches and does the
arithmetic. Ids belong to the scheduler, arrays to the backend; the one way back is a row of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gemma2.config import Gemma2Config

TokenIds = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """The next tokens of one sequence: a chunk of its prompt (prefill), or its last sampled token (decode)."""

    sequence_id: int
    """Names the sequence's KV cache in the backend. A new id (with `position` 0) starts an empty cache."""
    token_ids: TokenIds
    """(n,) int32, n >= 1: the tokens at positions `position` … `position` + n - 1."""
    position: int
    """Absolute position of the first token; must equal the number of tokens that the cache has seen."""
    num_logits: int
    """Of how many of the last tokens the logits are wanted: 0 … n. 1 to sample, n to score a text."""

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids)
        if num_tokens < 1:
            raise ValueError(f"sequence {self.sequence_id}: a step needs at least one token, but has none")
        if self.position < 0:
            raise ValueError(f"sequence {self.sequence_id}: position must not be negative, but is {self.position}")
        if not 0 <= self.num_logits <= num_tokens:
            raise ValueError(
                f"sequence {self.sequence_id}: num_logits must be from 0 to {num_tokens}, but is {self.num_logits}"
            )


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One forward pass: any mix of prefill chunks and decode steps, each of another sequence."""

    steps: tuple[SequenceStep, ...]

    def __post_init__(self) -> None:
        ids = [step.sequence_id for step in self.steps]
        if len(set(ids)) != len(ids):
            raise ValueError(f"a batch may hold each sequence once, but the ids are {ids}")


class Backend(Protocol):
    """What runs the model. One implementation is one set of weights on one device."""

    @property
    def config(self) -> Gemma2Config:
        """The architecture of the loaded weights."""
        ...

    @property
    def weights(self) -> str:
        """How the weights are kept: "float32", "bfloat16", "q8" or "q4"."""
        ...

    def forward(self, batch: StepBatch) -> Logits:
        """Runs one step and advances the caches of its sequences.

        Args:
            batch: what to run.

        Returns:
            (sum of num_logits, vocab_size) float32, final cap applied, in the order of `batch.steps`.

        Raises:
            ValueError: a `position` does not continue its sequence's cache, or a token id is not in the vocabulary.
        """
        ...

    def fork(self, parent_id: int, child_id: int) -> None:
        """Starts a sequence with all tokens of another one, which it then continues in its own way.

        Args:
            parent_id: a sequence with a cache.
            child_id: an id that is not known.

        Raises:
            ValueError: an id is wrong.
        """
        ...

    def free(self, sequence_id: int) -> None:
        """Forgets the sequence's cache; an id that is not known is no error, so that clean-up may run twice."""
        ...
