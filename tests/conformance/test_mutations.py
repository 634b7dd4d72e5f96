"""The suite has teeth: each known mistake, made on purpose, fails its comparison by a wide margin.

Two comparisons are made, as in `test_logits.py` and `test_cached_steps.py`: one pass, and chunks (one of them longer
than the window) followed by decode. Mistakes of the cache can only show in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS, excess, run_in_chunks
from cases import BASE, LENGTH, WINDOW, biting_weights, token_ids
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.config import Gemma2Config
from gemma2.model import modeling
from gemma2.model.attention import capped_attention, plan_attention
from gemma2.model.kv_cache import KVCache, LayerCache
from gemma2.model.modeling import Gemma2DecoderLayer, Gemma2RMSNorm, Gemma2RotaryEmbedding, PytorchGELUTanh, soft_cap

MARGIN = 10
"""A mistake must be off by at least so many times what is allowed."""

STEPS = [5, 2 * WINDOW + 3, 1]
Mutation = Callable[[pytest.MonkeyPatch], None]


def one_pass_and_steps() -> tuple[float, float]:
    """How far the backend is off, in multiples of what is allowed."""
    backend = BACKENDS[0].make(BASE, biting_weights(BASE))
    ids = token_ids(BASE)
    one_pass, steps = run_in_chunks(backend, ids, [LENGTH]), run_in_chunks(backend, ids, STEPS)
    return excess("float32", BASE, one_pass), excess("float32", BASE, steps)


def attention_with(**changes: Any) -> Mutation:
    """Attention that is called with other arguments."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            modeling, "capped_attention", lambda *qkv, **given: capped_attention(*qkv, **{**given, **changes})
        )

    return mutate


def final_cap(cap: float | None) -> Mutation:
    """Another cap on the logits."""
    return lambda patch: patch.setattr(modeling, "soft_cap", lambda x, _: soft_cap(x, cap))


def caps_swapped(patch: pytest.MonkeyPatch) -> None:
    attention_with(cap=BASE.final_logit_softcapping)(patch)
    final_cap(BASE.attn_logit_softcapping)(patch)


def scaled_after_the_cap(patch: pytest.MonkeyPatch) -> None:
    cap, scale = BASE.attn_logit_softcapping, BASE.query_scale
    assert cap is not None
    # scale · cap · tanh(qk / cap), said with the arguments that there are
    attention_with(scale=scale, cap=cap * scale)(patch)


def layers_swapped(patch: pytest.MonkeyPatch) -> None:
    is_local = Gemma2Config.is_local
    patch.setattr(Gemma2Config, "is_local", lambda self, index: not is_local(self, index))


def window_moved(by: int) -> Mutation:
    """A window that is too long or too short; the cache keeps what it should."""

    def plan(*, window: int | None, **given: Any) -> Any:
        return plan_attention(window=None if window is None else window + by, **given)

    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(modeling, "plan_attention", plan)

    return mutate


def query_scale_of(value: float) -> Mutation:
    """Scores divided by the root of another number."""
    return lambda patch: patch.setattr(Gemma2Config, "query_scale", property(lambda self: value**-0.5))


def norm_weight_without_one(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Gemma2RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    patch.setattr(Gemma2RMSNorm, "forward", forward)


def without_norm(name: str) -> Mutation:
    """A layer that leaves out one of its four norms."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        forward = Gemma2DecoderLayer.forward

        def mutated(self: Gemma2DecoderLayer, *inputs: Any) -> Tensor:
            norm = getattr(self, name)
            setattr(self, name, nn.Identity())
            try:
                return forward(self, *inputs)
            finally:
                setattr(self, name, norm)

        patch.setattr(Gemma2DecoderLayer, "forward", mutated)

    return mutate


def rope_base(patch: pytest.MonkeyPatch) -> None:
    forward = Gemma2RotaryEmbedding.forward

    def mutated(self: Gemma2RotaryEmbedding, *inputs: Any) -> tuple[Tensor, Tensor]:
        self.theta = 1_000_000.0
        return forward(self, *inputs)

    patch.setattr(Gemma2RotaryEmbedding, "forward", mutated)


def rope_pairs_side_by_side(patch: pytest.MonkeyPatch) -> None:
    def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = rope
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)

    patch.setattr(modeling, "apply_rope", apply_rope)


def rope_turned_backwards(patch: pytest.MonkeyPatch) -> None:
    apply_rope = modeling.apply_rope
    # Turning queries and keys backwards alike would change nothing: only their distance counts. So: queries only.
    patch.setattr(
        modeling,
        "apply_rope",
        lambda x, rope: apply_rope(x, (rope[0], -rope[1] if x.shape[1] == BASE.num_attention_heads else rope[1])),
    )


def embedding_unscaled(patch: pytest.MonkeyPatch) -> None:
    forward = nn.Embedding.forward
    patch.setattr(nn.Embedding, "forward", lambda self, ids: forward(self, ids) / BASE.hidden_size**0.5)


def key_heads_interleaved(patch: pytest.MonkeyPatch) -> None:
    def mutated(q_BKGLH: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        """Query head n meets key head n % K in the place of n // G."""
        B, K, G, L, H = q_BKGLH.shape
        out = capped_attention(q_BKGLH.reshape(B, G, K, L, H).transpose(1, 2), k, v, **given)
        return out.view(B, L, K, G, H).transpose(2, 3).reshape(B, L, G * K, H)

    patch.setattr(modeling, "capped_attention", mutated)


def exact_gelu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PytorchGELUTanh, "forward", lambda self, x: F.gelu(x))


def cache_trimmed_early(patch: pytest.MonkeyPatch) -> None:
    init = KVCache.__init__

    def mutated(self: KVCache, config: Gemma2Config) -> None:
        init(self, config)
        self._window = config.sliding_window - 1

    patch.setattr(KVCache, "__init__", mutated)


def chunk_overwrites_the_ring(patch: pytest.MonkeyPatch) -> None:
    """A ring of `WINDOW` places for each local layer: in a longer chunk, late keys land on early ones."""
    init, append = KVCache.__init__, LayerCache.append
    local: list[LayerCache] = []

    def mutated_init(self: KVCache, config: Gemma2Config) -> None:
        init(self, config)
        local.extend(layer for index, layer in enumerate(self.layers) if config.is_local(index))

    def mutated_append(self: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = append(self, k, v)
        if not any(layer is self for layer in local):
            return k, v
        index = torch.arange(k.shape[2])
        last_in_place = index + (len(index) - 1 - index) // WINDOW * WINDOW
        return k[:, :, last_in_place], v[:, :, last_in_place]

    patch.setattr(KVCache, "__init__", mutated_init)
    patch.setattr(LayerCache, "append", mutated_append)


def length_read_from_a_local_layer(patch: pytest.MonkeyPatch) -> None:
    count = modeling._count_positions

    def mutated(ids: Tensor, segments: Tensor | None, cache: KVCache | None) -> Tensor:
        index = torch.arange(ids.shape[1])[None]
        return count(ids, segments, None) if cache is None else cache.layers[0].num_tokens + index

    patch.setattr(modeling, "_count_positions", mutated)


MUTATIONS: dict[str, Mutation] = {
    "attention cap removed": attention_with(cap=None),
    "attention cap of 49": attention_with(cap=49.0),
    "final cap removed": final_cap(None),
    "final cap of 29": final_cap(29.0),
    "caps swapped": caps_swapped,
    "scores scaled after the cap": scaled_after_the_cap,
    "local and global layers swapped": layers_swapped,
    "window longer by one": window_moved(+1),
    "window shorter by one": window_moved(-1),
    "scores scaled by the head size": query_scale_of(BASE.head_dim),
    "scores scaled by width over heads": query_scale_of(BASE.hidden_size / BASE.num_attention_heads),
    "norm weight without 1 +": norm_weight_without_one,
    "no norm before attention": without_norm("input_layernorm"),
    "no norm after attention": without_norm("post_attention_layernorm"),
    "no norm before the MLP": without_norm("pre_feedforward_layernorm"),
    "no norm after the MLP": without_norm("post_feedforward_layernorm"),
    "other RoPE base": rope_base,
    "RoPE pairs side by side": rope_pairs_side_by_side,
    "RoPE of queries turned backwards": rope_turned_backwards,
    "embedding not scaled": embedding_unscaled,
    "key heads interleaved": key_heads_interleaved,
    "exact GELU": exact_gelu,
}
CACHE_MUTATIONS: dict[str, Mutation] = {
    "cache trimmed one token early": cache_trimmed_early,
    "long chunk overwrites the ring": chunk_overwrites_the_ring,
    "length read from a local layer": length_read_from_a_local_layer,
}


def test_the_model_without_mutation_conforms() -> None:
    one_pass, steps = one_pass_and_steps()
    assert one_pass <= 1 and steps <= 1


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    one_pass, steps = one_pass_and_steps()
    assert one_pass >= MARGIN and steps >= MARGIN, (one_pass, steps)


@pytest.mark.parametrize("name", CACHE_MUTATIONS)
def test_mutation_of_the_cache_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CACHE_MUTATIONS[name](monkeypatch)
    _, steps = one_pass_and_steps()
    assert steps >= MARGIN, steps
