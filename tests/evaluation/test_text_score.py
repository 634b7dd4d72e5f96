"""The sliding window: every token once, <bos> first, context before it; bits per byte from known probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError
from gemma2.evaluation import SlidingWindow, TextScore, Window, encode_text, score_texts, score_windows
from gemma2.step import Backend, Logits, StepBatch

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
    source = "bytes"

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [2] * add_bos + [byte + 10 for byte in text.encode()]

    def token_text(self, token_id: int) -> bytes:
        return bytes([token_id - 10])


class Recorder(Backend):
    """A model that gives four tokens a quarter each, and remembers what it was asked."""

    config = CONFIG

    def __init__(self) -> None:
        self.sequences: dict[int, list[int]] = {}
        self.num_logits: dict[int, int] = {}
        self.cached: set[int] = set()

    def forward(self, batch: StepBatch) -> Logits:
        for step in batch.steps:
            tokens = self.sequences.setdefault(step.sequence_id, [])
            assert step.position == len(tokens)
            tokens += step.token_ids.tolist()
            assert len(tokens) <= CONFIG.max_position_embeddings
            self.num_logits[step.sequence_id] = self.num_logits.get(step.sequence_id, 0) + step.num_logits
            self.cached.add(step.sequence_id)
        logits = np.full((sum(step.num_logits for step in batch.steps), 300), -1e9, dtype=np.float32)
        logits[:, 10:14] = 0.0  # four likely bytes, a quarter each
        return logits

    def free(self, sequence_id: int) -> None:
        self.cached.discard(sequence_id)

    @property
    def windows(self) -> list[tuple[list[int], int]]:
        """What was read in each, and of how many tokens the next one was judged."""
        return [(tokens, self.num_logits[sequence_id]) for sequence_id, tokens in self.sequences.items()]


def _score(text: list[str], **kwargs: Any) -> tuple[Recorder, TextScore]:
    backend = Recorder()
    return backend, score_texts(backend, Bytes(), text, **kwargs)  # type: ignore[arg-type]


def test_bits_per_byte_and_perplexity() -> None:
    backend, score = _score(["\x00\x01\x02\x03" * 6])
    assert score.num_tokens == score.num_bytes == 24
    assert score.bits_per_byte == pytest.approx(2.0)
    assert score.perplexity == pytest.approx(4.0)
    assert score.nats == pytest.approx(24 * math.log(4))
    assert backend.windows and backend.cached == set()


@pytest.mark.parametrize("length", [0, 1, 4, 9, 10, 11, 14, 15, 16, 37])
@pytest.mark.parametrize("stride", [1, 3, 5, 10])
def test_every_token_is_scored_once_with_the_context_that_is_promised(length: int, stride: int) -> None:
    seen: list[int] = []
    for window in SlidingWindow.fit(CONFIG, stride=stride).windows(length):
        assert window.last - window.first <= 10
        for index in range(window.first_scored, window.last):
            before = index - window.first
            assert before == index if index < 10 else before >= 10 - stride
            seen.append(index)
    assert seen == list(range(length))


@pytest.mark.parametrize("length", [1, 9, 10, 11, 16, 37])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_the_model_reads_what_the_windows_say(length: int, stride: int) -> None:
    text = "".join(chr(index % 4) for index in range(length))
    backend, score = _score([text], stride=stride)
    assert score.num_tokens == score.num_bytes == length
    assert sum(num_logits for _, num_logits in backend.windows) == length
    for inputs, num_logits in backend.windows:
        assert inputs[0] == 2 and 2 not in inputs[1:] and num_logits <= len(inputs) <= 10


def test_windows_join() -> None:
    backend, _ = _score(["\x00\x01\x02\x03\x00\x01\x02\x03\x00\x01\x02\x03"], stride=2)
    assert backend.windows == [
        ([2, 10, 11, 12, 13, 10, 11, 12, 13, 10], 10),
        ([2, 12, 13, 10, 11, 12, 13, 10, 11, 12], 2),
    ]


def test_a_stride_of_the_whole_context_does_not_overlap() -> None:
    windows = list(SlidingWindow(context=4, stride=4).windows(10))
    assert windows == [
        Window(first=0, first_scored=0, last=4),
        Window(first=4, first_scored=4, last=8),
        Window(first=8, first_scored=8, last=10),
    ]


def test_texts_are_apart_and_empty_ones_count_for_nothing() -> None:
    backend, score = _score(["\x00\x01", "", "\x02"])
    assert [inputs for inputs, _ in backend.windows] == [[2, 10], [2]]
    assert score.num_tokens == 3


def test_windows_tell_whose_they_are_and_how_many_bytes() -> None:
    texts = [encode_text(Bytes(), text) for text in ("\x00" * 13, "\x01", "\x02" * 9)]  # type: ignore[arg-type]
    backend = Recorder()
    windows = SlidingWindow.fit(CONFIG, stride=5)
    scores = list(score_windows(backend, Bytes(), texts, windows))  # type: ignore[arg-type]
    assert [(number, score.num_tokens, score.num_bytes) for number, score in scores] == [
        (0, 10, 10),
        (0, 3, 3),
        (1, 1, 1),
        (2, 9, 9),
    ]
    assert sum((score for _, score in scores), TextScore()).bits_per_byte == pytest.approx(2.0)


@pytest.mark.parametrize(("kwargs", "match"), [({"context": 11}, "from 2 to 10"), ({"stride": 0}, "stride must be")])
def test_refuses(kwargs: dict[str, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _score(["a"], **kwargs)


def test_refuses_nothing_at_all() -> None:
    with pytest.raises(ValueError, match="no text to score"):
        _score(["", ""])


def test_a_score_of_nothing_is_no_number() -> None:
    assert math.isnan(TextScore().perplexity) and math.isnan(TextScore().bits_per_byte)
    assert TextScore(nats=1e6, num_tokens=1, num_bytes=1).perplexity == math.inf
