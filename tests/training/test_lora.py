"""Our LoRA against plain autograd and against PEFT: names, values, gradients; what is kept; mistakes."""

from __future__ import annotations

import pytest
import torch
from small_model import CONFIG, batch_of, packed_row, small_model
from torch import Tensor

from gemma2.errors import ConfigError
from gemma2.memory import adapter_parameters
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.lora import LoraLinear, add_lora, lora_disabled
from gemma2.training.objectives import next_token_objective


def adapted(dtype: torch.dtype = torch.float64, **settings: object) -> Gemma2ForCausalLM:
    """With updates that are not zero."""
    model = small_model(dtype)
    generator = torch.Generator().manual_seed(1)
    add_lora(model, **{"rank": 3, "alpha": 6, "generator": generator, **settings})  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def loss_of(model: Gemma2ForCausalLM, dtype: torch.dtype = torch.float64) -> Tensor:
    return next_token_objective(compute_dtype=dtype, compiled=False)(model, batch_of(packed_row(9, 14, 3, padding=4)))


def test_value_and_gradients_are_those_of_the_formula() -> None:
    """The same update, added to the weights where autograd sees it."""
    model, plain = adapted(), small_model()
    loss = loss_of(model)
    loss.backward()  # type: ignore[no-untyped-call]
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            factors = [factor.detach().double().requires_grad_() for factor in (a, b)]
            updates[name] = (a, b, factors)
    parameters = {
        **{name: parameter.detach() for name, parameter in plain.named_parameters()},
        **{
            f"{name}.weight": plain.get_parameter(f"{name}.weight").detach() + 2.0 * factors[1] @ factors[0]
            for name, (_, _, factors) in updates.items()
        },
    }
    batch = batch_of(packed_row(9, 14, 3, padding=4))
    logits = torch.func.functional_call(
        plain,
        parameters,
        (batch.input_ids,),
        {"position_ids": batch.position_ids, "segment_ids": batch.segment_ids},
    )
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    expected.backward()
    for a, b, factors in updates.values():
        for parameter, factor in zip((a, b), factors, strict=True):
            assert parameter.grad is not None and factor.grad is not None
            # Adapters are float32, and so are their gradients.
            assert (parameter.grad - factor.grad).abs().max() <= 1e-6 * factor.grad.abs().max()
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * len(updates) == 2 * 4 * 7


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_takes_the_adapter_and_gives_the_same_loss(use_rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    from hf_reference import hf_config
    from transformers import Gemma2ForCausalLM as Reference

    model = adapted(torch.float32, use_rslora=use_rslora)
    theirs = peft.get_peft_model(
        Reference(hf_config(CONFIG)),
        peft.LoraConfig(r=3, lora_alpha=6, use_rslora=use_rslora, target_modules="all-linear"),
    )
    state = {f"base_model.model.{name}": value for name, value in model.state_dict().items()}
    theirs.load_state_dict(state)  # strict: every name is the same
    packed = packed_row(24)
    batch = batch_of(packed)
    loss = next_token_objective(compute_dtype=torch.float32, compiled=False)(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = torch.nn.functional.cross_entropy(theirs(batch.input_ids).logits[0], batch.labels[0], reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        reference = theirs.get_parameter(f"base_model.model.{name}")
        assert parameter.requires_grad == reference.requires_grad, name
        if parameter.grad is not None:
            assert (parameter.grad - reference.grad).abs().max() <= 2e-4 * reference.grad.abs().max(), name


def test_a_new_adapter_changes_nothing_and_is_drawn_as_peft_draws_it() -> None:
    model, plain = small_model(), small_model()
    add_lora(model, rank=4, alpha=8)
    assert loss_of(model).item() == loss_of(plain).item()
    a = torch.cat([value.flatten() for name, value in model.named_parameters() if "down_proj.lora_A" in name])
    assert 0.9 / 48**0.5 < a.abs().max() <= 1 / 48**0.5
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == adapter_parameters(CONFIG, rank=4)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_chosen_modules_only() -> None:
    model = small_model()
    add_lora(model, rank=2, alpha=2, modules=["q_proj", "down_proj", "q_proj"])
    adapters = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert adapters == [f"model.layers.{i}.{name}" for i in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")]
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_disabled_it_is_the_model_without() -> None:
    model = adapted()
    expected = loss_of(small_model()).item()
    with lora_disabled(model):
        assert loss_of(model).item() == expected
    assert loss_of(model).item() != expected


def test_dropout_is_in_training_only_and_right_on_average() -> None:
    model = small_model()
    linear = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr]
    module = LoraLinear(linear, rank=2, alpha=4, dropout=0.5, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    torch.nn.init.ones_(module.lora_B["default"].weight)  # type: ignore[arg-type]
    x = torch.ones(1, 48, dtype=torch.float64)
    module.eval()
    expected = module(x)
    module.train()
    torch.manual_seed(0)
    outputs = torch.stack([module(x) for _ in range(4000)])
    deviation = outputs.std(0)
    assert deviation.min() > 0.1
    assert ((outputs.mean(0) - expected).abs() < 5 * deviation / 4000**0.5).all()


def test_inputs_that_can_be_made_again_are_not_kept() -> None:
    """Of the four inputs of a layer's seven maps, only what attention gives is kept."""
    model = adapted(torch.bfloat16)
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    batch = batch_of(packed_row(20))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(batch.input_ids)
    # gate and up of each layer, for GeGLU and for down_proj; their product nowhere
    assert shapes.count((1, 20, 48)) == 4 * 4
    hidden.float().sum().backward()


def test_bfloat16_follows_float32() -> None:
    exact, rounded = loss_of(adapted(torch.float32), torch.float32), loss_of(adapted(torch.bfloat16), torch.bfloat16)
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"no linear map 'qproj'.*Did you mean 'q_proj'\?"):
        add_lora(small_model(), rank=2, alpha=2, modules=["qproj"])
    with pytest.raises(ConfigError, match="at least 1, but is 0"):
        add_lora(small_model(), rank=0, alpha=2)
    with pytest.raises(ConfigError, match="from 0 to below 1, but is 1"):
        add_lora(small_model(), rank=2, alpha=2, dropout=1.0)
