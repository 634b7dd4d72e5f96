"""Runs the CPU engine for the scheduler: `step.Backend` over packed weights."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from gemma2.checkpoints import Adapter
from gemma2.config import Gemma2Config
from gemma2.cpu.kv_blocks import KVBlocks
from gemma2.cpu.model import HEAD_CANDIDATES, MAX_ROWS, CpuModel
from gemma2.cpu.threads import resolve_num_threads
from gemma2.errors import ConfigError, nearest_name
from gemma2.quantization import PackedModel
from gemma2.runtime import make_runtime
from gemma2.step import Logits, SequenceStep, StepBatch

MEMORY_LIMIT_FILE: Final = Path("/sys/fs/cgroup/memory.max")
KV_CACHE_DTYPES: Final = ("auto", "float32", "bfloat16", "int8")


class CpuBackend:
    """One set of packed weights on the CPU, with the KV caches of its sequences. Threads wait for each other.

    Args:
        packed: the weights.
        num_threads: left out, one for each physical core (`GEMMA2_NUM_THREADS` changes that).
        isa: "auto" for the best instruction set that the processor has (`GEMMA2_ISA` changes that), or one of
            `available_isas()`.
        kv_cache: dtype of keys and values: "float32", "bfloat16", "int8", or "auto": float32 beside float32 weights,
            else bfloat16.
        kv_cache_bytes: the most memory that keys and values may take, taken as sequences grow. Left out, half of the
            memory that the machine, its container or a limit on address space leaves.
        head_candidates: words whose logits the second plane of a two-plane head refines; left out,
            `HEAD_CANDIDATES`; the vocabulary's size for all of them. Without a second plane it does nothing.
        adapter: an adapter that is added to the weights as they run.

    Raises:
        ConfigError: an argument is out of range, or names what this machine does not have.
    """

    def __init__(
        self,
        packed: PackedModel,
        *,
        num_threads: int | None = None,
        isa: str = "auto",
        kv_cache: str = "auto",
        kv_cache_bytes: int | None = None,
        head_candidates: int = HEAD_CANDIDATES,
        adapter: Adapter | None = None,
    ) -> None:
        if not _is_count(head_candidates):
            raise ConfigError(f"head_candidates must be a whole number of at least 1, but is {head_candidates!r}")
        check_kv_cache(kv_cache, kv_cache_bytes)
        if kv_cache == "auto":
            kv_cache = "float32" if packed.format == "float32" else "bfloat16"
        runtime = make_runtime(resolve_num_threads(num_threads), isa)
        self._model = CpuModel(packed, runtime, head_candidates=head_candidates, adapter=adapter)
        self._cache = KVBlocks(
            packed.config,
            kv_cache,
            capacity_bytes=_memory_bytes() // 2 if kv_cache_bytes is None else kv_cache_bytes,
            chunk_tokens=MAX_ROWS,
        )
        # A pass goes through buffers of the model's; re-entrant for whoever frees a sequence in a signal's handler.
        self._lock = threading.RLock()

    @property
    def config(self) -> Gemma2Config:
        """The architecture of the loaded weights."""
        return self._model.config

    @property
    def weights(self) -> str:
        """The format of the loaded weights."""
        return self._model.format

    @property
    def kv_cache(self) -> str:
        """The dtype of keys and values."""
        return self._cache.dtype

    @property
    def kv_cache_used_bytes(self) -> int:
        """Memory of the blocks that sequences hold now."""
        return self._cache.used_bytes

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return self._model.runtime.num_threads

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._model.runtime.isa

    def forward(self, batch: StepBatch) -> Logits:
        """Runs one step and advances the caches of its sequences; see `gemma2.step.Backend`.

        All sequences' rows go through the layers together, at most `MAX_ROWS` at a time.

        Raises:
            ValueError: a `position` does not continue its sequence's cache, or a token id is not in the vocabulary.
            KVCacheFullError: the cache cannot take so many tokens more. Its sequences are freed, as after any error.
        """
        with self._lock:
            return self._forward(batch)

    def free(self, sequence_id: int) -> None:
        """Forgets the sequence's cache, if there is one."""
        with self._lock:
            self._cache.free(sequence_id)

    def fork(self, parent_id: int, child_id: int, num_tokens: int | None = None) -> None:
        """Starts a sequence with the first tokens of another, sharing their cache until one of them writes there.

        Args:
            parent_id: a sequence that the cache holds.
            child_id: the id of the new one.
            num_tokens: how many tokens they share; left out, all.

        Raises:
            ValueError: an id is wrong, or local layers no longer hold what the next token would see.
        """
        with self._lock:
            self._cache.fork(parent_id, child_id, num_tokens)

    def _forward(self, batch: StepBatch) -> Logits:
        for step in batch.steps:
            self._check(step)
        num_rows = sum(step.num_logits for step in batch.steps)
        logits = np.empty((num_rows, self.config.vocab_size), dtype=np.float32)
        first = 0
        try:
            for part in _parts(batch.steps):
                num_rows = sum(step.num_logits for step in part)
                self._run(part, logits[first : first + num_rows])
                first += num_rows
        except BaseException:  # Ctrl-C as well: layers before the one that broke off already hold the new keys
            for step in batch.steps:
                self.free(step.sequence_id)
            raise
        return logits

    def _run(self, steps: Sequence[SequenceStep], logits: Logits) -> None:
        """Runs at most `MAX_ROWS` rows."""
        ids = [step.sequence_id for step in steps]
        lengths = [len(step.token_ids) for step in steps]
        self._cache.extend(self._model.runtime, list(zip(ids, lengths, strict=True)))
        row_starts = np.cumsum([0, *lengths], dtype=np.int32)
        self._model.forward(
            np.concatenate([step.token_ids for step in steps]).astype(np.int32, copy=False),
            np.concatenate([np.arange(step.position, step.position + len(step.token_ids)) for step in steps]),
            self._cache.kinds,
            self._cache.tables(ids, row_starts),
            np.concatenate(
                [np.arange(end - step.num_logits, end) for step, end in zip(steps, row_starts[1:], strict=True)]
            ),
            logits,
        )
        for sequence_id, length in zip(ids, lengths, strict=True):
            self._cache.advance(sequence_id, length)

    def _check(self, step: SequenceStep) -> None:
        num_cached = self._cache.num_tokens(step.sequence_id)
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


def check_kv_cache(kv_cache: str, kv_cache_bytes: int | None) -> None:
    """Checks these arguments of `CpuBackend`, for whoever has long work to do before there can be one.

    Raises:
        ConfigError: one is out of range.
    """
    if kv_cache_bytes is not None and not _is_count(kv_cache_bytes):
        raise ConfigError(f"kv_cache_bytes must be a whole number of at least 1, but is {kv_cache_bytes!r}")
    if kv_cache not in KV_CACHE_DTYPES:
        raise ConfigError(
            f"kv_cache must be one of {', '.join(KV_CACHE_DTYPES)}, but is {kv_cache!r}."
            + nearest_name(str(kv_cache), KV_CACHE_DTYPES)
        )


def _parts(steps: Sequence[SequenceStep]) -> Iterator[list[SequenceStep]]:
    """Cuts a batch into parts of at most `MAX_ROWS` rows, in order; a longer step goes on in the next part."""
    part: list[SequenceStep] = []
    room = MAX_ROWS
    for step in steps:
        start, length = 0, len(step.token_ids)
        while start < length:
            end = min(length, start + room)
            part.append(
                SequenceStep(
                    sequence_id=step.sequence_id,
                    token_ids=step.token_ids[start:end],
                    position=step.position + start,
                    num_logits=max(0, end - max(start, length - step.num_logits)),
                )
            )
            room -= end - start
            start = end
            if room == 0:
                yield part
                part, room = [], MAX_ROWS
    if part:
        yield part


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _memory_bytes() -> int:
    """The machine's memory, or less where a container (cgroup v2) or a limit on address space leaves less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        sizes.append(address_space)
    with suppress(OSError, ValueError):  # no cgroup, or "max": no limit
        sizes.append(int(MEMORY_LIMIT_FILE.read_text()))
    return min(sizes)
