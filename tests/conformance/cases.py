"""The cases of the conformance suite: small architectures whose weights make every feature bite.

A test with mild weights passes a model without caps: tanh is a straight line near zero. Here a tenth of the scores and
of the logits lie beyond their caps, the window is a sixth of the sequence, norm weights are far from zero, and
query_pre_attn_scalar is neither the head size nor one. `test_mutations.py` shows that each of these is needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from hf_reference import Weights, hf_logits

from gemma2 import _kernels as kernels
from gemma2.checkpoints import expected_tensors
from gemma2.config import FULL, SLIDING, Gemma2Config

WINDOW = 12
LENGTH = 70
FLOOR = 1e-4
"""Where transformers' own float32 is closer to its float64 than this, our float32 need not be closer still."""

BASE = Gemma2Config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    query_pre_attn_scalar=24,
    vocab_size=160,
    sliding_window=WINDOW,
    max_position_embeddings=256,
)

LAYOUTS = {
    "base": BASE,
    # The head layouts of the three sizes: how many queries share a key, and what scores are scaled by.
    "2b": BASE.replace(query_pre_attn_scalar=16),
    "9b": BASE.replace(num_attention_heads=16, num_key_value_heads=8, hidden_size=96, query_pre_attn_scalar=16),
    "27b": BASE.replace(
        num_attention_heads=32, num_key_value_heads=16, head_dim=8, hidden_size=288, query_pre_attn_scalar=9
    ),
    "multi_head": BASE.replace(num_key_value_heads=8),
    "multi_query": BASE.replace(num_key_value_heads=1),
    "no_attention_cap": BASE.replace(attn_logit_softcapping=None),
    "no_final_cap": BASE.replace(final_logit_softcapping=None),
    "no_caps": BASE.replace(attn_logit_softcapping=None, final_logit_softcapping=None),
    "other_caps": BASE.replace(attn_logit_softcapping=20.0, final_logit_softcapping=5.0),
    "other_layer_types": BASE.replace(layer_types=(FULL, SLIDING, SLIDING, FULL)),
    "all_local": BASE.replace(layer_types=(SLIDING,) * 4),
    "window_of_one": BASE.replace(sliding_window=1),
    "window_beyond_the_text": BASE.replace(sliding_window=LENGTH + 1),
    "other_rope_and_epsilon": BASE.replace(rope_theta=500.0, rms_norm_eps=1e-2),
}


@functools.cache
def biting_weights(config: Gemma2Config, seed: int = 0) -> Weights:
    """Random float32 weights under which scores reach ±100 and logits ±60 before their caps."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_tensors(config).items():
        mean = 0.0
        if name == "model.norm.weight":
            # 1 + w of either sign, or else every token would predict itself, as head and embedding are one matrix.
            mean, deviation = -1.0, 1.0
        elif "norm" in name:
            deviation = 0.4
        elif name == "model.embed_tokens.weight":
            # Without a cap, logits of this size would make the softmax a coin toss between two words for bf16.
            deviation = (4.0 if config.final_logit_softcapping is None else 24.0) / np.sqrt(shape[1])
        elif "q_proj" in name or "k_proj" in name:
            deviation = 5.5 / np.sqrt(shape[1])
        else:
            deviation = 1.0 / np.sqrt(shape[1])
        weights[name] = generator.normal(mean, deviation, shape).astype(np.float32)
    return weights


@functools.cache
def rounded_weights(config: Gemma2Config, seed: int, weights: str) -> Weights:
    """`biting_weights` as a format with scales holds them, in float32; as they are for the other formats."""
    if weights not in ("q8", "q4"):
        return biting_weights(config, seed)
    runtime = kernels.Runtime(1)

    def rounded(value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        packed = aligned_bytes(kernels.matrix_bytes(weights, *value.shape))
        kernels.pack_matrix(runtime, value, weights, packed)
        return kernels.unpack_matrix(runtime, kernels.Matrix(weights, *value.shape, packed))

    return {name: rounded(v) if v.ndim == 2 else v for name, v in biting_weights(config, seed).items()}


def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """(size,) zeros that start at a multiple of 64 bytes."""
    whole = np.zeros(size + 64, dtype=np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]


@functools.cache
def token_ids(config: Gemma2Config, length: int = LENGTH, seed: int = 0) -> npt.NDArray[np.int32]:
    """(length,) random ids, the first and the last of the vocabulary among them."""
    ids = np.random.default_rng(1000 + seed).integers(0, config.vocab_size, length).astype(np.int32)
    ids[1], ids[2] = 0, config.vocab_size - 1
    return ids


@dataclass(frozen=True)
class Reference:
    """What transformers computes for one case."""

    logits: npt.NDArray[np.float64]
    """(L, V) by its float64 self."""
    tolerance: float
    """How far a float32 logit may be from these: twice as far as transformers' own, or `FLOOR`."""
    bfloat16_divergence: float
    """Mean KL divergence of transformers' bf16 from these."""


def reference(config: Gemma2Config, length: int = LENGTH, seed: int = 0, weights: str = "float32") -> Reference:
    """The reference for the weights and `token_ids` of this seed, the weights rounded as this format rounds them."""
    return _reference(config, length, seed, weights if weights in ("q8", "q4") else "float32")


@functools.cache
def _reference(config: Gemma2Config, length: int, seed: int, weights_format: str) -> Reference:
    weights, ids = rounded_weights(config, seed, weights_format), token_ids(config, length, seed)
    logits = hf_logits(config, weights, ids, torch.float64)
    own_distance = np.abs(hf_logits(config, weights, ids, torch.float32) - logits).max()
    return Reference(
        logits=logits,
        tolerance=max(2.0 * float(own_distance), FLOOR),
        bfloat16_divergence=divergence(logits, hf_logits(config, weights, ids, torch.bfloat16)),
    )


def divergence(reference_logits: npt.NDArray[np.floating], logits: npt.NDArray[np.floating]) -> float:
    """Mean over positions of KL(reference ‖ other), in nats, for (L, V) logits."""
    p = torch.from_numpy(reference_logits).double().log_softmax(-1)
    q = torch.from_numpy(logits).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
