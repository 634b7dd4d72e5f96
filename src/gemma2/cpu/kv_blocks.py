"""The KV cache in blocks: which block of memory holds which positions of which sequence.

A sequence's positions are cut into blocks of `KV_BLOCK` tokens. A block has an id, and under that id every layer of one
kind (local or global) keeps the keys and values of those tokens. A sequence has one table for each kind: entry i is the
block of positions i · KV_BLOCK and on. So

- memory is taken a block at a time, and given back to whoever comes next, in any order;
- a local layer gives back each block that no coming query can see: 4096 positions stay, however long the text;
- two sequences with the same beginning hold the same blocks (`fork`); a block is copied when one of them writes to it.

This file counts and hands out ids; the arithmetic on blocks is the kernels'. vLLM's PagedAttention is the model of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError, KVCacheFullError

FREED: Final = -1
"""In a table: a block that a local layer has given back."""


def _zeros(num_bytes: int) -> npt.NDArray[np.uint8]:
    """(num_bytes,) zeros, for which the system gives pages as they are first written: unused room costs nothing."""
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)


class BlockPool:
    """Ids of blocks, each with a count of the tables that hold it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = np.zeros(num_blocks, dtype=np.int32)
        # Given back last, taken first: memory that was used once is used again before any that was never touched.
        self._given_back: list[int] = []
        self._first_untouched = 0

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds."""
        return self.num_blocks - self._first_untouched + len(self._given_back)

    def take(self) -> int:
        """Takes a free block."""
        assert self.num_free > 0
        if self._given_back:
            block = self._given_back.pop()
        else:
            block = self._first_untouched
            self._first_untouched += 1
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Notes one more table that holds a block."""
        assert self._holders[block] > 0
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """Notes that one table no longer holds a block."""
        assert self._holders[block] > 0
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._given_back.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether more than one table holds a block."""
        return bool(self._holders[block] > 1)


@dataclass
class BlockTable:
    """One sequence's blocks of one kind of layer."""

    blocks: npt.NDArray[np.int32]
    """(n,) block ids, `FREED` where given back; with room beyond what is held."""
    num_freed: int = 0
    """Entries at the beginning that were given back."""
    num_held: int = 0
    """Entries from the beginning in use, those given back included."""

    def append(self, block: int) -> None:
        """Adds the block of the next `KV_BLOCK` positions."""
        if self.num_held == len(self.blocks):
            self.blocks = np.concatenate([self.blocks, np.full(len(self.blocks), FREED, dtype=np.int32)])
        self.blocks[self.num_held] = block
        self.num_held += 1


class LayerCaches:
    """The layers of one kind: their memory, their pool of blocks, and how far their queries see."""

    def __init__(self, config: Gemma2Config, dtype: str, layers: Sequence[int], window: int, num_blocks: int) -> None:
        self.window = window
        """Tokens that a query sees, itself included; 0 for all."""
        self.pool = BlockPool(num_blocks)
        block_bytes = kernels.KVCache.block_bytes(dtype, config.num_key_value_heads, config.head_dim)
        self.layers: dict[int, kernels.KVCache] = {
            layer: kernels.KVCache(
                dtype,
                config.num_key_value_heads,
                config.head_dim,
                num_blocks,
                _zeros(num_blocks * block_bytes),
            )
            for layer in layers
        }
        self.token_bytes = len(self.layers) * block_bytes // kernels.KV_BLOCK

    def num_blocks_to_add(self, table: BlockTable, position: int, num_tokens: int) -> int:
        """How many blocks the tokens from `position` on need beyond those held, a copied one included."""
        num_new = -(-(position + num_tokens) // kernels.KV_BLOCK) - table.num_held
        writes_into_shared = position % kernels.KV_BLOCK and self.pool.is_shared(int(table.blocks[table.num_held - 1]))
        return num_new + bool(writes_into_shared)

    def extend(self, runtime: kernels.Runtime, table: BlockTable, position: int, num_tokens: int) -> None:
        """Adds blocks for the tokens from `position` on; a shared block that they write into is copied first."""
        if position % kernels.KV_BLOCK:
            last = int(table.blocks[table.num_held - 1])
            if self.pool.is_shared(last):
                copy = self.pool.take()
                for cache in self.layers.values():
                    kernels.copy_block(runtime, cache, last, copy)
                table.blocks[table.num_held - 1] = copy
                self.pool.release(last)
        for _ in range(-(-(position + num_tokens) // kernels.KV_BLOCK) - table.num_held):
            table.append(self.pool.take())

    def free_unseen(self, table: BlockTable, next_position: int) -> None:
        """Gives back the blocks that no query at `next_position` or later can see."""
        if self.window == 0:
            return
        first_seen = max(0, next_position - self.window + 1) // kernels.KV_BLOCK
        for index in range(table.num_freed, min(first_seen, table.num_held)):
            self.pool.release(int(table.blocks[index]))
            table.blocks[index] = FREED
            table.num_freed = index + 1

    def free(self, table: BlockTable) -> None:
        """Gives back all blocks of a sequence."""
        for index in range(table.num_freed, table.num_held):
            self.pool.release(int(table.blocks[index]))
        table.num_freed = table.num_held = 0

    def share(self, table: BlockTable, num_tokens: int) -> BlockTable:
        """A table that holds the same blocks, as far as the first `num_tokens` positions go."""
        num_held = -(-num_tokens // kernels.KV_BLOCK)
        blocks = np.full(max(len(table.blocks), 1), FREED, dtype=np.int32)
        blocks[:num_held] = table.blocks[:num_held]
        for block in blocks[table.num_freed : num_held]:
            self.pool.hold(int(block))
        return BlockTable(blocks, num_freed=min(table.num_freed, num_held), num_held=num_held)


@dataclass
class CachedSequence:
    """A sequence that the cache holds."""

    num_tokens: int = 0
    """Tokens that it has seen."""
    tables: list[BlockTable] = field(default_factory=list)
    """One for each kind of layer, in the order of `KVBlocks.kinds`."""


class KVBlocks:
    """The KV caches of all sequences of one model.

    Args:
        config: the architecture.
        dtype: "float32", "bfloat16" or "int8".
        capacity_bytes: the most memory that keys and values may take; it is taken as sequences grow. At least one
            sequence of the context's length always fits.
        chunk_tokens: the most tokens of a sequence in one forward pass; a local layer holds so many beyond its window.

    Raises:
        ConfigError: the system has no room for a cache of this capacity.
    """

    def __init__(self, config: Gemma2Config, dtype: str, *, capacity_bytes: int, chunk_tokens: int) -> None:
        block = kernels.KV_BLOCK
        context = config.max_position_embeddings
        local = [index for index in range(config.num_hidden_layers) if config.is_local(index)]
        full = [index for index in range(config.num_hidden_layers) if not config.is_local(index)]
        blocks_of_one = {
            0: -(-context // block),
            config.sliding_window: -(-min(context, config.sliding_window + chunk_tokens) // block) + 1,
        }
        block_bytes = kernels.KVCache.block_bytes(dtype, config.num_key_value_heads, config.head_dim)
        sequence_bytes = block_bytes * (
            len(full) * blocks_of_one[0] + len(local) * blocks_of_one[config.sliding_window]
        )
        num_sequences = max(1, capacity_bytes // sequence_bytes)
        self.dtype = dtype
        try:
            self.kinds = [
                LayerCaches(config, dtype, layers, window, num_sequences * blocks_of_one[window])
                for layers, window in ((local, config.sliding_window), (full, 0))
                if layers
            ]
        except (OSError, MemoryError, OverflowError, ValueError) as error:  # a size beyond the system's, or any array's
            raise ConfigError(
                f"a KV cache of {num_sequences * sequence_bytes} bytes cannot be had: {error}; give it fewer "
                "(kv_cache_bytes), or the model a shorter context (max_position_embeddings)"
            ) from None
        self._sequences: dict[int, CachedSequence] = {}

    def num_tokens(self, sequence_id: int) -> int:
        """How many tokens a sequence has seen; 0 for one that is not known."""
        sequence = self._sequences.get(sequence_id)
        return 0 if sequence is None else sequence.num_tokens

    @property
    def used_bytes(self) -> int:
        """Memory of the blocks that sequences hold; a shared block counts once."""
        return sum(
            (kind.pool.num_blocks - kind.pool.num_free) * kernels.KV_BLOCK * kind.token_bytes for kind in self.kinds
        )

    def extend(self, runtime: kernels.Runtime, lengths: Sequence[tuple[int, int]]) -> None:
        """Makes room for so many more tokens of each sequence, or changes nothing.

        Args:
            runtime: runs the copies of shared blocks.
            lengths: (sequence id, number of tokens).

        Raises:
            KVCacheFullError: there are not enough free blocks.
        """
        sequences = [(self._sequences.get(sequence_id) or self._new_sequence(), n) for sequence_id, n in lengths]
        for index, kind in enumerate(self.kinds):
            needed = sum(kind.num_blocks_to_add(s.tables[index], s.num_tokens, n) for s, n in sequences)
            if needed > kind.pool.num_free:
                raise KVCacheFullError(
                    f"the KV cache has {kind.pool.num_free} of {kind.pool.num_blocks} blocks of {kernels.KV_BLOCK} "
                    f"tokens free, but this step needs {needed}; run fewer or shorter sequences at once, or give the "
                    "cache more memory (kv_cache_bytes)"
                )
        for (sequence_id, _), (sequence, num_tokens) in zip(lengths, sequences, strict=True):
            self._sequences[sequence_id] = sequence  # known before it holds anything: Ctrl-C must not lose its blocks
            for kind, table in zip(self.kinds, sequence.tables, strict=True):
                kind.extend(runtime, table, sequence.num_tokens, num_tokens)

    def tables(self, sequence_ids: Sequence[int], row_starts: npt.NDArray[np.int32]) -> list[kernels.BatchTable]:
        """What the kernels need to find the rows' keys: one table for each kind, as of before the step's tokens."""
        sequences = [self._sequences[sequence_id] for sequence_id in sequence_ids]
        positions = np.array([sequence.num_tokens for sequence in sequences], dtype=np.int32)
        made = []
        for index in range(len(self.kinds)):
            tables = [sequence.tables[index] for sequence in sequences]
            blocks = np.full((len(tables), max(table.num_held for table in tables)), FREED, dtype=np.int32)
            for row, table in zip(blocks, tables, strict=True):
                row[: table.num_held] = table.blocks[: table.num_held]
            made.append(kernels.BatchTable(row_starts, positions, blocks))
        return made

    def advance(self, sequence_id: int, num_tokens: int) -> None:
        """Notes that tokens went through all layers, and gives back what no coming query can see."""
        sequence = self._sequences[sequence_id]
        sequence.num_tokens += num_tokens
        for kind, table in zip(self.kinds, sequence.tables, strict=True):
            kind.free_unseen(table, sequence.num_tokens)

    def fork(self, parent_id: int, child_id: int, num_tokens: int | None = None) -> None:
        """Starts a sequence with the first tokens of another one, sharing its blocks.

        Args:
            parent_id: a sequence that is known.
            child_id: a sequence that is not.
            num_tokens: how many tokens they share; left out, all. If local layers have given back positions that the
                next token would see, fewer than all cannot be shared.

        Raises:
            ValueError: an id is wrong, or so many tokens cannot be shared.
        """
        parent = self._sequences.get(parent_id)
        if parent is None:
            raise ValueError(f"sequence {parent_id} is not in the cache, so it cannot be forked")
        if child_id in self._sequences:
            raise ValueError(f"sequence {child_id} is in the cache already; fork to an id that is not")
        length = parent.num_tokens if num_tokens is None else num_tokens
        if not 1 <= length <= parent.num_tokens:
            raise ValueError(f"sequence {parent_id} has {parent.num_tokens} tokens, so {length} cannot be shared")
        for kind, table in zip(self.kinds, parent.tables, strict=True):
            first_seen = max(0, length - kind.window + 1) // kernels.KV_BLOCK if kind.window else 0
            if first_seen < table.num_freed:
                raise ValueError(
                    f"the first {length} tokens of sequence {parent_id} cannot be shared: local layers have given back "
                    f"positions below {table.num_freed * kernels.KV_BLOCK}, which the next token would see"
                )
        tables = [kind.share(table, length) for kind, table in zip(self.kinds, parent.tables, strict=True)]
        self._sequences[child_id] = CachedSequence(num_tokens=length, tables=tables)

    def free(self, sequence_id: int) -> None:
        """Gives back all blocks of a sequence, if it is known."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            for kind, table in zip(self.kinds, sequence.tables, strict=True):
                kind.free(table)

    def _new_sequence(self) -> CachedSequence:
        empty: Any = [BlockTable(np.full(8, FREED, dtype=np.int32)) for _ in self.kinds]
        return CachedSequence(tables=empty)
