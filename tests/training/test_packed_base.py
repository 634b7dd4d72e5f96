"""Frozen maps on the engine's 8-bit kernels: products, losses and gradients beside the numbers that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import CONFIG, batch_of, loss_and_gradients, packed_row, with_adapter
from torch import Tensor, nn

from gemma2 import _kernels as kernels
from gemma2.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from gemma2.checkpoints.packing import pack_model
from gemma2.model.loading import load_model, state_arrays
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.adapters import add_adapter
from gemma2.training.head_loss import head_of
from gemma2.training.packed_base import EngineProducts, PackedEmbedding, PackedLinear, load_packed
from gemma2.training.preference import segment_log_probs
from gemma2.training.tune_settings import AdapterSettings

pytest.importorskip("peft")


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).detach().norm() / expected.detach().norm())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Wide enough that rounding by groups of 32 averages out."""
    config = CONFIG.replace(hidden_size=96, intermediate_size=160, head_dim=32, vocab_size=150)
    model = Gemma2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1 if "norm" in name else 0.15, generator=generator)
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_checkpoint(folder, config, state_arrays(model), dtype="float32")
    return open_checkpoint(folder)


def adapted(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    return with_adapter(model, r=4, lora_alpha=8, std=0.1)


def with_the_same_numbers(model: Gemma2ForCausalLM, checkpoint: Checkpoint) -> Gemma2ForCausalLM:
    """An ordinary model whose weights are those that a packed one's products are made with."""
    plain = load_model(checkpoint, dtype="float32")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear | PackedEmbedding) and name != "lm_head":
                plain.get_submodule(name).weight.copy_(module.matrix.dequantized())  # type: ignore[operator, union-attr]
    return plain


def loss_and_gradient(model: Gemma2ForCausalLM, dtype: torch.dtype = torch.float32) -> tuple[float, Tensor]:
    """Of a row of three documents; the gradients of all adapters one after the other."""
    loss, gradients = loss_and_gradients(model, dtype)
    return loss, torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_both_products_are_those_of_the_rounded_weights(weight_format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(1100, 192, generator=generator)  # more outputs than are packed by columns at a time
    matrix = EngineProducts(1).pack(weight_OI, weight_format)
    numbers_OI = matrix.dequantized()
    assert relative_error(numbers_OI, weight_OI) < {"q8": 0.01, "q4": 0.12}[weight_format]
    x_TI, grad_TO = torch.randn(7, 192, generator=generator), torch.randn(7, 1100, generator=generator)
    assert relative_error(matrix.outputs(x_TI).clone(), x_TI @ numbers_OI.T) < 0.01
    assert relative_error(matrix.inputs(grad_TO).clone(), grad_TO @ numbers_OI) < 0.01
    ids = torch.tensor([3, 1099, 3])
    assert torch.equal(matrix.look_up(ids), numbers_OI[ids])


@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_loss_and_gradients_are_those_of_the_rounded_weights(checkpoint: Checkpoint, weight_format: str) -> None:
    packed = load_packed(checkpoint, weight_format, dtype=torch.float32, num_threads=1)
    plain = adapted(with_the_same_numbers(packed, checkpoint))
    loss, gradient = loss_and_gradient(adapted(packed))
    expected, expected_gradient = loss_and_gradient(plain)
    assert loss == pytest.approx(expected, rel=2e-3)
    # Activations and gradients in 8 bits, in each of four layers whose caps bite.
    assert relative_error(gradient, expected_gradient) < 0.08


def test_in_bfloat16(checkpoint: Checkpoint) -> None:
    """Not much farther from float32 than bf16 products are."""
    expected, expected_gradient = loss_and_gradient(adapted(load_model(checkpoint, dtype="float32")))
    models = (
        load_model(checkpoint, dtype="bfloat16"),
        load_packed(checkpoint, "q8", dtype=torch.bfloat16, num_threads=1),
    )
    (plain, plain_gradient), (packed, gradient) = (loss_and_gradient(adapted(m), torch.bfloat16) for m in models)
    print(
        plain,
        packed,
        expected,
        relative_error(plain_gradient, expected_gradient),
        relative_error(gradient, expected_gradient),
    )
    assert packed == pytest.approx(expected, rel=3e-3)
    assert relative_error(gradient, expected_gradient) < 3 * relative_error(plain_gradient, expected_gradient)


@torch.no_grad()
def test_updates_below_the_steps_of_bfloat16_are_not_lost(checkpoint: Checkpoint) -> None:
    """They are added in float32 and rounded once; onto a result that is bf16 already, hardly any would show."""
    changes = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load_packed(checkpoint, "q8", dtype=dtype, num_threads=1)
        add_adapter(model, AdapterSettings(r=4, target_modules=["down_proj"]), seed=0)
        layer: Any = model.model.layers[0].mlp.down_proj  # type: ignore[union-attr]
        x = torch.randn(4000, 160, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
        before = layer(x).float()
        nn.init.constant_(layer.lora_B["default"].weight, 1e-4)
        changes.append(layer(x).float() - before)
    seen, meant = changes
    assert (meant.abs() < 2**-9 * before.abs()).float().mean() > 0.8  # half a step of bf16
    assert (seen * meant).sum() / meant.square().sum() == pytest.approx(1.0, abs=0.1)


def test_log_probabilities_and_the_head(checkpoint: Checkpoint) -> None:
    packed = load_packed(checkpoint, "q8", dtype=torch.float32, num_threads=1)
    plain = with_the_same_numbers(packed, checkpoint)
    assert head_of(packed) is not None and head_of(plain) is None
    batch = batch_of(packed_row(9, 14))
    sums = segment_log_probs(packed, batch, compute_dtype=torch.float32)
    torch.testing.assert_close(sums, segment_log_probs(plain, batch, compute_dtype=torch.float32), rtol=3e-3, atol=0)
    with torch.no_grad():
        logits, expected = packed(batch.input_ids), plain(batch.input_ids)
    assert relative_error(logits, expected) < 0.02


def test_weights_are_nowhere_to_be_read(checkpoint: Checkpoint) -> None:
    packed = load_packed(checkpoint, "q4", dtype=torch.bfloat16, num_threads=1)
    for name, parameter in packed.named_parameters():
        assert "norm" in name or (parameter.isnan().all() and parameter.untyped_storage().nbytes() == 2), name
    assert packed.lm_head.weight is packed.model.embed_tokens.weight


def test_layers_are_what_the_engine_runs(checkpoint: Checkpoint) -> None:
    for weight_format in ("q8", "q4"):
        packed = load_packed(checkpoint, weight_format, dtype=torch.float32, num_threads=1)
        attention: Any = packed.model.layers[1].self_attn  # type: ignore[union-attr]
        ours = torch.cat([getattr(attention, f"{name}_proj").matrix.dequantized() for name in "qkv"])
        data = pack_model(checkpoint, weight_format, num_threads=1).tensors["model.layers.1.self_attn.qkv_proj.weight"]
        its = kernels.unpack_matrix(kernels.Runtime(1), kernels.Matrix(weight_format, *ours.shape, data))
        assert torch.equal(ours, torch.from_numpy(its))
