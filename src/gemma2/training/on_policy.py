"""Batches whose trained tokens the student writes itself (on-policy distillation, arXiv 2306.13649; the report, section
4): it then learns what the teacher would have said where the student really gets to.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gemma2.data import IGNORED_LABEL, PackedBatch
from gemma2.generation import Engine
from gemma2.model import Gemma2ForCausalLM, TorchBackend
from gemma2.sampling import SamplingParams
from gemma2.text import Tokenizer
from gemma2.training.distill_settings import OnPolicySettings
from gemma2.training.loop import Loader

Ids = npt.NDArray[np.int64]


class OnPolicyLoader:
    """Wraps a loader, and lets the student rewrite what its batches train.

    A segment's prompt is what comes before its first trained token, or, in a text of which all is trained, its first
    tokens. What the student samples after it takes the place of the rest: up to the next segment, or up to the end of
    the row after the last one. Draws depend on the seed and the number of the batch alone, so a resumed run samples
    the same.

    Args:
        loader: gives the batches.
        student: the model that is trained; it samples with the weights that it has when a batch is asked for.
        tokenizer: the student's.
        settings: how often and how.
        seed: of the draws.
    """

    def __init__(
        self, loader: Loader, student: Gemma2ForCausalLM, tokenizer: Tokenizer, settings: OnPolicySettings, *, seed: int
    ) -> None:
        self._loader = loader
        self._student = student
        self._engine = Engine(TorchBackend(student), tokenizer)
        self._context = student.config.max_position_embeddings
        self._settings = settings
        self._seed = seed
        self._count = 0

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        packed = next(self._loader)
        self._count += 1
        draw = random.Random(f"{self._seed} {self._count}")
        return self._sampled(packed, draw) if draw.random() < self._settings.fraction else packed

    def state_dict(self) -> dict[str, Any]:
        """The wrapped loader's state and the number of batches."""
        return {**self._loader.state_dict(), "on_policy_batches": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        self._count = int(state["on_policy_batches"])
        self._loader.load_state_dict({name: value for name, value in state.items() if name != "on_policy_batches"})

    def _sampled(self, packed: PackedBatch, draw: random.Random) -> PackedBatch:
        places = [
            (row, first, end, room_end)
            for row in range(len(packed.input_ids))
            for first, end, room_end in _segments(packed.segment_ids[row])
        ]
        prompts, params, kept = [], [], []
        for row, first, end, room_end in places:
            prompt = packed.input_ids[row, first : first + self._prompt_length(packed.labels[row, first:end])]
            # The last token is a label alone, unless the row is as long as the context, which the engine does not pass.
            room = min(room_end - first + 1, self._context) - len(prompt)
            if room < 1 or len(prompt) == 0:
                continue
            prompts.append(prompt.tolist())
            params.append(
                SamplingParams(
                    max_tokens=room,
                    temperature=self._settings.temperature,
                    top_p=self._settings.top_p,
                    seed=draw.getrandbits(62),
                )
            )
            kept.append((row, first, room_end))
        was_training = self._student.training
        self._student.eval()
        with torch.no_grad():
            completions = self._engine.generate(prompts, params)
        self._student.train(was_training)
        input_ids, labels = packed.input_ids.copy(), np.full_like(packed.labels, IGNORED_LABEL)
        positions, segment_ids = packed.positions.copy(), packed.segment_ids.copy()
        for (row, first, room_end), prompt_ids, completion in zip(kept, prompts, completions, strict=True):
            segment = segment_ids[row, first]
            sequence = [*prompt_ids, *completion.token_ids]
            length = len(sequence) - 1
            input_ids[row, first:room_end] = packed.input_ids[row, first]  # overwritten, or padding below
            input_ids[row, first : first + length] = sequence[:-1]
            labels[row, first + len(prompt_ids) - 1 : first + length] = completion.token_ids
            positions[row, first:room_end] = 0
            positions[row, first : first + length] = np.arange(length)
            segment_ids[row, first:room_end] = 0
            segment_ids[row, first : first + length] = segment
        return PackedBatch(input_ids=input_ids, labels=labels, positions=positions, segment_ids=segment_ids)

    def _prompt_length(self, labels: Ids) -> int:
        """Tokens of the prompt: those that are read before the first trained one, <bos> among them."""
        trained = np.flatnonzero(labels != IGNORED_LABEL)
        if not len(trained):
            return 0
        before = int(trained[0]) + 1
        return before if before > 1 else min(self._settings.prompt_tokens, len(labels))


def _segments(segment_ids: Ids) -> list[tuple[int, int, int]]:
    """(first place, end, end of the room that it may take) of each segment of a row."""
    length = len(segment_ids)
    starts = [0, *(np.flatnonzero(np.diff(segment_ids)) + 1).tolist(), length]
    found = [(a, b) for a, b in itertools.pairwise(starts) if segment_ids[a] != 0]
    ends = [first for first, _ in found[1:]] + [length]
    return [(first, end, room_end) for (first, end), room_end in zip(found, ends, strict=True)]
