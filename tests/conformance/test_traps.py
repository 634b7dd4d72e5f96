"""Mistakes that public Gemma 2 implementations have made in attention and numerics, each with a test of its own.

The numbers are those of the list that this project keeps; `test_mutations.py` makes most of them on purpose.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS, BackendSpec, excess, run_in_chunks, step, torch_model
from cases import BASE, LENGTH, WINDOW, biting_weights, reference, token_ids
from hf_reference import hf_model
from torch.nn import functional as F

from gemma2.checkpoints import open_checkpoint, save_checkpoint
from gemma2.config import FULL, PRESETS, SLIDING, Gemma2Config
from gemma2.errors import ConfigError
from gemma2.model import Gemma2ForCausalLM, KVCache, TorchBackend, load_model, modeling, state_arrays, torch_backend
from gemma2.model.attention import capped_attention
from gemma2.step import StepBatch
from gemma2.training.linear_cross_entropy import linear_cross_entropy

IDS = torch.from_numpy(token_ids(BASE).astype(np.int64))[None]


@torch.inference_mode()
def influence(config: Gemma2Config) -> torch.Tensor:
    """(L, L) bool: whether the logits at a position (row) change when the token at another (column) does."""
    # Queries so small that no visible token gets a weight of exactly zero.
    weights = {
        name: value * np.float32(0.1) if "q_proj" in name else value for name, value in biting_weights(config).items()
    }
    model = torch_model(config, weights, torch.float64)
    before = model(IDS.repeat(LENGTH, 1))
    changed = IDS.repeat(LENGTH, 1)
    changed[torch.arange(LENGTH), torch.arange(LENGTH)] += 1
    changed %= config.vocab_size
    change: torch.Tensor = model(changed) - before
    return (change.abs() > 1e-9).any(dim=-1).T


@functools.cache
def base_model() -> Gemma2ForCausalLM:
    """The float32 model of the base case."""
    with torch.inference_mode(False):  # whichever test asks first
        return torch_model(BASE, biting_weights(BASE))


def test_trap_01_no_kernel_that_drops_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """scaled_dot_product_attention has no cap. It must not be used, not even where a cap is switched off elsewhere."""

    def refuse(*inputs: Any, **options: Any) -> None:
        raise AssertionError("scaled_dot_product_attention was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(torch._C._nn, "scaled_dot_product_attention", refuse)
    logits = run_in_chunks(BACKENDS[0].make(BASE, biting_weights(BASE)), token_ids(BASE), [20, 1])
    assert excess("float32", BASE, logits) <= 1


def test_trap_02_even_layers_are_local_and_the_last_is_global() -> None:
    for preset in PRESETS.values():
        assert [preset.is_local(index) for index in range(4)] == [True, False, True, False]
        assert not preset.is_local(preset.num_hidden_layers - 1)
        layers: Any = Gemma2ForCausalLM(preset, device="meta").model.layers
        assert [layer.self_attn.is_local for layer in layers[:4]] == [True, False, True, False]
    # What the type does: through a local layer the first token's influence ends, through a global one it does not.
    local = influence(BASE.replace(num_hidden_layers=1, layer_types=(SLIDING,)))
    full = influence(BASE.replace(num_hidden_layers=1, layer_types=(FULL,)))
    assert not local[WINDOW:, 0].any() and full[WINDOW:, 0].any()


@pytest.mark.parametrize("window", [1, 2, WINDOW])
def test_trap_03_a_window_of_w_sees_w_tokens(window: int) -> None:
    """Itself and W - 1 before it, and nothing after it."""
    sees = influence(BASE.replace(num_hidden_layers=1, layer_types=(SLIDING,), sliding_window=window))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    assert torch.equal(sees, (distance >= 0) & (distance < window))


@torch.inference_mode()
@pytest.mark.parametrize("length", range(WINDOW - 2, WINDOW + 3))
def test_trap_04_the_cache_at_the_windows_edge(length: int) -> None:
    """Its length is that of the text and not of a local layer; what a local layer keeps is W - 1 tokens."""
    cache = KVCache(BASE)
    base_model()(IDS[:, :length], past_key_values=cache)
    assert cache.num_tokens == length
    assert [layer.num_tokens for layer in cache.layers] == [min(length, WINDOW - 1), length] * 2
    following = base_model()(IDS[:, length : length + 1], past_key_values=cache)
    expected = reference(BASE).logits[length]
    assert np.abs(following[0, 0].numpy() - expected).max() <= reference(BASE).tolerance


@torch.inference_mode()
def test_trap_05_a_chunk_longer_than_the_window() -> None:
    """Early queries of the chunk still need keys that its last ones are past, and keys from before the chunk."""
    cache = KVCache(BASE)
    pieces = [base_model()(part, past_key_values=cache) for part in torch.split(IDS, [WINDOW, 3 * WINDOW, 22], dim=1)]
    logits = torch.cat(pieces, dim=1)[0].numpy()
    assert np.abs(logits - reference(BASE).logits).max() <= reference(BASE).tolerance


def test_trap_06_rows_that_see_nothing_are_zero_and_not_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    attention = capped_attention

    def recorded(*qkv: torch.Tensor, **given: Any) -> torch.Tensor:
        outputs.append(attention(*qkv, **given))
        return outputs[-1]

    monkeypatch.setattr(modeling, "capped_attention", recorded)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :17] = 0
    mask[1] = 0
    model = torch_model(BASE, biting_weights(BASE))
    logits = model(IDS.repeat(2, 1), segment_ids=mask)
    assert torch.isfinite(logits).all()
    assert len(outputs) == 4
    for output in outputs:
        assert not output[mask == 0].any() and output[mask == 1].any()
    logits[mask == 1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_trap_07_what_scores_are_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of 256 for 9B, and not of 224; of 144 for 27B, and not of 128."""
    assert {name: 1 / preset.query_scale for name, preset in PRESETS.items()} == {
        "2b": 16,
        "9b": 16,
        "27b": pytest.approx(12, rel=1e-15),
    }
    scales = []
    attention = capped_attention

    def recorded(*qkv: torch.Tensor, **given: Any) -> torch.Tensor:
        scales.append(given["scale"])
        return attention(*qkv, **given)

    monkeypatch.setattr(modeling, "capped_attention", recorded)
    small = PRESETS["27b"].replace(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=160)
    Gemma2ForCausalLM(small)(IDS[:, :3])
    assert scales == [144**-0.5] * 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trap_08_head_size_256_has_a_backward_pass(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = BASE.replace(head_dim=256, query_pre_attn_scalar=256)
    model = torch_model(config, biting_weights(config), dtype, device)
    loss = F.cross_entropy(model(IDS.to(device))[0, :-1], IDS[0, 1:].to(device))
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_trap_09_float16_is_refused_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot run in float16.*Use bfloat16"):
        Gemma2ForCausalLM(BASE, dtype=torch.float16)
    halved = torch_model(BASE, biting_weights(BASE)).half()
    with pytest.raises(ValueError, match="cannot run in float16"):
        halved(IDS)
    with pytest.raises(ValueError, match="cannot run in float16"):
        TorchBackend(halved)
    save_checkpoint(tmp_path / "model", BASE, state_arrays(base_model()))
    checkpoint = open_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot run in float16"):
        load_model(checkpoint, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"but is 'float16'. Gemma 2 overflows float16"):
        load_model(checkpoint, dtype="float16")


def test_trap_10_the_loss_has_the_final_cap() -> None:
    """Greedy decoding would hide it, since tanh keeps the order; transformers' loss does not."""
    assert float(base_model()(IDS).detach().abs().max()) <= 30
    theirs = hf_model(BASE, biting_weights(BASE), torch.float32)(IDS, labels=IDS).loss
    ours = F.cross_entropy(base_model()(IDS)[0, :-1], IDS[0, 1:])
    chunked = linear_cross_entropy(
        base_model().model(IDS)[0, :-1],
        base_model().lm_head.weight,
        IDS[0, 1:],
        cap=BASE.final_logit_softcapping,
    )
    forgotten = linear_cross_entropy(base_model().model(IDS)[0, :-1], base_model().lm_head.weight, IDS[0, 1:], cap=None)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert torch.allclose(chunked / (LENGTH - 1), theirs, rtol=1e-5)
    assert forgotten / (LENGTH - 1) > 1.1 * theirs


def test_trap_11_logits_are_never_built_for_all_rows(spec: BackendSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees the rows that were asked for, a bounded number of logits at a time."""
    if not spec.name.startswith("torch"):
        pytest.skip("a test of the PyTorch backend's head")
    monkeypatch.setattr(torch_backend, "HEAD_CHUNK_LOGITS", 8 * BASE.vocab_size + 3)
    rows: list[int] = []
    forward = torch.nn.Linear.forward

    def recorded(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == BASE.vocab_size:
            rows.append(x.numel() // x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", recorded)
    backend = spec.make(BASE, biting_weights(BASE))
    ids = token_ids(BASE)
    backend.forward(StepBatch(steps=(step(0, ids, 0, 1), step(1, ids, 0, 0), step(2, ids, 0, 20))))
    assert rows == [1, 8, 8, 4]
