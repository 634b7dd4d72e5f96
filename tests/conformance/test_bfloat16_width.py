"""bf16 at the full width of the 2B: no further from float32 than transformers' bf16 is."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from backends import torch_model
from cases import divergence
from hf_reference import Weights, cast, hf_model

from gemma2.checkpoints import expected_tensors
from gemma2.config import PRESETS
from gemma2.model import TorchBackend
from gemma2.step import SequenceStep, StepBatch

CONFIG = PRESETS["2b"].replace(num_hidden_layers=2, vocab_size=4096)
"""Width, heads and MLP of the 2B: what rounding depends on. Two layers and a small vocabulary, to be quick."""

LENGTH = 48


@pytest.fixture(scope="module")
def weights() -> Iterator[Weights]:
    """Weights of trained size, rounded to bf16 so that only the arithmetic differs."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in expected_tensors(CONFIG).items():
        deviation = 0.3 if "norm" in name else 0.05 if "embed" in name else shape[-1] ** -0.5
        value = torch.empty(shape).normal_(0.0, deviation, generator=generator)
        if "q_proj" in name or "k_proj" in name:
            value *= 2.0
        if name == "model.norm.weight":
            value -= 1.0 - torch.empty(shape).normal_(0.0, 1.0, generator=generator)
        made[name] = value.bfloat16().float().numpy()
    yield made
    made.clear()
    gc.collect()


@torch.inference_mode()
def test_divergence_from_float32_is_no_worse_than_transformers(weights: Weights) -> None:
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, LENGTH))
    batch = torch.from_numpy(ids)
    theirs = hf_model(CONFIG, weights, torch.float32)
    expected = theirs(batch, use_cache=False).logits.numpy()
    theirs = cast(theirs, torch.bfloat16)
    their_logits = theirs(batch, use_cache=False).logits.float().numpy()
    del theirs

    model = torch_model(CONFIG, weights, torch.bfloat16)
    our_logits = model(batch).numpy()
    backend = TorchBackend(model)
    for row in range(len(ids)):  # decode and a chunk after it must be as good as one pass
        pieces = []
        for first, last in ((0, 30), (30, 31), (31, LENGTH)):
            part = SequenceStep(
                sequence_id=row,
                token_ids=ids[row, first:last].astype(np.int32),
                position=first,
                num_logits=last - first,
            )
            pieces.append(backend.forward(StepBatch(steps=(part,))))
        stepped = np.concatenate(pieces)
        ours, stepped_divergence, their = (
            divergence(expected[row], logits) for logits in (our_logits[row], stepped, their_logits[row])
        )
        assert 0 < ours <= their and 0 < stepped_divergence <= their, (row, ours, stepped_divergence, their)
