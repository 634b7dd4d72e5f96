"""Our arithmetic of LoRA against PEFT's own and against the formula: values, gradients; what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_model import DOCUMENTS, batch_of, loss_and_gradients, packed_row, small_model, with_adapter
from torch import Tensor

from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.adapters import adapters_disabled
from gemma2.training.lean_lora import use_lean_lora
from gemma2.training.objectives import next_token_objective

pytest.importorskip("peft")


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> Gemma2ForCausalLM:
    return with_adapter(small_model(dtype), **settings)


def loss_of(model: Gemma2ForCausalLM, dtype: torch.dtype = torch.float64) -> Tensor:
    return next_token_objective(compute_dtype=dtype, compiled=False)(model, batch_of(DOCUMENTS))


def assert_near(ours: Gemma2ForCausalLM, theirs: Gemma2ForCausalLM, dtype: torch.dtype, tolerance: float) -> None:
    loss, gradients = loss_and_gradients(ours, dtype)
    expected, expected_gradients = loss_and_gradients(theirs, dtype)
    assert loss == pytest.approx(expected, rel=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        wanted = expected_gradients[name]
        assert (gradient - wanted).abs().max() <= tolerance * wanted.abs().max(), name


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"layers_to_transform": [1]}]
)
def test_float32_equals_peft(settings: dict[str, Any]) -> None:
    ours, theirs = adapted(torch.float32, **settings), adapted(torch.float32, is_lean=False, **settings)
    # float32 sums of a few dozen terms in another order
    assert_near(ours, theirs, torch.float32, 2e-5)


def test_float64_equals_the_formula() -> None:
    """The update added to the weights where autograd sees it; adapters themselves are float32, as are gradients."""
    model, plain = adapted(), small_model()
    loss, gradients = loss_and_gradients(model, torch.float64)
    factors = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    parameters = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    for name in list(parameters):
        a, b = (factors.get(name.replace(".weight", f".lora_{side}.default.weight")) for side in "AB")
        if a is not None and b is not None:
            parameters[name] = parameters[name] + 2.0 * b @ a
    batch = batch_of(DOCUMENTS)
    places = {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids}
    logits = torch.func.functional_call(plain, parameters, (batch.input_ids,), places)
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert len(gradients) == 2 * 4 * 7
    for name, gradient in gradients.items():
        wanted = factors[name].grad
        assert wanted is not None and (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max(), name


def test_bfloat16_is_as_near_to_float32_as_peft() -> None:
    exact = loss_and_gradients(adapted(torch.float32), torch.float32)[1]
    errors = []
    for is_lean in (True, False):
        rounded = loss_and_gradients(adapted(torch.bfloat16, is_lean=is_lean), torch.bfloat16)[1]
        errors.append(sum(float((rounded[name] - exact[name]).norm() / exact[name].norm()) for name in exact))
    assert errors[0] < 1.25 * errors[1]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.4}])
def test_what_is_not_plain_lora_is_pefts(settings: dict[str, Any]) -> None:
    losses = []
    for is_lean in (True, False):
        model = adapted(torch.float32, is_lean=is_lean, **settings)
        torch.manual_seed(0)
        losses.append(loss_of(model, torch.float32).item())
        model.eval()  # dropout is in training only
        losses.append(loss_of(model, torch.float32).item())
    assert losses[0] == losses[2]
    assert losses[1] == pytest.approx(losses[3], rel=1e-6)


def test_mixed_precision_by_autocast_is_pefts() -> None:
    losses = [loss_of(adapted(torch.float32, is_lean=is_lean), torch.bfloat16).item() for is_lean in (True, False)]
    assert losses[0] == losses[1]


def test_disabled_it_is_the_model_without_and_a_copy_is_a_model_of_its_own() -> None:
    model = adapted()
    expected = loss_of(small_model()).item()
    with adapters_disabled(model):
        assert loss_of(model).item() == expected
    adapted_loss = loss_of(model).item()
    assert adapted_loss != expected
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert loss_of(other).item() == expected
    assert loss_of(model).item() == adapted_loss


def test_inputs_that_can_be_made_again_are_not_kept() -> None:
    """Of the four inputs of a layer's seven maps, only what attention gives is kept."""
    model = adapted(torch.bfloat16)
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(batch_of(packed_row(20)).input_ids)
    # gate and up of each layer, for GeGLU and for down_proj; their product nowhere
    assert shapes.count((1, 20, 48)) == 4 * 4
    hidden.float().sum().backward()


def test_no_adapters_nothing_to_do() -> None:
    assert use_lean_lora(small_model()) == 0
    assert use_lean_lora(adapted(is_lean=False)) == 4 * 7
