"""The next-token objective against transformers, value and gradient, in float64; packed against separate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma2.config import Gemma2Config
from gemma2.data import PackedBatch
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.objectives import Batch, next_token_objective

CONFIG = Gemma2Config(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=12,
    vocab_size=150,
    sliding_window=5,
    max_position_embeddings=64,
    attn_logit_softcapping=2.0,  # low, so that both caps bite
    final_logit_softcapping=3.0,
)


def _model(dtype: torch.dtype = torch.float64) -> Gemma2ForCausalLM:
    model = Gemma2ForCausalLM(CONFIG, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


def _packed(*lengths: int, padding: int = 0) -> PackedBatch:
    """One row of documents of random tokens, with padding at its end."""
    draw = np.random.default_rng(0)
    columns: list[list[int]] = [[], [], [], []]
    for segment, length in enumerate(lengths, start=1):
        ids = [2, *draw.integers(3, 150, length).tolist()]
        columns[0] += ids[:-1]
        columns[1] += ids[1:]
        columns[2] += range(length)
        columns[3] += [segment] * length
    for column, filler in zip(columns, (0, -100, 0, 0), strict=True):
        column += [filler] * padding
    arrays = [np.array([column], dtype=np.int64) for column in columns]
    return PackedBatch(input_ids=arrays[0], labels=arrays[1], positions=arrays[2], segment_ids=arrays[3])


def _loss_and_gradients(model: Gemma2ForCausalLM, packed: PackedBatch) -> tuple[float, dict[str, torch.Tensor]]:
    objective = next_token_objective(compute_dtype=torch.float64, compiled=False)
    loss = objective(model, Batch.on_device(packed, torch.device("cpu")))
    names = [name for name, _ in model.named_parameters()]
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_packed_documents_train_as_separate_ones() -> None:
    model = _model()
    whole_loss, whole = _loss_and_gradients(model, _packed(9, 14, 3, padding=4))
    packed = _packed(9, 14, 3, padding=4)
    losses, parts = [], []
    for first, last in ((0, 9), (9, 23), (23, 26)):
        piece = PackedBatch(
            input_ids=packed.input_ids[:, first:last],
            labels=packed.labels[:, first:last],
            positions=packed.positions[:, first:last],
            segment_ids=np.ones((1, last - first), dtype=np.int64),
        )
        loss, gradients = _loss_and_gradients(model, piece)
        losses.append(loss)
        parts.append(gradients)
    assert whole_loss == pytest.approx(sum(losses), rel=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-9, atol=1e-11)


def test_gradients_equal_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = _model(torch.float32)
    values = {key: value for key, value in CONFIG.to_dict().items() if key != "architectures"}
    reference = transformers.Gemma2ForCausalLM._from_config(
        transformers.Gemma2Config(**values), attn_implementation="eager"
    )
    reference.load_state_dict(model.state_dict())
    packed = _packed(24)
    objective = next_token_objective(compute_dtype=torch.float32, compiled=False)
    loss = objective(model, Batch.on_device(packed, torch.device("cpu")))
    loss.backward()  # type: ignore[no-untyped-call]
    logits = reference(torch.from_numpy(packed.input_ids)).logits
    expected = torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(packed.labels[0]), reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = gradients[name].grad
        assert parameter.grad is not None and theirs is not None
        # float32 sums of a few dozen terms: relative to the tensor's largest entry.
        assert (parameter.grad - theirs).abs().max() <= 2e-4 * theirs.abs().max(), name


def test_bfloat16_products_follow_float32() -> None:
    model = _model(torch.float32)
    batch = Batch.on_device(_packed(30), torch.device("cpu"))
    exact = next_token_objective(compute_dtype=torch.float32, compiled=False)(model, batch)
    rounded = next_token_objective(compute_dtype=torch.bfloat16, compiled=False)(model, batch)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()
