"""What `gemma2 bench` measures: prefill, decode and batches of a backend, each beside what the machine could do.

A figure of speed means something only beside the machine's ceiling in the same minute, as neighbours share its memory
and its clock. So the ceilings are measured before and after every row, and a row's fraction is of the higher one.

    prefill  fraction of the dot-product peak: two operations for each weight of a matrix and token, attention not
             counted. The head is counted once, as only the last token needs it.
    decode   fraction of the read bandwidth: every weight once and the keys and values that the step's queries see.

Times are medians; so are the ceilings that they are held against (of passes as short as a step).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from gemma2.config import Gemma2Config
from gemma2.memory.running import kv_cache_bytes
from gemma2.memory.weights import layer_matrices
from gemma2.step import Backend, SequenceStep, StepBatch

CHUNK_TOKENS: Final = 512
"""Tokens of a prompt that go into the model at once."""
BATCH_PROMPT_TOKENS: Final = 32
"""Length of the prompts whose continuation is timed in batches."""
_PREFILL_SECONDS: Final = 4.0
_MOST_PREFILLS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine gave at one moment; the medians of short passes, and their best."""

    read: float
    """Bytes per second."""
    read_best: float
    dot: float
    """Operations per second; a multiply-add is two."""
    dot_best: float


class Machine(Protocol):
    """Where ceilings and memory are read; tests put a fake in its place."""

    def ceilings(self) -> Ceilings:
        """Measures the ceilings, which takes some tenths of a second."""
        ...

    def reset_peak(self) -> None:
        """Forgets the peak of memory so far, where the system allows it."""
        ...

    def peak_bytes(self) -> int:
        """The most memory that the process had in use since then; 0 where the system does not say."""
        ...


class Watcher(Protocol):
    """Who is told how far the work is."""

    def start(self, what: str, total: int) -> None:
        """A row begins, of `total` tokens or steps."""
        ...

    def advance(self, amount: int) -> None:
        """Some of them are done."""
        ...

    def finish(self, row: Row) -> None:
        """The row's result."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement."""

    kind: str
    """ "prefill", "decode" or "batch"."""
    context: int
    """Prefill: tokens of the prompt. Otherwise tokens in the cache before the first step."""
    num_tokens: int
    """Tokens of one repetition: the whole prompt, or one of each sequence."""
    seconds: tuple[float, ...]
    """Time of each repetition."""
    bytes_read: int
    """Bytes of weights and cache that one step must read; 0 for prefill."""
    operations: int
    """Operations of the matrix products of one repetition."""
    before: Ceilings
    after: Ceilings
    peak_extra_bytes: int
    """Most memory in use, less the weights and the keys and values; 0 where the system does not say."""

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.num_tokens / statistics.median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        """What the steps read."""
        return self.bytes_read / statistics.median(self.seconds)

    @property
    def operations_per_second(self) -> float:
        """What the matrix products do."""
        return self.operations / statistics.median(self.seconds)

    @property
    def fraction_of_read(self) -> float:
        """Of the read bandwidth."""
        return self.bytes_per_second / max(self.before.read, self.after.read)

    @property
    def fraction_of_dot(self) -> float:
        """Of the dot-product peak."""
        return self.operations_per_second / max(self.before.dot, self.after.dot)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to measure; lengths in tokens."""

    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    """Decode at these lengths."""
    batches: tuple[int, ...]
    decode_steps: int

    @property
    def longest(self) -> int:
        """The most tokens that one sequence gets."""
        ends = [*self.prefill, *(context + self.decode_steps for context in self.contexts)]
        if self.batches:
            ends.append(BATCH_PROMPT_TOKENS + self.decode_steps)
        return max(ends, default=0)

    def kv_bytes(self, config: Gemma2Config, kv_format: str) -> int:
        """The most that keys and values take at once."""
        one = kv_cache_bytes(config, self.longest, kv_format=kv_format)
        short = kv_cache_bytes(config, BATCH_PROMPT_TOKENS + self.decode_steps, kv_format=kv_format)
        return max(one, max(self.batches, default=0) * short)


@dataclass(kw_only=True)
class Bench:
    """Measures one backend.

    Args:
        backend: what runs; sequences 0 and on must be free.
        machine: where ceilings and memory are read.
        watcher: who is told how far it is.
        weight_bytes: of all matrices and norms, the tied head once: what each step reads.
        idle_bytes: of weights in memory of which a step reads next to nothing.
        kv_format: "float32", "bfloat16" or "int8".
        seed: of the random token ids.
    """

    backend: Backend
    machine: Machine
    watcher: Watcher
    weight_bytes: int
    idle_bytes: int = 0
    kv_format: str
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter
    _random: np.random.Generator = field(init=False)
    _length: int = field(default=0, init=False)
    """Tokens of sequence 0."""
    _most_kv_bytes: int = field(default=0, init=False)
    _ceilings: Ceilings | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)

    def run(self, work: Work) -> Iterator[Row]:
        """Yields a row after the other: lengths ascending, then batches.

        Decode at a length goes on from a prefill of that length where one is measured, and from the sequence of the
        length before where not; so the longest prompt is read once.
        """
        if not work.longest:
            return
        self._warm_up()
        for length in sorted({*work.prefill, *work.contexts}):
            if length in work.prefill:
                yield self._prefill(length)
            if length in work.contexts:
                self._extend(length)
                yield self._decode(length, work.decode_steps)
        self._free()
        for num_sequences in work.batches:
            yield self._batch(num_sequences, work.decode_steps)

    def _warm_up(self) -> None:
        """Maps all weights, wakes the threads and makes the buffers."""
        self.watcher.start("first steps", 2)
        for _ in range(2):
            self._step(16)
            self._step(1)
            self._free()
            self.watcher.advance(1)

    def _prefill(self, num_tokens: int) -> Row:
        before = self._start_row()
        seconds: list[float] = []
        while not seconds or (len(seconds) < _MOST_PREFILLS and sum(seconds) + seconds[-1] <= _PREFILL_SECONDS):
            self.watcher.start(f"prefill {num_tokens:,}", num_tokens)
            self._free()
            begin = self.clock()
            self._read_prompt(num_tokens)
            seconds.append(self.clock() - begin)
        layers, head = _matrix_weights(self.backend.config)
        return self._finish_row(
            before,
            kind="prefill",
            context=num_tokens,
            num_tokens=num_tokens,
            seconds=seconds,
            operations=2 * (layers * num_tokens + head),
        )

    def _extend(self, length: int) -> None:
        """Brings the sequence to this length."""
        if self._length > length:
            self._free()
        if self._length < length:
            self.watcher.start(f"on to {length:,} tokens", length - self._length)
            self._read_prompt(length - self._length)

    def _decode(self, context: int, num_steps: int) -> Row:
        before = self._start_row()
        self.watcher.start(f"decode at {context:,}", num_steps)
        seconds = []
        for _ in range(num_steps):
            begin = self.clock()
            self._step(1)
            seconds.append(self.clock() - begin)
            self.watcher.advance(1)
        return self._finish_row(
            before,
            kind="decode",
            context=context,
            num_tokens=1,
            seconds=seconds,
            operations=2 * sum(_matrix_weights(self.backend.config)),
            bytes_read=self.weight_bytes + self._kv_bytes(context + num_steps // 2),
        )

    def _batch(self, num_sequences: int, num_steps: int) -> Row:
        self.watcher.start(
            "1 sequence" if num_sequences == 1 else f"{num_sequences:,} sequences", num_sequences + num_steps
        )
        positions = dict.fromkeys(range(num_sequences), 0)
        for sequence_id in positions:
            self._forward({sequence_id: BATCH_PROMPT_TOKENS}, positions)
            self.watcher.advance(1)
        before = self._start_row()
        seconds = []
        for _ in range(num_steps):
            begin = self.clock()
            self._forward(dict.fromkeys(positions, 1), positions)
            seconds.append(self.clock() - begin)
            self.watcher.advance(1)
        self._most_kv_bytes = max(self._most_kv_bytes, sum(map(self._kv_bytes, positions.values())))
        for sequence_id in positions:
            self.backend.free(sequence_id)
        return self._finish_row(
            before,
            kind="batch",
            context=BATCH_PROMPT_TOKENS,
            num_tokens=num_sequences,
            seconds=seconds,
            operations=2 * num_sequences * sum(_matrix_weights(self.backend.config)),
            bytes_read=self.weight_bytes + num_sequences * self._kv_bytes(BATCH_PROMPT_TOKENS + num_steps // 2),
        )

    # -- ceilings and memory ----------------------------------------------------------------------------------------

    def _start_row(self) -> Ceilings:
        """The ceilings before a row; those after the row before, if nothing ran in between."""
        before = self._ceilings if self._ceilings is not None else self.machine.ceilings()
        self.machine.reset_peak()
        return before

    def _finish_row(
        self,
        before: Ceilings,
        *,
        kind: str,
        context: int,
        num_tokens: int,
        seconds: Sequence[float],
        operations: int,
        bytes_read: int = 0,
    ) -> Row:
        peak = self.machine.peak_bytes()
        # What a cache once took stays with the process, for the next sequence.
        known = self.weight_bytes + self.idle_bytes + self._most_kv_bytes
        after = self._ceilings = self.machine.ceilings()
        row = Row(
            kind=kind,
            context=context,
            num_tokens=num_tokens,
            seconds=tuple(seconds),
            bytes_read=bytes_read,
            operations=operations,
            before=before,
            after=after,
            peak_extra_bytes=max(0, peak - known) if peak else 0,
        )
        self.watcher.finish(row)
        return row

    # -- steps ------------------------------------------------------------------------------------------------------

    def _read_prompt(self, num_tokens: int) -> None:
        """Appends random tokens to sequence 0, in chunks; logits for the last one only."""
        for first in range(0, num_tokens, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, num_tokens - first)
            self._step(count, num_logits=int(first + count == num_tokens))
            self.watcher.advance(count)

    def _step(self, count: int, *, num_logits: int = 1) -> None:
        """Runs tokens of sequence 0."""
        positions = {0: self._length}
        self._forward({0: count}, positions, num_logits=num_logits)
        self._length = positions[0]
        self._most_kv_bytes = max(self._most_kv_bytes, self._kv_bytes(self._length))

    def _forward(self, counts: dict[int, int], positions: dict[int, int], *, num_logits: int = 1) -> None:
        """Runs so many random tokens of each sequence, and moves its position."""
        self._ceilings = None
        steps = tuple(
            SequenceStep(
                sequence_id=sequence_id,
                token_ids=self._random.integers(0, self.backend.config.vocab_size, count, dtype=np.int32),
                position=positions[sequence_id],
                num_logits=num_logits,
            )
            for sequence_id, count in counts.items()
        )
        self.backend.forward(StepBatch(steps=steps))
        for sequence_id, count in counts.items():
            positions[sequence_id] += count

    def _free(self) -> None:
        self.backend.free(0)
        self._length = 0

    def _kv_bytes(self, num_tokens: int) -> int:
        return kv_cache_bytes(self.backend.config, num_tokens, kv_format=self.kv_format)


def _matrix_weights(config: Gemma2Config) -> tuple[int, int]:
    """How many weights the matrices of all layers have, and the head."""
    layer = sum(outputs * inputs for outputs, inputs in layer_matrices(config).values())
    return config.num_hidden_layers * layer, config.vocab_size * config.hidden_size
