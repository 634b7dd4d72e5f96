"""The forward pass of Gemma 2 on the CPU: numpy buffers and compiled kernels, in the order of the report.

It computes what `gemma2.model` computes, and may be read beside it. What differs is where numbers live: the rows of
all sequences of a step stand under each other in buffers that are made once; matrices that read the same input are one
(`qkv_proj`, `gate_up_proj`); and what goes into a matrix product is written by the kernel before it in the form that
the product reads, int8 with a scale for each 64 values where weights have 8 or 4 bits.

The residual stream, norms, scores and sums are float32. A row's result depends neither on the other rows of the step,
nor on how its text was cut into chunks, nor on the number of threads, bit for bit: every kernel sees to that.

Axes: T rows (tokens of all sequences of a step), D width, N query heads, K key/value heads, H head size, I MLP width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.checkpoints import Adapter, expected_tensors
from gemma2.config import Gemma2Config
from gemma2.cpu.kv_blocks import LayerCaches
from gemma2.cpu.low_rank import LowRankMap
from gemma2.quantization import SECOND_PLANE, PackedModel, packed_shapes
from gemma2.quantization.packing import packed_parts
from gemma2.step import Logits, TokenIds

MAX_ROWS: Final = 512
"""Rows that go through the layers together. More would only make the buffers larger: products are bound by arithmetic
from some 64 rows on."""

HEAD_CANDIDATES: Final = 512
"""Words whose logits are refined by the head's second plane. Among so many, benchmarks/quantization_quality.py finds
the best word of the full product as good as always."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear map: a matrix, and what an adapter adds to it."""

    matrix: kernels.Matrix
    update: LowRankMap | None

    def __call__(self, runtime: kernels.Runtime, x: kernels.Activations, out: Floats) -> None:
        """out = W x; x: (T, inputs), out: (T, outputs)."""
        kernels.matmul(runtime, x, self.matrix, out)
        if self.update is not None:
            self.update.add(runtime, x, out)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The weights of one layer; names are Hugging Face's."""

    input_layernorm: Floats
    qkv_proj: Linear
    o_proj: Linear
    post_attention_layernorm: Floats
    pre_feedforward_layernorm: Floats
    gate_up_proj: Linear
    down_proj: Linear
    post_feedforward_layernorm: Floats


class CpuModel:
    """The weights of a Gemma 2 and the passes through them.

    Args:
        packed: the weights.
        runtime: threads and instruction set.
        head_candidates: words whose logits the head's second plane refines, if the weights have one; the vocabulary's
            size or more for the full product of both planes.
        adapter: what is added to the weights' linear maps, if anything.
    """

    def __init__(
        self,
        packed: PackedModel,
        runtime: kernels.Runtime,
        *,
        head_candidates: int = HEAD_CANDIDATES,
        adapter: Adapter | None = None,
    ) -> None:
        self.config = packed.config
        self.format = packed.format
        self.runtime = runtime
        shapes = packed_shapes(packed.config)

        def matrix(name: str) -> kernels.Matrix:
            outputs, inputs = shapes[name]
            return kernels.Matrix(packed.format, outputs, inputs, packed.tensors[name])

        updates = {} if adapter is None else adapter.updates
        parts, part_shapes = packed_parts(packed.config), expected_tensors(packed.config)

        def linear(name: str) -> Linear:
            own = [(part_shapes[part][0], updates.get(part)) for part in parts[name]]
            base = matrix(name)
            if all(update is None for _, update in own):
                return Linear(matrix=base, update=None)
            data = packed.tensors[name]
            assert data.dtype == np.uint8
            return Linear(matrix=base, update=LowRankMap(runtime, base, data.view(np.uint8), own, MAX_ROWS))

        def layer(index: int) -> Layer:
            prefix = f"model.layers.{index}."
            return Layer(
                input_layernorm=_norm(packed, prefix + "input_layernorm.weight"),
                qkv_proj=linear(prefix + "self_attn.qkv_proj.weight"),
                o_proj=linear(prefix + "self_attn.o_proj.weight"),
                post_attention_layernorm=_norm(packed, prefix + "post_attention_layernorm.weight"),
                pre_feedforward_layernorm=_norm(packed, prefix + "pre_feedforward_layernorm.weight"),
                gate_up_proj=linear(prefix + "mlp.gate_up_proj.weight"),
                down_proj=linear(prefix + "mlp.down_proj.weight"),
                post_feedforward_layernorm=_norm(packed, prefix + "post_feedforward_layernorm.weight"),
            )

        self.embed_tokens = matrix("model.embed_tokens.weight")
        self.second_plane: kernels.Matrix | None = None
        if SECOND_PLANE in packed.tensors:
            self.second_plane = kernels.Matrix(
                packed.format, self.embed_tokens.outputs, self.embed_tokens.inputs, packed.tensors[SECOND_PLANE]
            )
        self.head_candidates = head_candidates
        self.layers = [layer(index) for index in range(packed.config.num_hidden_layers)]
        self.norm = _norm(packed, "model.norm.weight")
        # The root of the width is rounded to the dtype that the published weights compute in: 48, 59.75 and 68 in bf16
        # (gemma_pytorch GemmaModel.forward, Hugging Face Gemma2Model.forward).
        root = packed.config.hidden_size**0.5
        self._embedding_scale = root if packed.format == "float32" else float(ml_dtypes.bfloat16(root))
        exponents = np.arange(0, packed.config.head_dim, 2) / packed.config.head_dim
        self._inverse_frequency = packed.config.rope_theta**-exponents
        self._buffers: dict[int, Buffers] = {}

    def forward(
        self,
        token_ids: TokenIds,
        positions: npt.NDArray[np.int64],
        kinds: Sequence[LayerCaches],
        tables: Sequence[kernels.BatchTable],
        rows_with_logits: npt.NDArray[np.intp],
        logits: Logits,
    ) -> None:
        """Runs rows through the layers, writes their keys and values into the cache, and computes logits.

        Args:
            token_ids: (T,) int32, T at most `MAX_ROWS`; the rows of a sequence stand together, in order.
            positions: (T,) the absolute position of each row.
            kinds: the caches of local and of global layers.
            tables: for each kind, where the sequences' blocks are.
            rows_with_logits: (R,) the rows whose logits are wanted, ascending.
            logits: (R, V) float32, written here, final cap applied.
        """
        run, eps = self.runtime, self.config.rms_norm_eps
        query_scale, cap = self.config.query_scale, self.config.attn_logit_softcapping or 0.0
        kinds_and_tables = list(zip(kinds, tables, strict=True))
        buffers = self._buffers_for(len(token_ids))
        residual_TD = buffers.residual_TD
        angles = positions[:, None] * self._inverse_frequency
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

        kernels.embed(run, self.embed_tokens, token_ids, self._embedding_scale, residual_TD)
        if self.second_plane is not None:
            kernels.embed(run, self.second_plane, token_ids, self._embedding_scale, buffers.update_TD)
            residual_TD += buffers.update_TD
        kernels.rms_norm(run, residual_TD, self.layers[0].input_layernorm, eps, buffers.normed)
        for index, layer in enumerate(self.layers):
            kind, table = next((kind, table) for kind, table in kinds_and_tables if index in kind.layers)
            cache = kind.layers[index]
            is_last = index + 1 == len(self.layers)

            # Attention. Scale, cap, mask, softmax, in this order.
            layer.qkv_proj(run, buffers.normed, buffers.qkv)
            kernels.append_kv(run, buffers.qkv, cos, sin, table, cache, query_scale, buffers.queries)
            kernels.attend(run, buffers.queries, table, cache, kind.window, cap, buffers.mixed)
            if is_last and len(rows_with_logits) < len(token_ids):
                # Nothing after the last layer's keys and values is read again: only rows with logits go on.
                if len(rows_with_logits) == 0:
                    return
                residual_TD = np.ascontiguousarray(residual_TD[rows_with_logits])
                mixed = buffers.mixed[rows_with_logits]
                buffers = self._buffers_for(len(rows_with_logits))
                buffers.mixed[:] = mixed
            kernels.write_activations(run, buffers.mixed, buffers.heads)
            layer.o_proj(run, buffers.heads, buffers.update_TD)
            kernels.add_rms_norm(
                run,
                residual_TD,
                buffers.update_TD,
                layer.post_attention_layernorm,
                eps,
                layer.pre_feedforward_layernorm,
                buffers.normed,
            )

            # GeGLU: down(gelu(gate(x)) · up(x)).
            layer.gate_up_proj(run, buffers.normed, buffers.gate_up)
            kernels.geglu(run, buffers.gate_up, buffers.hidden)
            layer.down_proj(run, buffers.hidden, buffers.update_TD)
            kernels.add_rms_norm(
                run,
                residual_TD,
                buffers.update_TD,
                layer.post_feedforward_layernorm,
                eps,
                self.norm if is_last else self.layers[index + 1].input_layernorm,
                buffers.normed,
            )

        self._head(buffers.normed, logits)

    def _head(self, normed: kernels.Activations, logits: Logits) -> None:
        """Computes logits with the embedding as the head, and caps them."""
        run, plane = self.runtime, self.second_plane
        kernels.matmul(run, normed, self.embed_tokens, logits)
        if plane is not None and self.head_candidates < plane.outputs:
            # All words are ranked by the first plane; the best are computed with both.
            ids = np.empty((len(logits), self.head_candidates), dtype=np.int32)
            values = np.empty(ids.shape, dtype=np.float32)
            kernels.top_k(run, logits, self.head_candidates, ids, values)
            kernels.add_selected_outputs(run, normed, plane, ids, values)
            np.put_along_axis(logits, ids, values, axis=1)
        elif plane is not None:
            second = np.empty_like(logits)
            kernels.matmul(run, normed, plane, second)
            logits += second
        if self.config.final_logit_softcapping is not None:
            kernels.soft_cap(run, logits, self.config.final_logit_softcapping)

    def _buffers_for(self, num_rows: int) -> Buffers:
        buffers = self._buffers.get(num_rows)
        if buffers is None:
            if len(self._buffers) > 64:  # many lengths of chunks: views cost little, but not nothing
                self._buffers = {MAX_ROWS: self._buffers[MAX_ROWS]}
            if MAX_ROWS not in self._buffers:
                self._buffers[MAX_ROWS] = Buffers.allocate(
                    self.config, self.layers[0].qkv_proj.matrix.activation_format
                )
            buffers = self._buffers[num_rows] = self._buffers[MAX_ROWS].first_rows(num_rows)
        return buffers


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Where a pass keeps its numbers, T rows each; the memory is touched only as far as rows are used."""

    residual_TD: Floats
    normed: kernels.Activations
    """(T, D), normalized: what attention and MLP read."""
    qkv: Floats
    """(T, (N + 2 · K) · H)"""
    queries: Floats
    """(T, N · H), turned and scaled."""
    mixed: Floats
    """(T, N · H): what the heads saw."""
    heads: kernels.Activations
    """The same, as the output projection reads it."""
    gate_up: Floats
    """(T, 2 · I)"""
    hidden: kernels.Activations
    """(T, I)"""
    update_TD: Floats
    """What a sub-layer adds to the residual stream, before its norm."""

    @staticmethod
    def allocate(config: Gemma2Config, activation_format: str) -> Buffers:
        width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim

        def floats(columns: int) -> Floats:
            return np.empty((MAX_ROWS, columns), dtype=np.float32)

        return Buffers(
            residual_TD=floats(width),
            normed=kernels.Activations(activation_format, MAX_ROWS, width),
            qkv=floats(heads + 2 * kv_heads),
            queries=floats(heads),
            mixed=floats(heads),
            heads=kernels.Activations(activation_format, MAX_ROWS, heads),
            gate_up=floats(2 * config.intermediate_size),
            hidden=kernels.Activations(activation_format, MAX_ROWS, config.intermediate_size),
            update_TD=floats(width),
        )

    def first_rows(self, num_rows: int) -> Buffers:
        """The same memory, with fewer rows."""
        return Buffers(
            residual_TD=self.residual_TD[:num_rows],
            normed=self.normed,
            qkv=self.qkv[:num_rows],
            queries=self.queries[:num_rows],
            mixed=self.mixed[:num_rows],
            heads=self.heads,
            gate_up=self.gate_up[:num_rows],
            hidden=self.hidden,
            update_TD=self.update_TD[:num_rows],
        )


def _norm(packed: PackedModel, name: str) -> Floats:
    values = packed.tensors[name]
    assert values.dtype == np.float32
    return values.astype(np.float32, copy=False)
