"""What the weights of a Gemma 2 take, in any format, and the matrices that they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError, nearest_name

GROUP_SIZE: Final = 64
"""Weights that share one scale in q8 and q4, and activations that do in their products."""
TILE_ROWS: Final = 32
"""Rows of a q8 or q4 matrix that are packed together; what is missing in the last tile is filled up."""
SCALE_BYTES: Final = 2
"""A weight's scale is a float16."""
WEIGHT_FORMATS: Final[Mapping[str, float]] = {"float32": 32, "bfloat16": 16, "q8": 8.25, "q4": 4.25}
"""Bits per weight of a matrix whose width is a multiple of `GROUP_SIZE`: q8 is 8 + 16 / 64, q4 is 4 + 16 / 64."""
ADAPTABLE_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a layer, which are what LoRA adapts."""


def layer_matrices(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """Names the linear maps of one layer, each with (outputs, inputs)."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (queries, config.hidden_size),
        "k_proj": (keys, config.hidden_size),
        "v_proj": (keys, config.hidden_size),
        "o_proj": (config.hidden_size, queries),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }


def layer_parameters(config: Gemma2Config) -> int:
    """Counts the parameters of the linear maps of one layer."""
    return sum(outputs * inputs for outputs, inputs in layer_matrices(config).values())


def norm_parameters(config: Gemma2Config) -> int:
    """Counts the parameters of all norms."""
    return (4 * config.num_hidden_layers + 1) * config.hidden_size


def weight_bytes(config: Gemma2Config, weight_format: str, *, second_plane: bool = False) -> int:
    """Size of all weights, the tied embedding once, in bytes.

    Matrices take the format's bits; the norms, a ten-thousandth of all, stay float32 where matrices are quantized.

    Args:
        config: the architecture.
        weight_format: one of `WEIGHT_FORMATS`. In q8 and q4, each `GROUP_SIZE` neighbours of a row share a float16
            scale; the embedding, which is the head, is quantized too. Rows are filled up to a multiple of
            `GROUP_SIZE`, and matrices to one of `TILE_ROWS`: the layout is that of kernels/matrix.h.
        second_plane: whether the head has two planes of 4 bits, as `gemma2 quantize` gives it in q4.

    Raises:
        ConfigError: there is no such format.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise ConfigError(
            f"there is no weight format {weight_format!r}; they are {', '.join(WEIGHT_FORMATS)}."
            + nearest_name(weight_format, WEIGHT_FORMATS)
        )
    if weight_format in ("float32", "bfloat16"):
        return config.count_parameters().total * (4 if weight_format == "float32" else 2)
    value_bits = 8 if weight_format == "q8" else 4
    layer = sum(_quantized_bytes(*shape, value_bits=value_bits) for shape in _packed_layer_matrices(config))
    embedding = embedding_bytes(config, weight_format)
    norms = 4 * norm_parameters(config)
    return embedding * (2 if second_plane else 1) + config.num_hidden_layers * layer + norms


def embedding_bytes(config: Gemma2Config, weight_format: str) -> int:
    """Size of the embedding in q8 or q4, in bytes; see `weight_bytes`."""
    return _quantized_bytes(config.vocab_size, config.hidden_size, value_bits=8 if weight_format == "q8" else 4)


def _packed_layer_matrices(config: Gemma2Config) -> list[tuple[int, int]]:
    """The matrices of a layer as they are packed: q, k and v are one, and so are gate and up."""
    rows = {name: outputs for name, (outputs, _) in layer_matrices(config).items()}
    width = config.hidden_size
    return [
        (rows["q_proj"] + rows["k_proj"] + rows["v_proj"], width),
        (width, rows["q_proj"]),
        (rows["gate_proj"] + rows["up_proj"], width),
        (width, config.intermediate_size),
    ]


def _quantized_bytes(num_rows: int, num_columns: int, *, value_bits: int) -> int:
    num_tiles, num_groups = -(-num_rows // TILE_ROWS), -(-num_columns // GROUP_SIZE)
    return num_tiles * TILE_ROWS * num_groups * (GROUP_SIZE * value_bits // 8 + SCALE_BYTES)
