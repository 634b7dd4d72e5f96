"""The reference of the conformance suite: transformers' Gemma 2 with eager attention, and its float64 self.

transformers casts to float32 in three places whatever the model's dtype: in RMSNorm, in RoPE and in the softmax.
`float64_casts` lifts these to float64, so that a float64 model is float64 throughout: the value that both
implementations round, and the yardstick for how far a float32 result may be from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.models.gemma2 import modeling_gemma2

from gemma2.config import Gemma2Config

Weights = Mapping[str, npt.NDArray[np.float32]]


def hf_config(config: Gemma2Config) -> Any:
    """The same architecture as a transformers config with eager attention."""
    values: dict[str, Any] = {**config.to_dict(), "attn_implementation": "eager"}
    return transformers.Gemma2Config(**values)


def hf_model(config: Gemma2Config, weights: Weights, dtype: torch.dtype) -> Any:
    """transformers' model with these weights; build and run a float64 one inside `float64_casts`."""
    model: Any = modeling_gemma2.Gemma2ForCausalLM(hf_config(config))
    model.eval()
    state = {name: torch.from_numpy(value).to(dtype) for name, value in weights.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model = cast(model, dtype)
    assert model.config._attn_implementation == "eager"
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Casts transformers' model as `from_pretrained(dtype=...)` does, which keeps RoPE's frequencies in float32."""
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = model.to(dtype)
    model.model.rotary_emb.inv_freq = frequencies
    return model


class _Float64Torch(ModuleType):
    """The torch module as transformers' Gemma 2 sees it, with float64 in the place of float32."""

    float = torch.float64
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float64_casts() -> Iterator[None]:
    """Makes every cast to float32 in transformers' Gemma 2 a cast to float64; models must also be built inside."""
    default = torch.get_default_dtype()
    with (
        mock.patch.object(modeling_gemma2, "torch", _Float64Torch("float64_torch")),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)  # in which the embedding's scale is stored
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@torch.inference_mode()
def hf_logits(
    config: Gemma2Config,
    weights: Weights,
    ids: npt.NDArray[np.int32],
    dtype: torch.dtype,
    attention_mask: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.float64]:
    """Logits of transformers for (L,) or (B, L) token ids without a cache.

    Returns:
        (L, V) or (B, L, V) float64 holding the values of `dtype`.
    """
    with float64_casts() if dtype == torch.float64 else contextlib.nullcontext():
        model = hf_model(config, weights, dtype)
        batch = torch.from_numpy(np.atleast_2d(ids).astype(np.int64))
        mask = None if attention_mask is None else torch.from_numpy(attention_mask)
        logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    assert logits.dtype == dtype
    result: npt.NDArray[np.float64] = logits.double().numpy()
    return result[0] if ids.ndim == 1 else result
