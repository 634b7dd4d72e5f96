"""The KV cache of the PyTorch model: keys and values of the tokens that a coming query can still see.

A global layer keeps every token. A local layer keeps a token until no coming query can see it any more: position p is
dropped once the next position is p + window or later. Keys of a chunk are appended before its queries run and dropped
after, so a chunk that is longer than the window never loses keys that its own first queries need.

Axes: B batch, S cached tokens, K key/value heads, H head size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gemma2.config import Gemma2Config

GROWTH = 256
"""Tokens by which a buffer grows beyond what is needed, so that most appends copy nothing."""


class LayerCache:
    """Keys and values of one layer, in buffers with room to grow at the end and to forget at the front."""

    def __init__(self) -> None:
        self._k_BKSH: Tensor | None = None
        self._v_BKSH: Tensor | None = None
        self._first = 0
        self._last = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens the layer holds."""
        return self._last - self._first

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers, room to grow included."""
        if self._k_BKSH is None or self._v_BKSH is None:
            return 0
        return self._k_BKSH.nbytes + self._v_BKSH.nbytes

    def append(self, k_BKLH: Tensor, v_BKLH: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, and returns all that the layer holds, as views."""
        num_new = k_BKLH.shape[2]
        if self._k_BKSH is None or self._last + num_new > self._k_BKSH.shape[2]:
            self._move_to_new_buffers(k_BKLH, num_new)
        assert self._k_BKSH is not None and self._v_BKSH is not None
        self._k_BKSH[:, :, self._last : self._last + num_new] = k_BKLH
        self._v_BKSH[:, :, self._last : self._last + num_new] = v_BKLH
        self._last += num_new
        held = slice(self._first, self._last)
        return self._k_BKSH[:, :, held], self._v_BKSH[:, :, held]

    def forget(self, num_tokens: int) -> None:
        """Drops the oldest `num_tokens` tokens; their memory is given back once it is a quarter of what is held."""
        self._first += num_tokens
        if self._first > max(GROWTH, self.num_tokens // 4):
            assert self._k_BKSH is not None
            self._move_to_new_buffers(self._k_BKSH, 0)

    def copy(self) -> LayerCache:
        """The same tokens in buffers of their own."""
        made = copy.copy(self)
        if made._k_BKSH is not None:
            made._move_to_new_buffers(made._k_BKSH, 0)
        return made

    def _move_to_new_buffers(self, like_BKLH: Tensor, num_new: int) -> None:
        num_batch, num_kv_heads, _, head_dim = like_BKLH.shape
        held = self.num_tokens
        # A quarter more than is held keeps the cost of copying a growing layer linear.
        capacity = held + num_new + max(GROWTH, held // 4 if self._first == 0 else 0)
        for name in ("_k_BKSH", "_v_BKSH"):
            old = getattr(self, name)
            new = torch.empty(
                (num_batch, num_kv_heads, capacity, head_dim), dtype=like_BKLH.dtype, device=like_BKLH.device
            )
            if old is not None:
                new[:, :, :held] = old[:, :, self._first : self._last]
            setattr(self, name, new)
        self._first, self._last = 0, held


def has_gaps(segment_ids_BS: Tensor | None) -> bool:
    """Whether in some row padding stands between tokens; (B, S) segments, 0 for padding, or None for no padding."""
    if segment_ids_BS is None:
        return False
    real_BS = segment_ids_BS != 0
    begins_BS = real_BS[:, 1:] & ~real_BS[:, :-1]
    return bool((begins_BS & real_BS[:, :-1].cummax(dim=1).values).any())


class KVCache:
    """The cache of one batch of sequences through all layers.

    Make one, pass it as `past_key_values` to every forward pass over the same sequences, each pass with the tokens
    that follow. The number of rows is set by the first pass.
    """

    def __init__(self, config: Gemma2Config) -> None:
        self.layers = tuple(LayerCache() for _ in range(config.num_hidden_layers))
        self.has_gaps = False
        """Whether padding stands between tokens of a row, as after a right-padded chunk that another one followed."""
        self._window = config.sliding_window
        self._is_local = tuple(config.is_local(index) for index in range(config.num_hidden_layers))
        # Positions and segments of every token seen, 16 bytes each: one record for all layers, of which local layers
        # hold the part from _first_local on.
        self._position_ids_BS: Tensor | None = None
        self._segment_ids_BS: Tensor | None = None
        self._first_local = 0
        self._has_segments = False

    @property
    def size_bytes(self) -> int:
        """Memory of all layers' keys and values, in bytes.

        With room to grow and what is not yet given back, a layer takes at most 1.5 times what it holds, and memory for
        2 · `GROWTH` tokens more. `Gemma2Config.kv_cache_bytes` counts what is held.
        """
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def num_tokens(self) -> int:
        """How many tokens each row has seen, padding included; local layers hold fewer."""
        return 0 if self._position_ids_BS is None else self._position_ids_BS.shape[1]

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch, or None before the first pass."""
        return None if self._position_ids_BS is None else self._position_ids_BS.shape[0]

    def copy(self) -> KVCache:
        """A cache of the same tokens; what comes after goes into one of the two only."""
        made = copy.copy(self)  # positions and segments are replaced by longer ones and never written to
        made.layers = tuple(layer.copy() for layer in self.layers)
        return made

    def last_tokens(self) -> tuple[Tensor, Tensor] | None:
        """(B, 1) segment and position of each row's last real token, 0 and -1 where there is none yet.

        None before the first pass.
        """
        if self._position_ids_BS is None or self._segment_ids_BS is None:
            return None
        index_S = torch.arange(self._segment_ids_BS.shape[1], device=self._segment_ids_BS.device)
        last_B1 = torch.where(self._segment_ids_BS != 0, index_S, 0).amax(dim=1, keepdim=True)
        segment_B1 = self._segment_ids_BS.gather(1, last_B1)
        position_B1 = self._position_ids_BS.gather(1, last_B1)
        return segment_B1, torch.where(segment_B1 == 0, -1, position_B1)

    def extend(self, position_ids_BL: Tensor, segment_ids_BL: Tensor | None) -> None:
        """Records the tokens of the coming pass; call before the layers append their keys."""
        if segment_ids_BL is None:
            segment_ids_BL = torch.ones_like(position_ids_BL)
            last = self.last_tokens() if self._has_segments else None
            if last is not None:  # the row's last document goes on; a row of padding begins its first
                segment_ids_BL = segment_ids_BL * last[0].clamp(min=1)
        else:
            self._has_segments = True
        if self._position_ids_BS is None or self._segment_ids_BS is None:
            self._position_ids_BS, self._segment_ids_BS = position_ids_BL, segment_ids_BL
        else:
            self._position_ids_BS = torch.cat([self._position_ids_BS, position_ids_BL], dim=1)
            self._segment_ids_BS = torch.cat([self._segment_ids_BS, segment_ids_BL], dim=1)
        if self._has_segments and not self.has_gaps:
            self.has_gaps = has_gaps(self._segment_ids_BS)

    def key_positions(self, *, local: bool) -> tuple[Tensor, Tensor | None]:
        """(B, S) positions and segments of the keys that layers of this kind hold, new ones included.

        The segments are None as long as no pass was given any.
        """
        assert self._position_ids_BS is not None and self._segment_ids_BS is not None
        first = self._first_local if local else 0
        segments = self._segment_ids_BS[:, first:] if self._has_segments else None
        return self._position_ids_BS[:, first:], segments

    def forget_unseen(self) -> None:
        """Drops from local layers what no coming query can see; call after the pass."""
        assert self._position_ids_BS is not None and self._segment_ids_BS is not None
        if not self._has_segments:
            # Without segments every column is one position, so arithmetic on the host is enough.
            num_unseen = max(0, self._position_ids_BS.shape[1] - (self._window - 1) - self._first_local)
        else:
            last = self.last_tokens()
            assert last is not None
            segment_B1, position_B1 = last
            distance_BS = position_B1 + 1 - self._position_ids_BS
            # A coming token continues its row's last document or starts a new one, which sees nothing that is here.
            needed_BS = (self._segment_ids_BS == segment_B1) & (segment_B1 != 0) & (distance_BS < self._window)
            needed_S = needed_BS.any(dim=0)[self._first_local :]
            indices = torch.nonzero(needed_S)
            num_unseen = int(indices[0]) if len(indices) else needed_S.shape[0]
        if num_unseen:
            for layer, is_local in zip(self.layers, self._is_local, strict=True):
                if is_local:
                    layer.forget(num_unseen)
            self._first_local += num_unseen
