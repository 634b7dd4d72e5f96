"""Each layer keeps only its input for the backward pass, and is computed again there."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint

from gemma2.model.modeling import Gemma2ForCausalLM


def checkpoint_layers(model: Gemma2ForCausalLM) -> None:
    """Makes every layer of a model do so while it trains."""
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
