"""A model that writes what a test tells it to, behind the real engine, sampler and tokenizer.

Run as a program, this is `gemma2` with that model: for tests that need a terminal. FAKE_MODEL holds the arguments of
`FakeLLM` as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np

from gemma2.api import LLM
from gemma2.config import Gemma2Config
from gemma2.step import Backend, Logits, StepBatch
from gemma2.text import Tokenizer

_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"]
_CONTROL += [f"<unused{index}>" for index in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_CHARACTERS = ["▁", "\n", *(chr(code) for code in range(0x21, 0x7F))]


@cache
def character_tokenizer() -> Tokenizer:
    """A tokenizer with one token for each ASCII character, so that a test can count them."""
    pieces = [*_CONTROL, *_BYTES, *_CHARACTERS]
    types_ = [3] * len(_CONTROL) + [6] * len(_BYTES) + [1] * len(_CHARACTERS)
    types_[pieces.index("<unk>")] = 2
    return Tokenizer.from_pieces(pieces, [-float(i) for i in range(len(pieces))], types_, source="characters")


class FakeBackend(Backend):
    """Answers the n-th prompt with the n-th of `answers`, over and over, and then <eos>.

    Args:
        answers: what to write; None for random characters, which depend on the seed.
        context: tokens that it holds.
        seconds: how long each step takes.
        fail_at: the prompt, from 0, whose logits are NaN.
        interrupt_at: the steps, from 0, at which Ctrl-C is pressed.
    """

    def __init__(
        self,
        answers: Sequence[str] | None,
        *,
        context: int,
        seconds: float,
        fail_at: int,
        interrupt_at: Collection[int],
    ) -> None:
        tokenizer = character_tokenizer()
        self._config = Gemma2Config(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=context,
        )
        self._answers = answers
        self._seconds = seconds
        self._fail_at = fail_at
        self._interrupt_at = interrupt_at
        self.num_steps = 0
        self.prompts: list[list[int]] = []
        """The token ids of each prompt."""
        self._numbers: dict[int, int] = {}
        self._lengths: dict[int, int] = {}

    @property
    def config(self) -> Gemma2Config:
        return self._config

    @property
    def weights(self) -> str:
        return "float32"

    def forward(self, batch: StepBatch) -> Logits:
        time.sleep(self._seconds)
        self.num_steps += 1
        if self.num_steps - 1 in self._interrupt_at:
            signal.raise_signal(signal.SIGINT)
        rows = []
        for step in batch.steps:
            if step.sequence_id not in self._numbers:
                self._numbers[step.sequence_id] = len(self.prompts)
                self.prompts.append([])
            number = self._numbers[step.sequence_id]
            if step.sequence_id not in self._lengths:
                self.prompts[number] += step.token_ids.tolist()
                if step.num_logits:
                    self._lengths[step.sequence_id] = step.position + len(step.token_ids)
            if step.num_logits:
                end = step.position + len(step.token_ids)
                rows += [self._logits(number, end - self._lengths[step.sequence_id])] * step.num_logits
        return np.array(rows, dtype=np.float32).reshape(len(rows), self._config.vocab_size)

    def free(self, sequence_id: int) -> None:
        self._numbers.pop(sequence_id, None)
        self._lengths.pop(sequence_id, None)

    def _logits(self, number: int, num_generated: int) -> Logits:
        tokenizer = character_tokenizer()
        logits = np.zeros(tokenizer.vocab_size, dtype=np.float32)
        if number == self._fail_at:
            logits[:] = np.nan
        elif self._answers is None:
            logits[tokenizer.encode("abcdefghijklmnopqrstuvwxyz", add_bos=False)] = 30.0
        else:
            script = tokenizer.encode(self._answers[number % len(self._answers)], add_bos=False)
            logits[script[num_generated] if num_generated < len(script) else tokenizer.eos_id] = 30.0
        return logits


class FakeLLM(LLM):
    """The real `LLM` around a `FakeBackend`.

    Args:
        answers: as for `FakeBackend`.
        is_chat_tuned: what it says of itself.
        context: as for `FakeBackend`.
        seconds: as for `FakeBackend`.
        fail_at: as for `FakeBackend`.
        interrupt_at: as for `FakeBackend`.
        stop_token_ids: what ends its texts besides <eos> and <end_of_turn>.
    """

    def __init__(
        self,
        answers: Sequence[str] | None = ("",),
        *,
        is_chat_tuned: bool = False,
        context: int = 400,
        seconds: float = 0.0,
        fail_at: int = -1,
        interrupt_at: Collection[int] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.fake_backend = FakeBackend(
            answers, context=context, seconds=seconds, fail_at=fail_at, interrupt_at=interrupt_at
        )
        super().__init__(
            self.fake_backend, character_tokenizer(), is_chat_tuned=is_chat_tuned, stop_token_ids=stop_token_ids
        )

    @property
    def prompts(self) -> list[str]:
        """The prompts so far, as text, control tokens by their names."""
        return [self.tokenizer.decode(ids, skip_control=False) for ids in self.fake_backend.prompts]


if __name__ == "__main__":
    import fcntl
    import termios

    import gemma2.api
    from gemma2.cli.main import main

    with contextlib.suppress(OSError):  # in a terminal, its Ctrl-C shall reach this process
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    fake = FakeLLM(**json.loads(os.environ["FAKE_MODEL"]))
    gemma2.api.load = lambda *args, **options: fake
    sys.exit(main())
