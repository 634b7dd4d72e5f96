"""Packed linear maps compute what the others do, and are left out where PyTorch cannot make them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from gemma2.config import Gemma2Config
from gemma2.model import Gemma2ForCausalLM, TorchBackend, packed_linear
from gemma2.model.packed_linear import PackedLinear, pack_linear_layers
from gemma2.step import Logits, SequenceStep, StepBatch

CONFIG = Gemma2Config(
    hidden_size=72,
    intermediate_size=200,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    vocab_size=160,
    sliding_window=12,
    max_position_embeddings=256,
    initializer_range=0.2,
)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What PyTorch can do is asked once a process; here it is made to differ."""
    packed_linear._can_pack.cache_clear()
    yield
    packed_linear._can_pack.cache_clear()


def model(dtype: torch.dtype = torch.bfloat16) -> Gemma2ForCausalLM:
    """The same weights every time."""
    made = Gemma2ForCausalLM(CONFIG, dtype=dtype)
    made.initialize(torch.Generator().manual_seed(0))
    return made


def run(backend: TorchBackend) -> Logits:
    """A chunk of 40 tokens and five single ones."""
    ids = np.arange(3, 48, dtype=np.int32)
    steps = [(0, 40), *((position, position + 1) for position in range(40, 45))]
    rows = [
        backend.forward(
            StepBatch(
                steps=(SequenceStep(sequence_id=0, token_ids=ids[first:last], position=first, num_logits=last - first),)
            )
        )
        for first, last in steps
    ]
    return np.concatenate(rows)


def test_logits_are_the_same() -> None:
    packed = model()
    if not pack_linear_layers(packed):
        pytest.skip("this processor's PyTorch does not pack bf16")
    kinds = [type(module) for module in packed.model.layers.modules()]
    assert kinds.count(PackedLinear) == 7 * 3 and nn.Linear not in kinds
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    # The sums may be split otherwise, so to the last place of bf16; on AVX-512 BF16 they are the same bits.
    assert np.abs(run(TorchBackend(packed)) - run(TorchBackend(model()))).max() <= 0.25
    assert "(q_proj): PackedLinear(in_features=72, out_features=64, bias=False)" in str(packed)


def test_the_unpacked_matrices_are_gone() -> None:
    packed = model()
    if not pack_linear_layers(packed):
        pytest.skip("this processor's PyTorch does not pack bf16")
    left = sum(parameter.numel() for parameter in packed.parameters())
    assert left == CONFIG.vocab_size * CONFIG.hidden_size + (4 * 3 + 1) * CONFIG.hidden_size


def test_float32_is_left_alone() -> None:
    whole = model(torch.float32)
    assert not pack_linear_layers(whole)
    assert not any(isinstance(module, PackedLinear) for module in whole.modules())


@pytest.mark.parametrize("fault", ["raises", "wrong", "unsupported"])
def test_a_pytorch_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def forward(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no such operation")
        return torch.zeros(*x.shape[:-1], self.out_features, dtype=x.dtype)

    if fault == "unsupported":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    else:
        monkeypatch.setattr(PackedLinear, "forward", forward)
    whole = model()
    assert not pack_linear_layers(whole)
    assert np.isfinite(run(TorchBackend(whole))).all()
