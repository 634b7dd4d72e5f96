"""Layers that keep only their input, and are computed again in the backward pass: less memory for more arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gemma2.errors import ConfigError
from gemma2.model.modeling import Gemma2ForCausalLM


def checkpoint_layers(model: Gemma2ForCausalLM, num_layers: int | bool = True) -> None:
    """Lets layers keep only their input in training. Names of modules and parameters stay as they are.

    A layer's forward pass then runs twice, which is a third more arithmetic where weights are trained and half more
    where they are frozen. So give it to as many layers as memory asks for, and no more. Losses and gradients are the
    same, bit for bit: what is drawn in a layer, such as dropout, is drawn again from the same state.

    Args:
        model: changed in place. Without gradients it runs as before.
        num_layers: how many layers, from the first; True for all.

    Raises:
        ConfigError: the model has not so many layers.
        ValueError: layers already keep only their input.
    """
    layers = list(model.model.layers)
    for layer in layers[: num_checkpointed(num_layers, len(layers))]:
        if "forward" in vars(layer):
            raise ValueError("checkpoint_layers was called for this model before; call it once")
        # On the module and not around it: a wrapper would change the names of its parameters.
        layer.forward = functools.partial(_forward, layer.forward)


def num_checkpointed(given: int | bool, num_layers: int) -> int:
    """How many layers of a model keep only their input.

    Args:
        given: True for all, False for none, or a number.
        num_layers: how many the model has.

    Raises:
        ConfigError: it has not so many.
    """
    count = num_layers if given is True else int(given)
    if not 0 <= count <= num_layers:
        raise ConfigError(
            f"gradient_checkpointing must be true, false, or a number of layers from 0 to {num_layers}, the layers of "
            f"the model, but is {given}"
        )
    return count


def _forward(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    result: Tensor = checkpoint(forward, *inputs, use_reentrant=False)
    return result
