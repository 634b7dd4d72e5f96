"""The next-token objective: packed against separate in float64, and in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_model import DOCUMENTS, batch_of, loss_and_gradients, packed_row, small_model

from gemma2.data import PackedBatch
from gemma2.training.objectives import next_token_objective


def test_packed_documents_train_as_separate_ones() -> None:
    model = small_model()
    whole_loss, whole = loss_and_gradients(model, torch.float64)
    losses, parts = [], []
    for first, last in ((0, 9), (9, 23), (23, 26)):
        piece = PackedBatch(
            input_ids=DOCUMENTS.input_ids[:, first:last],
            labels=DOCUMENTS.labels[:, first:last],
            positions=DOCUMENTS.positions[:, first:last],
            segment_ids=np.ones((1, last - first), dtype=np.int64),
        )
        loss, gradients = loss_and_gradients(model, torch.float64, piece)
        losses.append(loss)
        parts.append(gradients)
    assert whole_loss == pytest.approx(sum(losses), rel=1e-12)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-9, atol=1e-11)


def test_bfloat16_products_follow_float32() -> None:
    model = small_model(torch.float32)
    batch = batch_of(packed_row(30))
    exact = next_token_objective(compute_dtype=torch.float32, compiled=False)(model, batch)
    rounded = next_token_objective(compute_dtype=torch.bfloat16, compiled=False)(model, batch)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()
