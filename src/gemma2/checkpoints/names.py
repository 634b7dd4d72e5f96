"""The one table of tensor names: what a Gemma 2 is made of, in Hugging Face's words.

Source: Hugging Face `modeling_gemma2.py` (module names) and the published google/gemma-2-* folders. A linear map's
weight is (outputs, inputs), as PyTorch stores it.
"""

from __future__ import annotations

from typing import Final

from gemma2.config import Gemma2Config

EMBEDDING: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"
TIED_HEAD: Final = "lm_head.weight"
"""Some programs store the head beside the embedding, though it is the same matrix. It is never part of the table."""


def expected_tensors(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Names every tensor of the architecture, with its shape.

    Args:
        config: the architecture.

    Returns:
        Hugging Face name → shape, in the order of the forward pass: the embedding, the layers, the last norm. The
        head is the embedding and has no entry.
    """
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        for name, shape in _layer_tensors(config).items():
            shapes[f"model.layers.{index}.{name}"] = shape
    shapes[FINAL_NORM] = (hidden,)
    return shapes


def _layer_tensors(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    hidden, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "post_feedforward_layernorm.weight": (hidden,),
    }
