"""Preferences: pairs in rows, references, metrics, mistakes. Values and gradients: test_against_transformers.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from small_model import batch_of, packed_row, small_model

from gemma2.data import PackedBatch
from gemma2.errors import ConfigError
from gemma2.training.objectives import MetricSums
from gemma2.training.preference import count_pairs, model_reference, preference_objective, segment_log_probs

F64 = torch.float64


def two_rows() -> PackedBatch:
    """Two pairs, and one pair with padding."""
    first, second = packed_row(4, 5, 6, 7), packed_row(8, 9, padding=5, seed=1)
    return PackedBatch(**{name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in vars(first)})


def test_segments_are_summed_each_on_its_own() -> None:
    model, packed = small_model(), two_rows()
    log_probs = segment_log_probs(model, batch_of(packed), compute_dtype=F64)
    assert log_probs.shape == (2, 4)
    assert not log_probs[1, 2:].any()
    assert count_pairs(packed) == 3
    alone = segment_log_probs(model, batch_of(packed_row(8, 9, seed=1)), compute_dtype=F64)
    torch.testing.assert_close(log_probs[1:, :2], alone, rtol=1e-12, atol=0)


def test_at_its_reference_a_model_has_no_margin() -> None:
    model = small_model()
    metrics = MetricSums()
    reference = model_reference(model, compute_dtype=F64)
    objective = preference_objective(reference=reference, compute_dtype=F64, metrics=metrics)
    assert objective(model, batch_of(two_rows())).item() == pytest.approx(3 * math.log(2), rel=1e-12)
    means = metrics.take()
    assert means["rewards/margins"] == means["rewards/accuracies"] == 0.0
    assert means["logps/chosen"] < 0
    assert metrics.take() == {}


def test_metrics_are_means_over_pairs_of_several_batches() -> None:
    model, metrics = small_model(), MetricSums()
    reference = model_reference(small_model(seed=1), compute_dtype=F64)
    objective = preference_objective(reference=reference, beta=0.5, compute_dtype=F64, metrics=metrics)
    batch = batch_of(two_rows())
    gains = segment_log_probs(model, batch, compute_dtype=F64) - reference(batch)
    margins = torch.stack([gains[0, 0] - gains[0, 1], gains[0, 2] - gains[0, 3], gains[1, 0] - gains[1, 1]])
    for first in (0, 1):
        objective(model, batch.rows(first, first + 1))
    means = metrics.take()
    assert means["rewards/margins"] == pytest.approx(0.5 * margins.mean().item(), rel=1e-9)
    assert means["rewards/accuracies"] == pytest.approx(float((margins > 0).double().mean()))
    assert means["rewards/chosen"] - means["rewards/rejected"] == pytest.approx(means["rewards/margins"])


def test_the_model_itself_is_the_reference_while_it_is_switched_off() -> None:
    model = small_model()
    weight = model.model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr]

    @contextlib.contextmanager
    def switched_off() -> Iterator[None]:
        with torch.no_grad():
            weight.sub_(1.0)
        yield
        with torch.no_grad():
            weight.add_(1.0)

    batch = batch_of(two_rows())
    with switched_off():
        expected = segment_log_probs(model, batch, compute_dtype=F64).detach()
    reference = model_reference(model, compute_dtype=F64, as_reference=switched_off)
    assert torch.equal(reference(batch), expected)
    assert not reference(batch).requires_grad
    assert not torch.equal(segment_log_probs(model, batch, compute_dtype=F64), expected)


def test_no_reference_is_one_that_finds_all_answers_alike() -> None:
    model, batch = small_model(), batch_of(packed_row(5, 6))
    log_probs = segment_log_probs(model, batch, compute_dtype=F64)
    loss = preference_objective(reference=None, beta=2.0, compute_dtype=F64)(model, batch)
    expected = -torch.nn.functional.logsigmoid(2.0 * (log_probs[0, 0] - log_probs[0, 1]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"no preference loss 'sigmoids'; .* Did you mean 'sigmoid'\?"):
        preference_objective(reference=None, loss_type="sigmoids", compute_dtype=F64)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="beta must be above 0, but is 0"):
        preference_objective(reference=None, beta=0.0, compute_dtype=F64)
    with pytest.raises(ConfigError, match=r"from 0 to below 0\.5, but is 0\.5"):
        preference_objective(reference=None, label_smoothing=0.5, compute_dtype=F64)
    with pytest.raises(ConfigError, match="of sigmoid and robust only; set it to 0 for ipo"):
        preference_objective(reference=None, loss_type="ipo", label_smoothing=0.1, compute_dtype=F64)
    objective = preference_objective(reference=None, compute_dtype=F64)
    with pytest.raises(ValueError, match="one stands without the other"):
        objective(small_model(), batch_of(packed_row(3, 4, 5)))
