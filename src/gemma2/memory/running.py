"""What running a Gemma 2 takes beside its weights: the cache of keys and values, activations, logits."""

from __future__ import annotations

from typing import Final

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError
from gemma2.memory.weights import GROUP_SIZE

KV_SCALE_BYTES: Final = 4
"""The scale of an int8 key or value is a float32."""
KV_FORMATS: Final = ("float32", "bfloat16", "int8")
QUERY_BLOCK: Final = 256
"""Queries whose scores exist at once; attention takes long inputs in blocks of so many."""
BLOCK_VALUES: Final = 1 << 18
"""Values of a norm or GeGLU that are worked on at once: 1 MiB in float32, half of what two second-level caches hold."""
ENGINE_ROWS: Final = 512
"""Rows that the CPU engine takes through its layers together; longer chunks go in parts."""


def kv_cache_bytes(config: Gemma2Config, num_tokens: int, *, kv_format: str = "bfloat16", bounded: bool = True) -> int:
    """Size of the KV cache of one sequence: 2 · K · H values for each token and layer.

    Args:
        config: the architecture.
        num_tokens: length of the sequence.
        kv_format: one of `KV_FORMATS`; int8 adds one float32 scale for each key and each value vector of a head.
        bounded: whether local layers keep only the last W tokens.

    Returns:
        The bytes; the CPU engine takes them in blocks of 64 tokens, so up to 63 tokens more.

    Raises:
        ConfigError: there is no such format.
    """
    if kv_format not in KV_FORMATS:
        raise ConfigError(f"there is no KV format {kv_format!r}; they are {', '.join(KV_FORMATS)}")
    bytes_per_value = {"float32": 4, "bfloat16": 2, "int8": 1}[kv_format]
    num_bytes = config.kv_cache_bytes(num_tokens, bytes_per_value=bytes_per_value, bounded=bounded)
    if kv_format == "int8":
        num_vectors = num_bytes // config.head_dim
        num_bytes += num_vectors * KV_SCALE_BYTES
    return num_bytes


def logits_bytes(config: Gemma2Config, num_rows: int) -> int:
    """Size of logits in float32: 4 · V for each row. One row a sequence is enough to generate."""
    return 4 * config.vocab_size * num_rows


def prefill_bytes(config: Gemma2Config, *, chunk_tokens: int, num_keys: int, bytes_per_value: int = 2) -> int:
    """Peak of the activations while a chunk of a prompt goes through a layer, weights and cache not counted.

        residual stream              4 · C · D            before and after attention, its output, the normed input
        the largest of
          a norm                     C · D, its output, and 4 in float32 for `BLOCK_VALUES` of it at a time
          MLP                        3 · C · I            gate, up and their product
          attention                  2 · C · (N + K) · H  q, k, v and the output
            and scores               N · min(C, 256) · S  in float32 twice, before and after the softmax

    Args:
        config: the architecture.
        chunk_tokens: C, tokens that go through the model at once.
        num_keys: S, tokens of the sequence so far, the chunk included.
        bytes_per_value: of everything but the scores; 2 for bf16.
    """
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    stream = 4 * chunk_tokens * config.hidden_size * bytes_per_value
    norm_values = chunk_tokens * config.hidden_size
    norm = bytes_per_value * norm_values + 4 * 4 * min(norm_values, BLOCK_VALUES)
    mlp = 3 * chunk_tokens * config.intermediate_size * bytes_per_value
    num_scores = config.num_attention_heads * min(chunk_tokens, QUERY_BLOCK) * num_keys
    attention = 2 * chunk_tokens * heads * bytes_per_value + num_scores * 2 * 4
    return stream + max(norm, mlp, attention)


def engine_prefill_bytes(config: Gemma2Config, *, chunk_tokens: int) -> int:
    """The CPU engine's buffers while a chunk of a prompt goes through it, with q8 or q4 weights.

    They are made once and used by every layer, so this is all at once; scores exist only in tiles that the processor's
    cache holds. For each of up to `ENGINE_ROWS` tokens, in float32 unless said:

        residual stream, update      2 · D
        attention                    (3 · N + 2 · K) · H  q, k and v; queries, turned; what the heads saw
        MLP                          2 · I                gate and up
        inputs of products           D + N · H + I        int8, with a scale and a sum for each `GROUP_SIZE`

    Args:
        config: the architecture.
        chunk_tokens: tokens that go through the model at once.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    floats = 2 * config.hidden_size + 3 * queries + 2 * keys + 2 * config.intermediate_size
    inputs = 0
    for width in (config.hidden_size, queries, config.intermediate_size):
        inputs += -(-width // GROUP_SIZE) * (GROUP_SIZE + 2 * 4)
    return min(chunk_tokens, ENGINE_ROWS) * (4 * floats + inputs)
