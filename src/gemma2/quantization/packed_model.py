"""What the CPU engine runs: all weights of a model, packed in the layout that the kernels read.

Names are Hugging Face's. Matrices that read the same input are one, as in Hugging Face's models that fuse them:
`self_attn.qkv_proj` holds the rows of q, k and v in that order, `mlp.gate_up_proj` those of gate and up. The head is
the embedding (tied), stored once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2.config import Gemma2Config

PACKED_FORMATS: Final = ("float32", "bfloat16", "q8", "q4")
"""The weight formats of the CPU engine; their layouts are in kernels/matrix.h."""


SECOND_PLANE: Final = "model.embed_tokens.second_plane"
"""An optional tensor beside q4 weights: what the embedding's rounding lost, rounded to q4 itself. Both planes together
hold the embedding as exactly as q8 does. The head ranks all words by the first plane and reads the second only for the
best of them, so it costs the traffic of 4 bits."""


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A model's weights, in one format.

    Attributes:
        config: the architecture.
        format: one of `PACKED_FORMATS`.
        tensors: by the names of `packed_shapes`: a matrix as (size,) uint8 that starts at a multiple of 64 bytes, a
            norm's weight as (width,) float32. The arrays may be views of a mapped file. `SECOND_PLANE` may be there
            too, of the embedding's shape.
    """

    config: Gemma2Config
    format: str
    tensors: Mapping[str, npt.NDArray[np.uint8] | npt.NDArray[np.float32]]


def packed_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a packed model: (outputs, inputs) of matrices, (width,) of norms, in the order of use."""
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (width,)
        shapes[layer + "self_attn.qkv_proj.weight"] = ((heads + 2 * kv_heads) * config.head_dim, width)
        shapes[layer + "self_attn.o_proj.weight"] = (width, heads * config.head_dim)
        shapes[layer + "post_attention_layernorm.weight"] = (width,)
        shapes[layer + "pre_feedforward_layernorm.weight"] = (width,)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * config.intermediate_size, width)
        shapes[layer + "mlp.down_proj.weight"] = (width, config.intermediate_size)
        shapes[layer + "post_feedforward_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    return shapes
