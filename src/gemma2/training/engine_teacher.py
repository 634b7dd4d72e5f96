"""A teacher on the CPU engine: its logits for the tokens of a batch, a chunk at a time, in the order of the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma2.memory.training import loss_chunk_tokens
from gemma2.step import Backend, Logits, SequenceStep, StepBatch
from gemma2.training.distillation import TeacherLogits
from gemma2.training.objectives import Batch

Ids = npt.NDArray[np.int64]


def engine_teacher(backend: Backend) -> Callable[[Batch], TeacherLogits]:
    """A teacher that runs on a backend of generation, such as the CPU engine.

    Each segment of each row is one sequence. Logits exist for a chunk of tokens at a time; places must be asked for in
    rising order, as the objective does.

    Args:
        backend: the teacher; its logits are capped.
    """

    def teacher(batch: Batch) -> TeacherLogits:
        return TeacherLogits(at=_Reader(backend, batch).at, cap=None)

    return teacher


class _Reader:
    """Goes through a batch once, from its first token to its last."""

    def __init__(self, backend: Backend, batch: Batch) -> None:
        self._device = batch.input_ids.device
        self._pieces = _logits(backend, batch.input_ids.cpu().numpy(), batch.segment_ids.cpu().numpy())
        self._first = 0
        self._rows: Logits = np.empty((0, backend.config.vocab_size), np.float32)

    def at(self, places_C: Tensor) -> Tensor:
        places = places_C.cpu().numpy()
        found = []
        start = 0
        while start < len(places):
            end = start + int(np.searchsorted(places[start:], self._first + len(self._rows)))
            if end > start:
                assert places[start] >= self._first, "places rise from call to call"
                found.append(self._rows[places[start:end] - self._first])
                start = end
            if start < len(places):
                self._first, self._rows = next(self._pieces)
        return torch.from_numpy(np.concatenate(found)).to(self._device)


def _logits(backend: Backend, input_ids_BL: Ids, segments_BL: Ids) -> Iterator[tuple[int, Logits]]:
    """Yields (place of the first, logits) of runs of tokens, in rising order; padding has none."""
    length = input_ids_BL.shape[1]
    chunk = loss_chunk_tokens(backend.config.vocab_size)
    for row, (ids, segments) in enumerate(zip(input_ids_BL, segments_BL, strict=True)):
        starts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), length]
        for begin, end in itertools.pairwise(starts):
            if segments[begin] == 0:
                continue
            try:
                for first in range(begin, end, chunk):
                    tokens = ids[first : min(first + chunk, end)].astype(np.int32)
                    step = SequenceStep(
                        sequence_id=row, token_ids=tokens, position=first - begin, num_logits=len(tokens)
                    )
                    yield row * length + first, backend.forward(StepBatch(steps=(step,)))
            finally:
                backend.free(row)
