"""Runs the PyTorch model for the scheduler: `step.Backend` on the CPU or on an accelerator."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.model.kv_cache import KVCache
from gemma2.model.modeling import Gemma2ForCausalLM, refuse_float16
from gemma2.step import Logits, SequenceStep, StepBatch

HEAD_CHUNK_LOGITS: Final = 1 << 24
"""Logits that exist on the device at once: 64 MiB in float32, 65 rows of the published vocabulary."""


class TorchBackend:
    """One set of weights with a KV cache for each sequence. Threads wait for each other.

    The sequences of a batch go through the model one after the other. So a sequence's logits are the same, bit for
    bit, whatever runs beside it; rows that share a matrix product would be summed in an order that depends on how many
    they are. The price is that each sequence reads the weights anew: several at once take as long as one by one.

    Args:
        model: float32 or bfloat16 weights. They are used as they are and may go on being trained between steps.
        device: where to run; the model is moved there. None: where it is.

    Raises:
        ValueError: the weights are float16, in which Gemma 2 overflows.
    """

    def __init__(self, model: Gemma2ForCausalLM, device: torch.device | str | None = None) -> None:
        refuse_float16(model.model.embed_tokens.weight.dtype)
        self._model = model if device is None else model.to(device)
        self._caches: dict[int, KVCache] = {}
        # Re-entrant for whoever frees a sequence in a signal's handler.
        self._lock = threading.RLock()

    @property
    def config(self) -> Gemma2Config:
        """The architecture."""
        return self._model.config

    @property
    def weights(self) -> str:
        """The dtype of the weights: "float32" or "bfloat16"."""
        return str(self._model.model.embed_tokens.weight.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight: Tensor = self._model.model.embed_tokens.weight
        return weight.device

    @property
    def cache_bytes(self) -> int:
        """Memory of all sequences' keys and values, in bytes."""
        return sum(cache.size_bytes for cache in list(self._caches.values()))

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Logits:
        """Runs one step; see `Backend.forward`. Logits are computed for the rows that were asked for, and no others.

        Raises:
            ValueError: a `position` does not continue its sequence's cache, or a token id is not in the vocabulary.
                Nothing has run then. After any other error, such as full memory, the cache of the sequence that was
                running is freed.
        """
        with self._lock:
            return self._forward(batch)

    def free(self, sequence_id: int) -> None:
        """Forgets the sequence's cache, if there is one."""
        with self._lock:
            self._caches.pop(sequence_id, None)

    def _forward(self, batch: StepBatch) -> Logits:
        for step in batch.steps:
            self._check(step)
        num_rows = sum(step.num_logits for step in batch.steps)
        logits = np.empty((num_rows, self.config.vocab_size), dtype=np.float32)
        row = 0
        for step in batch.steps:
            try:
                hidden_LD = self._advance(step)
                self._write_logits(hidden_LD[len(step.token_ids) - step.num_logits :], logits[row:])
            except BaseException:  # Ctrl-C as well: layers before the one that broke off already hold the new keys
                self.free(step.sequence_id)
                raise
            row += step.num_logits
        return logits

    def fork(self, parent_id: int, child_id: int) -> None:
        """Starts a sequence with all tokens of another one, with a copy of its keys and values.

        Raises:
            ValueError: the parent has no cache, or the child has one.
        """
        with self._lock:
            parent = self._caches.get(parent_id)
            if parent is None:
                raise ValueError(f"sequence {parent_id} is not in the cache, so it cannot be forked")
            if child_id in self._caches:
                raise ValueError(f"sequence {child_id} is in the cache already; fork to an id that is not")
            self._caches[child_id] = parent.copy()

    def _check(self, step: SequenceStep) -> None:
        cache = self._caches.get(step.sequence_id)
        num_cached = 0 if cache is None else cache.num_tokens
        if step.position != num_cached:
            raise ValueError(
                f"sequence {step.sequence_id}: position must be {num_cached}, the number of tokens that its cache has "
                f"seen, but is {step.position}"
            )
        outside = (step.token_ids < 0) | (step.token_ids >= self.config.vocab_size)
        if outside.any():
            raise ValueError(
                f"sequence {step.sequence_id}: token ids must be from 0 to {self.config.vocab_size - 1}, but one is "
                f"{step.token_ids[outside][0]}"
            )

    def _advance(self, step: SequenceStep) -> Tensor:
        """Runs the tokens through the layers: (n, D) hidden states."""
        cache = self._caches.get(step.sequence_id)
        if cache is None:
            cache = self._caches[step.sequence_id] = KVCache(self.config)
        ids = torch.from_numpy(step.token_ids.astype(np.int64)).to(self.device)
        hidden_BLD: Tensor = self._model.model(ids[None], past_key_values=cache)
        return hidden_BLD[0]

    def _write_logits(self, hidden_TD: Tensor, logits_TV: Logits) -> None:
        chunk = max(1, HEAD_CHUNK_LOGITS // self.config.vocab_size)
        for first in range(0, hidden_TD.shape[0], chunk):
            part = self._model.logits(hidden_TD[first : first + chunk])
            logits_TV[first : first + part.shape[0]] = part.float().cpu().numpy()
