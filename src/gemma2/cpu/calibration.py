"""The inputs of every matrix on some text, layer by layer: what rounding with feedback goes by.

The layers run in bfloat16, one at a time over all sequences, so only one layer's weights are in memory, and the
residual stream between two of them. What a layer computes is written out as in `gemma2.cpu.model`; only here the
inputs of its matrices are looked at on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.checkpoints import Checkpoint
from gemma2.checkpoints.packing import Progress, as_tensors, packed_pieces
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, DataError
from gemma2.quantization import packed_shapes
from gemma2.quantization.feedback import Feedback, SecondMoments
from gemma2.quantization.packing import EMBEDDING, aligned_memory, packed_sizes
from gemma2.runtime import make_runtime

Floats = npt.NDArray[np.float32]

SEQUENCE_LENGTH: Final = 512
FACTORING_TOKENS: Final = 2.5
"""What the factors of a layer's matrices cost, in tokens through that layer for each of the width's inputs."""
_FORMAT: Final = "bfloat16"
_FIRST_WORD: Final = 512
"""Ids below it are control tokens, bytes and pieces of tags."""


def random_words(config: Gemma2Config, *, num_tokens: int, bos_id: int, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    """Draws sequences of tokens for a calibration without text.

    A token's chance falls with its id as a word's falls with its rank (Zipf's law), since vocabularies are sorted so.
    It is no text, but the layers' inputs are then alike enough to text's for most of the gain.

    Args:
        config: the architecture.
        num_tokens: tokens in all, <bos> of each sequence among them.
        bos_id: the token that every sequence begins with.
        seed: the same seed draws the same tokens.
    """
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    random = np.random.default_rng(seed)
    words = np.arange(min(_FIRST_WORD, config.vocab_size // 4), config.vocab_size)
    chance = 1.0 / (words - words[0] + 32)
    drawn = random.choice(words, (max(1, num_tokens // length), length), p=chance / chance.sum()).astype(np.int32)
    drawn[:, 0] = bos_id
    return list(drawn)


def cut(
    texts: Iterable[Sequence[int]], config: Gemma2Config, *, num_tokens: int, bos_id: int
) -> list[npt.NDArray[np.int32]]:
    """Cuts texts into sequences that each begin with <bos>.

    Args:
        texts: the token ids of each, with or without <bos>; no more are taken than needed. A text gives an eighth of
            the tokens at most, so that one book is not all; more only if the others have too little.
        config: the architecture.
        num_tokens: tokens in all, about.
        bos_id: <bos>.

    Raises:
        DataError: there is no text.
    """
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    share = max(length, num_tokens // 8)
    sequences: list[npt.NDArray[np.int32]] = []
    rest: list[Sequence[int]] = []

    def add(text: Sequence[int]) -> None:
        ids = [token for token in text if token != bos_id]
        for first in range(0, len(ids), length - 1):
            sequences.append(np.array([bos_id, *ids[first : first + length - 1]], np.int32))

    for text in texts:
        add(text[:share])
        if sum(map(len, sequences)) >= num_tokens:
            break
        if sum(map(len, rest)) < num_tokens:
            rest.append(text[share : share + num_tokens])
    for text in rest:
        missing = num_tokens - sum(map(len, sequences))
        if missing > 0:
            add(text[:missing])
    if not sequences:
        raise DataError("the files to calibrate on hold no text")
    return sequences


class CalibrationRun:
    """Runs text through a model and gives out the feedback of each matrix; a `quantization.feedback.Calibration`.

    Args:
        checkpoint: the model.
        sequences: token ids, each of 1 to `SEQUENCE_LENGTH` tokens, with their <bos>.
        num_threads: threads that compute.
        progress: is told of the work that is done, and all, in tokens through a layer.

    Raises:
        ValueError: there is no sequence, or one is empty or too long.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[npt.NDArray[np.int32]],
        *,
        num_threads: int,
        progress: Progress | None = None,
    ) -> None:
        longest = max((len(ids) for ids in sequences), default=0)
        limit = min(SEQUENCE_LENGTH, checkpoint.config.max_position_embeddings)
        if not sequences or min(len(ids) for ids in sequences) == 0 or longest > limit:
            raise ValueError(f"a calibration needs sequences of 1 to {limit} tokens")
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._num_threads = num_threads
        self._runtime = make_runtime(num_threads)
        embedding = checkpoint.tensors[EMBEDDING].numpy()
        scale = float(ml_dtypes.bfloat16(self._config.hidden_size**0.5))
        self._residuals: list[Floats] = [embedding[ids].astype(np.float32) * np.float32(scale) for ids in sequences]
        self._next_layer = 0
        self._moments: dict[str, SecondMoments] = {}
        self._progress = progress
        self._factoring = int(FACTORING_TOKENS * self._config.hidden_size)
        self._work = self._config.num_hidden_layers * (sum(map(len, sequences)) + self._factoring)
        self._done = 0

    @property
    def work(self) -> int:
        """All the work there is, in tokens through a layer."""
        return self._work

    def feedback(self, name: str) -> Feedback:
        """Returns the feedback of a packed tensor's rounding; see `quantization.feedback.Calibration`.

        Raises:
            CheckpointError: the model's arithmetic overflows on the way to this tensor.
        """
        while name not in self._moments:
            if self._next_layer == self._config.num_hidden_layers:
                assert name == EMBEDDING, f"{name} is asked for too late"
                self._run_head()
            else:
                self._run_layer(self._next_layer)
                self._next_layer += 1
        try:
            feedback = self._moments.pop(name).feedback()
            if name.endswith("down_proj.weight"):  # the widest, and nearly all of it
                self._advance(self._factoring)
            return feedback
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.folder}: cannot be calibrated at {name}: {error}") from None

    def _run_layer(self, index: int) -> None:
        config, run, eps = self._config, self._runtime, self._config.rms_norm_eps
        prefix = f"model.layers.{index}."
        names = [name for name in packed_shapes(config) if name.startswith(prefix)]
        sizes = packed_sizes(config, _FORMAT)
        memory = {name: aligned_memory(sizes[name]) for name in names}
        for _ in packed_pieces(self._checkpoint, _FORMAT, num_threads=self._num_threads, names=names, memory=memory):
            pass
        tensors = as_tensors(config, memory)

        def matrix(name: str) -> kernels.Matrix:
            outputs, inputs = packed_shapes(config)[prefix + name]
            return kernels.Matrix(_FORMAT, outputs, inputs, tensors[prefix + name])

        def norm(name: str) -> Floats:
            return tensors[prefix + name].view(np.float32)

        qkv_proj, o_proj = matrix("self_attn.qkv_proj.weight"), matrix("self_attn.o_proj.weight")
        gate_up_proj, down_proj = matrix("mlp.gate_up_proj.weight"), matrix("mlp.down_proj.weight")
        inputs = {name: SecondMoments(shape[1]) for name in names if len(shape := packed_shapes(config)[name]) == 2}
        window = config.sliding_window if config.is_local(index) else 0
        for residual in self._residuals:
            length = len(residual)
            normed = kernels.Activations(_FORMAT, length, config.hidden_size)
            heads = kernels.Activations(_FORMAT, length, o_proj.inputs)
            hidden = kernels.Activations(_FORMAT, length, down_proj.inputs)
            qkv, mixed = np.empty((length, qkv_proj.outputs), np.float32), np.empty((length, o_proj.inputs), np.float32)
            queries, update = np.empty_like(mixed), np.empty_like(residual)
            gate_up = np.empty((length, gate_up_proj.outputs), np.float32)

            kernels.rms_norm(run, residual, norm("input_layernorm.weight"), eps, normed)
            inputs[prefix + "self_attn.qkv_proj.weight"].add(normed.dequantized())
            kernels.matmul(run, normed, qkv_proj, qkv)
            self._attend(qkv, queries, mixed, window)
            kernels.write_activations(run, mixed, heads)
            inputs[prefix + "self_attn.o_proj.weight"].add(heads.dequantized())
            kernels.matmul(run, heads, o_proj, update)
            post, pre = norm("post_attention_layernorm.weight"), norm("pre_feedforward_layernorm.weight")
            kernels.add_rms_norm(run, residual, update, post, eps, pre, normed)
            inputs[prefix + "mlp.gate_up_proj.weight"].add(normed.dequantized())
            kernels.matmul(run, normed, gate_up_proj, gate_up)
            kernels.geglu(run, gate_up, hidden)
            inputs[prefix + "mlp.down_proj.weight"].add(hidden.dequantized())
            kernels.matmul(run, hidden, down_proj, update)
            kernels.add_norm(run, residual, update, norm("post_feedforward_layernorm.weight"), eps)
            self._advance(length)
        self._moments.update(inputs)

    def _advance(self, work: int) -> None:
        self._done += work
        if self._progress is not None:
            self._progress(self._done, self._work)

    def _attend(self, qkv: Floats, queries: Floats, mixed: Floats, window: int) -> None:
        """Attention of one sequence, from its beginning."""
        config, run, length = self._config, self._runtime, len(qkv)
        num_blocks = -(-length // kernels.KV_BLOCK)
        size = kernels.KVCache.block_bytes("float32", config.num_key_value_heads, config.head_dim)
        memory = aligned_memory(num_blocks * size)
        cache = kernels.KVCache("float32", config.num_key_value_heads, config.head_dim, num_blocks, memory)
        table = kernels.BatchTable(
            np.array([0, length], np.int32), np.zeros(1, np.int32), np.arange(num_blocks, dtype=np.int32)[None]
        )
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        angles = np.arange(length)[:, None] * config.rope_theta**-exponents
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        kernels.append_kv(run, qkv, cos, sin, table, cache, config.query_scale, queries)
        kernels.attend(run, queries, table, cache, window, config.attn_logit_softcapping or 0.0, mixed)

    def _run_head(self) -> None:
        weight = self._checkpoint.tensors["model.norm.weight"].numpy().astype(np.float32)
        moments = SecondMoments(self._config.hidden_size)
        for residual in self._residuals:
            normed = kernels.Activations(_FORMAT, len(residual), self._config.hidden_size)
            kernels.rms_norm(self._runtime, residual, weight, self._config.rms_norm_eps, normed)
            moments.add(normed.dequantized())
        self._moments[EMBEDDING] = moments
