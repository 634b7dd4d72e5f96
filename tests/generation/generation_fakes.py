"""A small real tokenizer, and backends that need no model: their logits follow from the tokens that came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from gemma2.config import Gemma2Config
from gemma2.step import Backend, Logits, StepBatch
from gemma2.text import Tokenizer

NUM_PADDING_ROWS = 16
"""Rows of the model that are no words, as in Gemma's JAX checkpoints."""

_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
_CONTROL += [f"<unused{index}>" for index in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_TEXT = [
    "▁",
    *"abcdefghijklmnopqrstuvwxyz.,!?\n",
    "he",
    "ll",
    "hell",
    "hello",
    "▁w",
    "or",
    "▁wor",
    "ld",
    "st",
    "op",
    "é",
]


@cache
def small_tokenizer() -> Tokenizer:
    pieces = [*_CONTROL, *_BYTES, *_TEXT]
    types = [3] * len(_CONTROL) + [6] * len(_BYTES) + [1] * len(_TEXT)
    types[pieces.index("<unk>")] = 2
    return Tokenizer.from_pieces(pieces, [-float(i) for i in range(len(pieces))], types, source="small tokenizer")


def ids_of(*pieces: str) -> list[int]:
    """Token ids of exactly these pieces."""
    return [small_tokenizer().piece_to_id(piece) for piece in pieces]


def byte_ids(text: str) -> list[int]:
    """One byte token for each UTF-8 byte."""
    return ids_of(*(f"<0x{value:02X}>" for value in text.encode()))


def small_config(max_position_embeddings: int = 64) -> Gemma2Config:
    return Gemma2Config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        vocab_size=small_tokenizer().vocab_size + NUM_PADDING_ROWS,
        max_position_embeddings=max_position_embeddings,
    )


class FakeBackend(Backend):
    """Checks what `step.Backend` demands, keeps a record, and asks `logits_after` for each row.

    The rows of padding are always the likeliest, as nothing keeps a real model's padding from being so.
    """

    def __init__(self, max_position_embeddings: int = 64) -> None:
        self._config = small_config(max_position_embeddings)
        self.caches: dict[int, list[int]] = {}
        self.freed: list[int] = []
        self.batches: list[list[tuple[int, int]]] = []
        """Of each batch, the sequence id and the number of tokens of each step."""
        self.most_rows = 0
        self.fail_at: int | None = None
        """The batch, from 0, that fails half-way."""

    @property
    def config(self) -> Gemma2Config:
        return self._config

    def forward(self, batch: StepBatch) -> Logits:
        self.batches.append([(step.sequence_id, len(step.token_ids)) for step in batch.steps])
        rows: list[Logits] = []
        for index, step in enumerate(batch.steps):
            if self.fail_at == len(self.batches) - 1 and index == len(batch.steps) // 2:
                raise MemoryError("no memory for this batch")
            assert step.sequence_id not in self.freed, "an id was used again"
            assert step.token_ids.dtype == np.int32
            cache = self.caches.setdefault(step.sequence_id, [])
            if step.position != len(cache):
                raise ValueError(f"position {step.position} does not continue a cache of {len(cache)}")
            if step.position + len(step.token_ids) > self.config.max_position_embeddings:
                raise ValueError("beyond the context")
            for token_id in step.token_ids.tolist():
                assert 0 <= token_id < self.config.vocab_size
                cache.append(token_id)
            for length in range(len(cache) - step.num_logits + 1, len(cache) + 1):
                rows.append(self._row(cache[:length]))
        self.most_rows = max(self.most_rows, len(rows))
        return np.array(rows, dtype=np.float32).reshape(len(rows), self.config.vocab_size)

    def fork(self, parent_id: int, child_id: int) -> None:
        assert child_id not in self.caches and child_id not in self.freed, "an id was used again"
        self.caches[child_id] = list(self.caches[parent_id])

    def free(self, sequence_id: int) -> None:
        self.caches.pop(sequence_id, None)
        self.freed.append(sequence_id)

    def _row(self, history: list[int]) -> Logits:
        words = self.logits_after(history)
        return np.concatenate([words, np.full(NUM_PADDING_ROWS, 29.0)]).astype(np.float32)

    def logits_after(self, history: list[int]) -> Logits:
        """Random, but always the same after the same tokens."""
        rng = np.random.default_rng(history)
        return (rng.standard_normal(small_tokenizer().vocab_size) * 2).astype(np.float32)


class ScriptedBackend(FakeBackend):
    """Goes on from any prompt with the same tokens, and repeats the last of them for ever.

    Args:
        script: the tokens, or a function from the prompt's last token to them.
        num_prompt_tokens: of every prompt.
    """

    def __init__(
        self, script: Sequence[int] | Callable[[int], Sequence[int]], *, num_prompt_tokens: int = 1, context: int = 64
    ) -> None:
        super().__init__(context)
        self._script = script
        self._num_prompt_tokens = num_prompt_tokens

    def logits_after(self, history: list[int]) -> Logits:
        logits = np.zeros(small_tokenizer().vocab_size, dtype=np.float32)
        num_generated = len(history) - self._num_prompt_tokens
        if num_generated >= 0:
            script = self._script(history[self._num_prompt_tokens - 1]) if callable(self._script) else self._script
            logits[script[min(num_generated, len(script) - 1)]] = 10.0
        return logits
