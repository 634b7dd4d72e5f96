"""Backward passes written out, against autograd on the plain formulas in float64, in one block and in many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma2.model import lean_functions
from gemma2.model.attention import capped_attention, plan_attention
from gemma2.model.lean_functions import geglu, rms_norm
from gemma2.model.modeling import PytorchGELUTanh

GELU = PytorchGELUTanh()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def assert_same(function: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and gradients of a function against those of the plain formula."""
    result, expected = function(*inputs), plain(*inputs)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = draw(*expected.shape, seed=9).detach()
    gradients = torch.autograd.grad((result * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-12)


@pytest.fixture(params=[1 << 18, 40, 1], ids=["one block", "some rows", "row by row"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_functions, "BLOCK_VALUES", request.param)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * (1 + weight)


@pytest.mark.usefixtures("blocks")
def test_rms_norm() -> None:
    assert_same(lambda x, weight: rms_norm(x, weight, 0.01), plain_norm, draw(3, 5, 8), draw(8, seed=1))


@pytest.mark.usefixtures("blocks")
def test_geglu() -> None:
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    assert_same(lambda gate, up: geglu(gate, up, GELU), plain, draw(3, 5, 8), draw(3, 5, 8, seed=1))


@pytest.mark.usefixtures("blocks")
def test_inputs_may_lie_anyhow_in_memory() -> None:
    assert_same(
        lambda x, weight: rms_norm(x.transpose(0, 2), weight, 0.01),
        lambda x, weight: plain_norm(x.transpose(0, 2), weight),
        draw(8, 5, 3),
        draw(8, seed=1),
    )
    assert_same(
        lambda gate, up: geglu(gate.transpose(0, 2), up.transpose(0, 2)[:, :1].expand(-1, 5, -1), GELU),
        lambda gate, up: F.gelu(gate, approximate="tanh").transpose(0, 2) * up.transpose(0, 2)[:, :1],
        draw(8, 5, 3),
        draw(8, 5, 3, seed=1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 1111, 192), (1, 9, 2304)])
def test_training_inference_and_any_blocks_give_the_same_bits(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, up, weight = (draw(*size, seed=seed).detach().to(dtype) for seed, size in enumerate((shape, shape, shape[-1:])))
    wide = x.float()
    plain = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).to(dtype)
    for values in (lean_functions.BLOCK_VALUES, 1000):
        monkeypatch.setattr(lean_functions, "BLOCK_VALUES", values)
        assert torch.equal(rms_norm(x, weight, 1e-6), plain)
        assert torch.equal(geglu(x, up, GELU), GELU(x) * up)
        with torch.no_grad():
            assert torch.equal(rms_norm(x, weight, 1e-6), plain)
            assert torch.equal(geglu(x, up, GELU), GELU(x) * up)


def test_only_what_is_trained_gets_a_gradient() -> None:
    x, weight = draw(4, 8), draw(8, seed=1)
    expected = torch.autograd.grad(plain_norm(x, weight).sum(), [x, weight])
    torch.testing.assert_close(torch.autograd.grad(rms_norm(x, weight.detach(), 0.01).sum(), x)[0], expected[0])
    torch.testing.assert_close(torch.autograd.grad(rms_norm(x.detach(), weight, 0.01).sum(), weight)[0], expected[1])


# -- attention ------------------------------------------------------------------------------------------------------


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, cap: float | None, mask: Tensor) -> Tensor:
    """(B, L, N, H) by the formulas, with the whole square of scores; rows that see nothing are zero."""
    scores = 0.7 * torch.einsum("bkglh,bksh->bkgls", q, k)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~mask[:, None, None], -1e30)
    weights = torch.softmax(scores, dim=-1) * mask[:, None, None]
    return torch.einsum("bkgls,bksh->blkgh", weights, v).flatten(2, 3)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("query_block", [3, 256])
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention(cap: float | None, window: int | None, query_block: int, is_padded: bool) -> None:
    segments = torch.tensor([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    if not is_padded:
        segments = torch.ones_like(segments)
    positions = torch.arange(11).expand(2, 11)
    plan = plan_attention(
        position_ids_BL=positions,
        segment_ids_BL=segments if is_padded else None,
        key_position_ids_BS=positions,
        key_segment_ids_BS=segments if is_padded else None,
        window=window,
        has_gaps=False,
        query_block=query_block,
    )
    distance = positions[:, :, None] - positions[:, None, :]
    mask = (distance >= 0) & (distance < (window or 100)) & (segments[:, :, None] == segments[:, None, :])
    mask &= (segments != 0)[:, :, None]
    assert_same(
        lambda q, k, v: capped_attention(q, k, v, scale=0.7, cap=cap, plan=plan),
        lambda q, k, v: plain_attention(q, k, v, cap=cap, mask=mask),
        draw(2, 2, 3, 11, 8),
        draw(2, 2, 11, 8, seed=1),
        draw(2, 2, 11, 8, seed=2),
    )


def test_attention_in_bfloat16_has_gradients_near_the_exact_ones() -> None:
    positions = torch.arange(40)[None]
    plan = plan_attention(
        position_ids_BL=positions,
        segment_ids_BL=None,
        key_position_ids_BS=positions,
        key_segment_ids_BS=None,
        window=None,
        has_gaps=False,
        query_block=16,
    )
    inputs = [draw(1, 2, 3, 40, 16), draw(1, 2, 40, 16, seed=1), draw(1, 2, 40, 16, seed=2)]
    exact = capped_attention(*inputs, scale=0.5, cap=5.0, plan=plan)
    weights = draw(*exact.shape, seed=3).detach()
    expected = torch.autograd.grad((exact * weights).sum(), inputs)
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    gradients = torch.autograd.grad(
        (capped_attention(*narrow, scale=0.5, cap=5.0, plan=plan) * weights.bfloat16()).sum(), narrow
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        # Inputs, weights, their gradients and the result are each rounded to 2⁻⁹ of themselves.
        assert (gradient - wanted).abs().max() < 0.03 * wanted.abs().max()
