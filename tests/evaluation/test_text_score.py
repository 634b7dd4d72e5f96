"""The sliding window: every token once, <bos> first, context before it; bits per byte from known probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gemma2.config import Gemma2Config
from gemma2.evaluation import score_texts
from gemma2.step import Logits, StepBatch

CONFIG = Gemma2Config(
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
    query_pre_attn_scalar=4,
    vocab_size=300,
    max_position_embeddings=10,
)


class Bytes:
    """A tokenizer whose tokens are bytes + 10."""

    bos_id = 2
    vocab_size = 300

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [2] * add_bos + [byte + 10 for byte in text.encode()]


class Recorder:
    """A model that gives four tokens a quarter each, and remembers what it was asked."""

    config = CONFIG

    def __init__(self) -> None:
        self.windows: list[tuple[list[int], int]] = []
        self.freed: list[int] = []

    def forward(self, batch: StepBatch) -> Logits:
        (step,) = batch.steps
        assert step.position == 0 and step.token_ids[0] == 2
        assert len(step.token_ids) <= CONFIG.max_position_embeddings
        self.windows.append((list(step.token_ids), step.num_logits))
        logits = np.full((step.num_logits, 300), -1e9, dtype=np.float32)
        logits[:, 10:14] = 0.0  # four likely bytes, a quarter each
        return logits

    def free(self, sequence_id: int) -> None:
        self.freed.append(sequence_id)


def _score(text: list[str], **kwargs: Any) -> Any:
    backend = Recorder()
    return backend, score_texts(backend, Bytes(), text, **kwargs)  # type: ignore[arg-type]


def test_bits_per_byte_and_perplexity() -> None:
    backend, score = _score(["\x00\x01\x02\x03" * 6])
    assert score.num_tokens == score.num_bytes == 24
    assert score.bits_per_byte == pytest.approx(2.0)
    assert score.perplexity == pytest.approx(4.0)
    assert score.nats == pytest.approx(24 * math.log(4))
    assert len(backend.freed) == len(backend.windows)


@pytest.mark.parametrize("length", [1, 4, 9, 10, 11, 14, 15, 16, 37])
@pytest.mark.parametrize("stride", [1, 3, 5, 10])
def test_every_token_is_scored_once_with_enough_context(length: int, stride: int) -> None:
    text = "".join(chr(index % 4) for index in range(length))
    backend, score = _score([text], stride=stride)
    assert score.num_tokens == score.num_bytes == length
    assert sum(num_logits for _, num_logits in backend.windows) == length
    for inputs, num_logits in backend.windows[1:]:
        assert len(inputs) == 10 and num_logits <= stride


def test_windows_join() -> None:
    backend, _ = _score(["\x00\x01\x02\x03\x00\x01\x02\x03\x00\x01\x02\x03"], stride=2)
    assert backend.windows == [
        ([2, 10, 11, 12, 13, 10, 11, 12, 13, 10], 10),
        ([2, 12, 13, 10, 11, 12, 13, 10, 11, 12], 2),
    ]


def test_texts_are_apart_and_empty_ones_count_for_nothing() -> None:
    backend, score = _score(["\x00\x01", "", "\x02"])
    assert [inputs for inputs, _ in backend.windows] == [[2, 10], [2]]
    assert score.num_tokens == 3


@pytest.mark.parametrize(("kwargs", "match"), [({"context": 11}, "from 2 to 10"), ({"stride": 0}, "stride must be")])
def test_refuses(kwargs: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _score(["a"], **kwargs)


def test_refuses_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="no text to score"):
        _score(["", ""])
