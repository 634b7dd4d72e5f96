"""Gemma 2 in PyTorch, from the top of the architecture to the bottom.

A token id becomes an embedding, scaled by the square root of the width. Layers follow in turn: a local one that sees
the last `sliding_window` tokens, a global one that sees all. Each layer adds two things to the residual stream,
attention and an MLP, and normalizes what goes into each and what comes out. A last norm, the embedding once more as
the head, and a soft cap give the logits.

The module tree, its names and its parameters are Hugging Face's; `print(model)` shows the tree that Google's post
"What's new in Gemma 2" shows. The report is arXiv 2408.00118.

Axes: B batch, L tokens of this pass, D width, N query heads, K key/value heads, G = N / K, H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma2.config import Gemma2Config
from gemma2.model.attention import AttentionPlan, capped_attention, plan_attention
from gemma2.model.kv_cache import KVCache, LayerCache, has_gaps
from gemma2.model.lean_functions import geglu, rms_norm


class Gemma2ForCausalLM(nn.Module):
    """Gemma 2 with its language-model head.

    Args:
        config: the architecture.
        dtype: float32 or bfloat16 (float64 for references). float16 is refused: the residual stream passes its
            largest value, 65504, worst in 27B.
        device: where to build; "meta" builds the tree without memory.

    Parameters are initialized as for training from scratch: normal with `config.initializer_range`, norms at zero.
    """

    def __init__(
        self,
        config: Gemma2Config,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        refuse_float16(dtype)
        self.config = config
        self.model = Gemma2Model(config, dtype=dtype, device=device)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device="meta")
        self.lm_head.weight = self.model.embed_tokens.weight  # one parameter under two names
        if self.lm_head.weight.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draws the weights anew: matrices normal(0, initializer_range), norms zero (so that 1 + w is one)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            elif isinstance(module, Gemma2RMSNorm):
                module.weight.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gemma2ForCausalLM:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What makes new parameters, as `to_empty` does, makes two of the one; the head would drift from the embedding.
        self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Computes logits.

        Args:
            input_ids: (B, L) int64 token ids.
            position_ids: (B, L) int64 absolute positions, which rise by one within a document. Left out: counted in
                each segment, from where `past_key_values` ends.
            segment_ids: (B, L) int64; 0 is padding, left or right, and each other number one document; tokens see
                only their own document, whose tokens stand together. An attention mask of zeros and ones is one.
                Left out: no padding, one document a row, or the going on of the cache's last one.
            past_key_values: the cache to read and extend. Left out: no cache.
            logits_to_keep: of how many of the last tokens; 0 for all.

        Returns:
            (B, L or logits_to_keep, V) in float32 (float64 for a float64 model), final cap applied.

        Raises:
            ValueError: shapes do not fit each other or the cache, positions do not rise by one, or the weights are
                float16.
        """
        hidden_BLD = self.model(
            input_ids, position_ids=position_ids, segment_ids=segment_ids, past_key_values=past_key_values
        )
        return self.logits(hidden_BLD[:, -logits_to_keep:] if logits_to_keep else hidden_BLD)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head and the final cap: (…, D) hidden states to (…, V) logits in float32 (or float64)."""
        logits = self.lm_head(hidden)
        return soft_cap(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), self.config.final_logit_softcapping
        )


class Gemma2Model(nn.Module):
    """The decoder without its head: token ids to the last hidden states."""

    def __init__(self, config: Gemma2Config, *, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.config = config
        # Not drawn by nn.Embedding: that would be drawn over, and on "meta" it makes torch import for a second.
        self.embed_tokens = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device),
            freeze=False,
            padding_idx=config.pad_token_id,
        )
        self.layers = nn.ModuleList(
            Gemma2DecoderLayer(config, index, dtype=dtype, device=device) for index in range(config.num_hidden_layers)
        )
        self.norm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
    ) -> Tensor:
        """Computes the (B, L, D) hidden states after the last norm; arguments as `Gemma2ForCausalLM.forward`."""
        refuse_float16(self.embed_tokens.weight.dtype)
        context = PassContext.prepare(self.config, input_ids, position_ids, segment_ids, past_key_values)
        x_BLD = self.embed_tokens(input_ids)
        # The root of the width is rounded to the compute dtype before it multiplies: 48, 59.75 and 68 in bf16
        # (gemma_pytorch GemmaModel.forward, Hugging Face Gemma2Model.forward).
        x_BLD = x_BLD * torch.tensor(self.config.hidden_size**0.5, dtype=x_BLD.dtype, device=x_BLD.device)
        rotary_emb: Gemma2RotaryEmbedding = self.layers[0].self_attn.rotary_emb  # type: ignore[union-attr,assignment]
        rope = rotary_emb(context.position_ids_BL, torch.promote_types(x_BLD.dtype, torch.float32))
        for layer in self.layers:
            x_BLD = layer(x_BLD, rope, context)
        if past_key_values is not None:
            past_key_values.forget_unseen()
        return self.norm(x_BLD)  # type: ignore[no-any-return]


class PassContext:
    """What all layers of one forward pass share: positions, the two attention plans, the cache."""

    def __init__(
        self, position_ids_BL: Tensor, local: AttentionPlan, full: AttentionPlan, cache: KVCache | None
    ) -> None:
        self.position_ids_BL = position_ids_BL
        self.local = local
        self.full = full
        self.cache = cache

    @classmethod
    def prepare(
        cls,
        config: Gemma2Config,
        input_ids_BL: Tensor,
        position_ids_BL: Tensor | None,
        segment_ids_BL: Tensor | None,
        cache: KVCache | None,
    ) -> PassContext:
        """Checks the shapes, counts positions where none are given, and plans local and global attention."""
        _check_inputs(config, input_ids_BL, position_ids_BL, segment_ids_BL, cache)
        if position_ids_BL is None:
            position_ids_BL = _count_positions(input_ids_BL, segment_ids_BL, cache)
        if cache is not None:
            cache.extend(position_ids_BL, segment_ids_BL)
            any_gaps = cache.has_gaps
        else:
            # Asked only where the answer matters, since it is one more wait for an accelerator.
            any_gaps = input_ids_BL.shape[1] > config.sliding_window and has_gaps(segment_ids_BL)
        plans = []
        for window, is_local in ((config.sliding_window, True), (None, False)):
            keys: tuple[Tensor, Tensor | None] = (position_ids_BL, segment_ids_BL)
            query_segments_BL = segment_ids_BL
            if cache is not None:
                keys = cache.key_positions(local=is_local)
                if keys[1] is not None:  # an earlier pass had padding, though this one may have none
                    query_segments_BL = keys[1][:, -input_ids_BL.shape[1] :]
            plans.append(
                plan_attention(
                    position_ids_BL=position_ids_BL,
                    segment_ids_BL=query_segments_BL,
                    key_position_ids_BS=keys[0],
                    key_segment_ids_BS=keys[1],
                    window=window,
                    has_gaps=any_gaps,
                )
            )
        return cls(position_ids_BL, plans[0], plans[1], cache)


class Gemma2DecoderLayer(nn.Module):
    """Attention and MLP, each between two norms, each added to the residual stream (report, section 2)."""

    def __init__(
        self, config: Gemma2Config, layer_index: int, *, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.self_attn = Gemma2Attention(config, layer_index, dtype=dtype, device=device)
        self.mlp = Gemma2MLP(config, dtype=dtype, device=device)
        self.input_layernorm = Gemma2RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.post_attention_layernorm = Gemma2RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device
        )
        self.pre_feedforward_layernorm = Gemma2RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device
        )
        self.post_feedforward_layernorm = Gemma2RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device
        )

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], context: PassContext) -> Tensor:
        attended_BLD = self.self_attn(self.input_layernorm(x_BLD), rope, context)
        x_BLD = x_BLD + self.post_attention_layernorm(attended_BLD)
        widened_BLD = self.mlp(self.pre_feedforward_layernorm(x_BLD))
        return x_BLD + self.post_feedforward_layernorm(widened_BLD)  # type: ignore[no-any-return]


class Gemma2Attention(nn.Module):
    """Grouped-query attention: every G query heads share one key/value head. Local or global by its layer's type."""

    def __init__(
        self, config: Gemma2Config, layer_index: int, *, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        self.is_local = config.is_local(layer_index)
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False, dtype=dtype, device=device)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False, dtype=dtype, device=device)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False, dtype=dtype, device=device)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False, dtype=dtype, device=device)
        self.rotary_emb = Gemma2RotaryEmbedding(config.head_dim, config.rope_theta)

    def forward(self, x_BLD: Tensor, rope: tuple[Tensor, Tensor], context: PassContext) -> Tensor:
        num_batch, num_length, _ = x_BLD.shape
        config = self.config
        heads = (num_batch, num_length, -1, config.head_dim)
        q_BNLH = apply_rope(self.q_proj(x_BLD).view(heads).transpose(1, 2), rope)
        k_BKSH = apply_rope(self.k_proj(x_BLD).view(heads).transpose(1, 2), rope)
        v_BKSH = self.v_proj(x_BLD).view(heads).transpose(1, 2)
        if context.cache is not None:
            layer_cache: LayerCache = context.cache.layers[self.layer_index]
            k_BKSH, v_BKSH = layer_cache.append(k_BKSH, v_BKSH)
        out_BLNH = capped_attention(
            # Query head n shares key/value head n // G: the heads of one group stand together.
            q_BNLH.view(num_batch, config.num_key_value_heads, config.num_queries_per_kv, num_length, config.head_dim),
            k_BKSH,
            v_BKSH,
            scale=config.query_scale,
            cap=config.attn_logit_softcapping,
            plan=context.local if self.is_local else context.full,
        )
        return self.o_proj(out_BLNH.flatten(2))  # type: ignore[no-any-return]


class Gemma2MLP(nn.Module):
    """GeGLU: down(gelu_tanh(gate(x)) · up(x))."""

    def __init__(self, config: Gemma2Config, *, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False, dtype=dtype, device=device)
        self.act_fn = PytorchGELUTanh()

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x_BLD), self.up_proj(x_BLD), self.act_fn))  # type: ignore[no-any-return]


class PytorchGELUTanh(nn.Module):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), the approximation that the weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Gemma2RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), in float32, rounded once at the end.

    The order is gemma_pytorch's and Hugging Face's (`Gemma2RMSNorm.forward`): Llama rounds before it multiplies with
    the weight, Gemma after. DeepMind's JAX library computes in the dtype of x.
    """

    def __init__(self, num_features: int, eps: float, *, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(num_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Gemma2RotaryEmbedding(nn.Module):
    """The angles of RoPE: channel pair i of a head turns by position · theta ** (-2i / head_dim).

    Pairs are (i, i + head_dim / 2), as in Hugging Face's and gemma_pytorch's weights. Holds no tensors, so that moving
    or casting the model cannot round the angles.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, position_ids_BL: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine, each (B, 1, L, H / 2), for (B, L) positions; float32, float64 for references."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64, device=position_ids_BL.device).to(dtype)
        inverse_frequency = 1.0 / (self.theta ** (exponents / self.head_dim))
        angles_B1LH = position_ids_BL[:, None, :, None].to(dtype) * inverse_frequency
        return angles_B1LH.cos(), angles_B1LH.sin()


def apply_rope(x_BNLH: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each channel pair (i, i + H / 2) of (B, N, L, H) by its angle; in float32, rounded once at the end."""
    cos, sin = rope
    wide = x_BNLH.to(torch.promote_types(x_BNLH.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BNLH.dtype)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap): nearly x when small, never beyond ±cap (report, section 2). None leaves x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)


def refuse_float16(dtype: torch.dtype) -> None:
    """Raises ValueError for any dtype but float32, bfloat16 and float64."""
    if dtype == torch.float16:
        raise ValueError(
            "Gemma 2 cannot run in float16: its residual stream passes 65504, the largest float16, and becomes "
            "infinite. Use bfloat16, which has the range of float32 in the same two bytes, or float32."
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"dtype must be float32 or bfloat16 (or float64 for a reference), but is {dtype}")


def _count_positions(input_ids_BL: Tensor, segment_ids_BL: Tensor | None, cache: KVCache | None) -> Tensor:
    """Positions of the real tokens of each segment, from 0 or from where the cached part of the segment ends."""
    last = None if cache is None else cache.last_tokens()
    index_1L = torch.arange(input_ids_BL.shape[1], device=input_ids_BL.device)[None]
    if segment_ids_BL is None:
        return index_1L.expand(input_ids_BL.shape[0], -1) if last is None else last[1] + 1 + index_1L
    real_BL = segment_ids_BL != 0
    if last is None:
        segment_B1 = torch.zeros_like(segment_ids_BL[:, :1])
        last = (segment_B1, segment_B1 - 1)
    # The segment of the last real token before each token, across any padding between them.
    last_real_BL = torch.where(real_BL, index_1L, -1).cummax(dim=1).values
    before_BL = F.pad(last_real_BL, (1, -1), value=-1)
    segment_before_BL = torch.where(before_BL < 0, last[0], segment_ids_BL.gather(1, before_BL.clamp(min=0)))
    starts_BL = real_BL & (segment_ids_BL != segment_before_BL)
    count_BL = real_BL.to(torch.int64).cumsum(dim=1) - 1
    # Tokens before the first start of this pass continue the cached segment: they count from its last position + 1.
    started_BL = starts_BL.to(torch.int64).cummax(dim=1).values == 1
    start_count_BL = torch.where(started_BL, torch.where(starts_BL, count_BL, -1).cummax(dim=1).values, -1 - last[1])
    return (count_BL - start_count_BL).clamp(min=0)


def _check_inputs(
    config: Gemma2Config,
    input_ids_BL: Tensor,
    position_ids_BL: Tensor | None,
    segment_ids_BL: Tensor | None,
    cache: KVCache | None,
) -> None:
    if input_ids_BL.ndim != 2 or input_ids_BL.shape[1] == 0:
        raise ValueError(
            f"input_ids must be (batch, length) with at least one token, but is {tuple(input_ids_BL.shape)}"
        )
    for name, tensor in (("position_ids", position_ids_BL), ("segment_ids", segment_ids_BL)):
        if tensor is not None and tensor.shape != input_ids_BL.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids_BL.shape)}, but has {tuple(tensor.shape)}"
            )
    if cache is not None:
        if len(cache.layers) != config.num_hidden_layers:
            raise ValueError(
                f"the cache was made for {len(cache.layers)} layers, but the model has {config.num_hidden_layers}"
            )
        if cache.num_rows not in (None, input_ids_BL.shape[0]):
            raise ValueError(f"the cache holds {cache.num_rows} rows, but input_ids has {input_ids_BL.shape[0]}")
    if position_ids_BL is not None:
        _check_positions(position_ids_BL, segment_ids_BL, cache)


def _check_positions(position_ids_BL: Tensor, segment_ids_BL: Tensor | None, cache: KVCache | None) -> None:
    """Refuses positions that do not rise by one: the masks tell by them which key comes before which query."""
    segments_BL = torch.ones_like(position_ids_BL) if segment_ids_BL is None else segment_ids_BL
    last = None if cache is None else cache.last_tokens()
    if last is not None:
        last_segment_B1 = last[0] if segment_ids_BL is not None else (last[0] != 0).to(torch.int64)
        segments_BL = torch.cat([last_segment_B1, segments_BL], dim=1)
        position_ids_BL = torch.cat([last[1], position_ids_BL], dim=1)
    is_next_BL = (segments_BL[:, 1:] == segments_BL[:, :-1]) & (segments_BL[:, 1:] != 0)
    rise_BL = position_ids_BL[:, 1:] - position_ids_BL[:, :-1]
    if bool((is_next_BL & (rise_BL != 1)).any()):
        raise ValueError(
            "position_ids must rise by one from token to token of a document, from where the cache ends; where the "
            "next document of a row begins, segment_ids must change"
        )
