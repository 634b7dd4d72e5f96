"""Layers that are computed again give the same bits, and keep little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import batch_of, loss_and_gradients, packed_row, small_model, with_adapter

from gemma2.errors import ConfigError
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.activation_checkpointing import checkpoint_layers

pytest.importorskip("peft")


def adapted(dtype: torch.dtype, dropout: float = 0.0) -> Gemma2ForCausalLM:
    return with_adapter(small_model(dtype), lora_dropout=dropout)


@pytest.mark.parametrize("num_layers", [True, 3])
@pytest.mark.parametrize("kind", ["full", "bfloat16 products", "lora", "lora with dropout"])
def test_the_same_bits(kind: str, num_layers: int | bool) -> None:
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        if kind == "full":
            model, dtype = small_model(torch.float32), torch.float32
        elif kind == "bfloat16 products":
            model, dtype = small_model(torch.float32), torch.bfloat16
        else:
            model, dtype = adapted(torch.bfloat16, 0.3 if "dropout" in kind else 0.0), torch.bfloat16
        names = list(model.state_dict())
        if is_checkpointed:
            checkpoint_layers(model, num_layers)
        assert list(model.state_dict()) == names
        results.append(loss_and_gradients(model, dtype))
    (kept_loss, kept), (again_loss, again) = results
    assert kept_loss == again_loss and kept.keys() == again.keys()
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name]) and gradient.any(), name


def kept_bytes(model: Gemma2ForCausalLM) -> int:
    """What the forward pass keeps that grows with depth."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = batch_of(packed_row(9, 14, 3))
        model.model(batch.input_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("make", [small_model, adapted])
def test_a_layer_keeps_its_input_only(make: Any) -> None:
    all_kept = kept_bytes(make(torch.float32))
    model = make(torch.float32)
    checkpoint_layers(model)
    angles = 2 * 26 * 8 * 4  # of RoPE: for each position and channel pair, shared by all layers
    outside = 26 * (32 + 1) * 4  # the last norm's input and its 1 / rms
    inputs = 4 * 26 * 32 * 4
    assert kept_bytes(model) <= inputs + outside + angles < all_kept / 4


def test_measuring_runs_a_layer_once() -> None:
    model = small_model()
    checkpoint_layers(model)
    batch = batch_of(packed_row(9))
    with torch.no_grad():
        result = model.model(batch.input_ids)
    assert torch.equal(result, small_model().model(batch.input_ids))


def test_mistakes() -> None:
    model = small_model()
    with pytest.raises(ConfigError, match="a number of layers from 0 to 4, the layers of the model, but is 5"):
        checkpoint_layers(model, 5)
    checkpoint_layers(model, 1)
    with pytest.raises(ValueError, match="call it once"):
        checkpoint_layers(model)
