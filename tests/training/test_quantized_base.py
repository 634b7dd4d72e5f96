"""Adapters over 4- and 8-bit maps against the same maps with the numbers that the library widens them to."""

from __future__ import annotations

import weakref

import pytest
import torch
from small_model import DOCUMENTS, batch_of, loss_and_gradients, packed_row, small_model, stacked, with_adapter
from torch import Tensor, nn

from gemma2.data import PackedBatch
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.objectives import next_token_objective
from gemma2.training.quantized_base import quantized_linear

pytest.importorskip("peft")
functional = pytest.importorskip("bitsandbytes.functional")


KINDS = ["nf4", "int8"]
BATCHES = {
    "one token": packed_row(1),
    "one row": DOCUMENTS,
    "rows": stacked(packed_row(20), packed_row(7, 13, seed=1)),
}


def dequantized(module: nn.Module) -> Tensor:
    """(O, I) float32, by the library."""
    if hasattr(module.weight, "quant_state"):
        widened: Tensor = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        widened = functional.int8_vectorwise_dequant(module.weight.data, module.state.SCB)
    return widened.float()


def quantized_and_widened(kind: str) -> tuple[Gemma2ForCausalLM, Gemma2ForCausalLM]:
    """Two models with the same numbers and the same adapters, whose updates are not zero."""
    # Sizes in multiples of 64, for which the library has kernels of its own.
    quantized, widened = (
        small_model(torch.float32, hidden_size=64, intermediate_size=128, num_hidden_layers=2) for _ in range(2)
    )
    for name, linear in list(widened.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            module = quantized_linear(kind, "float32", linear)
            parent, _, child = name.rpartition(".")
            setattr(quantized.model.layers.get_submodule(parent), child, module)
            linear.weight.data = dequantized(module)
    for model in (quantized, widened):
        with_adapter(model)
    return quantized, widened


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_losses_and_gradients_are_those_of_the_widened_weights(kind: str, batch: PackedBatch) -> None:
    quantized, widened = quantized_and_widened(kind)
    expected, expected_gradients = loss_and_gradients(widened, torch.float32, batch)
    assert len(expected_gradients) == 2 * 2 * 7
    for moment in ("at first", "after a validation"):
        loss, gradients = loss_and_gradients(quantized, torch.float32, batch)
        assert loss == pytest.approx(expected, rel=1e-5), moment
        for name, gradient in gradients.items():
            wanted = expected_gradients[name]
            # Of one token alone: queries and keys change nothing, and gradients are zero.
            scale = wanted.abs().max() if wanted.any() else 1.0
            # float32 sums of a few dozen terms in another order
            assert (gradient - wanted).abs().max() <= 2e-5 * scale, (moment, name)
        quantized.eval()
        with torch.no_grad():
            objective = next_token_objective(compute_dtype=torch.float32, compiled=False)
            assert objective(quantized, batch_of(batch)).item() == pytest.approx(expected, rel=1e-5)
        quantized.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_widened_matrix_whatever_the_mode(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, bias=False, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.3, generator=generator)
    module = quantized_linear(kind, str(dtype).removeprefix("torch."), linear)
    weight = dequantized(module).to(dtype)
    assert (weight - linear.weight).abs().max() < (0.15 if kind == "nf4" else 0.01)
    for is_training in (True, False, True):
        module.train(is_training)
        for shape in ((64,), (1, 64), (1, 1, 64), (2, 5, 64)):
            x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            g = torch.randn((*shape[:-1], 48), generator=generator).to(dtype)
            with torch.no_grad():
                torch.testing.assert_close(module(x.detach()), x.detach() @ weight.t())
            y = module(x)
            torch.testing.assert_close(y, x @ weight.t())
            y.backward(g)
            torch.testing.assert_close(x.grad, g @ weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_keeps_nothing(kind: str) -> None:
    """Neither its input, which layers that are computed again would else hold on to, nor the widened matrix."""
    module = quantized_linear(kind, "float32", nn.Linear(64, 32, bias=False))
    x = torch.randn(3, 64, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        y = module(x)
    noted = weakref.ref(x)
    del x
    assert noted() is None
    y.sum().backward()
