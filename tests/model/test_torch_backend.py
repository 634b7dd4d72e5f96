"""The PyTorch backend beyond conformance: neighbours change no bit, failures leave no half-written cache."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma2.config import Gemma2Config
from gemma2.model import Gemma2ForCausalLM, TorchBackend
from gemma2.model.modeling import Gemma2MLP
from gemma2.step import Backend, SequenceStep, StepBatch

CONFIG = Gemma2Config(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    query_pre_attn_scalar=24,
    vocab_size=160,
    sliding_window=12,
    max_position_embeddings=256,
    initializer_range=0.3,
)
IDS = np.random.default_rng(0).integers(0, 160, 60).astype(np.int32)


def model(dtype: torch.dtype = torch.float32) -> Gemma2ForCausalLM:
    """The same weights every time."""
    made = Gemma2ForCausalLM(CONFIG, dtype=dtype)
    made.initialize(torch.Generator().manual_seed(0))
    return made


def part(sequence_id: int, first: int, last: int, num_logits: int = 1) -> SequenceStep:
    """Tokens `first` … `last` - 1 of `IDS`."""
    return SequenceStep(sequence_id=sequence_id, token_ids=IDS[first:last], position=first, num_logits=num_logits)


def batch(*steps: SequenceStep) -> StepBatch:
    """One forward pass."""
    return StepBatch(steps=steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    alone: Backend = TorchBackend(model(dtype))
    expected = [alone.forward(batch(part(0, 0, 20))), *(alone.forward(batch(part(0, n, n + 1))) for n in range(20, 40))]
    crowded = TorchBackend(model(dtype))
    crowded.forward(batch(part(7, 0, 50)))
    found = [crowded.forward(batch(part(8, 0, 13, 5), part(0, 0, 20), part(9, 0, 1)))[5]]
    for n in range(20, 40):
        found.append(crowded.forward(batch(part(9, n - 19, n - 18), part(0, n, n + 1), part(8, n - 7, n - 6, 0)))[1])
    assert all(np.array_equal(ours[0], theirs) for ours, theirs in zip(expected, found, strict=True))


def test_a_failure_frees_the_sequence_that_was_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers before the failure hold keys that the others lack; such a cache must not be continued."""
    backend = TorchBackend(model())
    backend.forward(batch(part(0, 0, 10), part(1, 0, 10)))
    calls = 0

    def fail(self: Gemma2MLP, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise MemoryError
        return x

    with monkeypatch.context() as patch:
        patch.setattr(Gemma2MLP, "forward", fail)
        with pytest.raises(MemoryError):
            backend.forward(batch(part(0, 10, 12), part(1, 10, 12)))
    with pytest.raises(ValueError, match="position must be 0"):
        backend.forward(batch(part(1, 10, 12)))
    backend.forward(batch(part(1, 0, 12)))


def test_memory_is_given_back_with_the_sequence() -> None:
    backend = TorchBackend(model())
    assert backend.cache_bytes == 0
    backend.forward(batch(part(0, 0, 10), part(1, 0, 10)))
    both = backend.cache_bytes
    backend.free(0)
    assert backend.cache_bytes == both / 2
    backend.free(1)
    backend.free(12345)
    assert backend.cache_bytes == 0


def test_what_it_returns() -> None:
    backend = TorchBackend(model(torch.bfloat16), device="cpu")
    logits = backend.forward(batch(part(0, 0, 10, 10)))
    assert logits.shape == (10, 160) and logits.dtype == np.float32
    assert np.abs(logits).max() <= 30
    assert logits.flags.writeable and logits.flags.c_contiguous
    assert backend.config is CONFIG and backend.device.type == "cpu"


def test_a_model_that_is_trained_between_steps_is_seen() -> None:
    """The backend uses the model's parameters, not a copy; a trainer can generate samples as it goes."""
    trained = model()
    backend = TorchBackend(trained)
    before = backend.forward(batch(part(0, 0, 10)))
    with torch.no_grad():
        trained.model.norm.weight.add_(0.5)
    assert trained.model.norm.weight.requires_grad
    assert not np.array_equal(backend.forward(batch(part(1, 0, 10))), before)


def test_logits_of_many_rows_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchBackend(model())
    whole = backend.forward(batch(part(0, 0, 50, 33)))
    monkeypatch.setattr("gemma2.model.torch_backend.HEAD_CHUNK_LOGITS", 160 * 7)
    parts = backend.forward(batch(part(1, 0, 50, 33)))
    assert np.allclose(whole, parts, atol=1e-5)
    monkeypatch.setattr("gemma2.model.torch_backend.HEAD_CHUNK_LOGITS", 1)
    assert np.allclose(whole, backend.forward(batch(part(2, 0, 50, 33))), atol=1e-5)


def test_a_fork_goes_its_own_way() -> None:
    """Past the window, so that local layers have forgotten; then each continues without changing the other."""
    backend = TorchBackend(model())
    backend.forward(batch(part(0, 0, 30)))
    backend.fork(0, 1)
    both = backend.forward(batch(part(0, 30, 45, 15), part(1, 30, 45, 15)))
    assert np.array_equal(both[:15], both[15:])
    other = SequenceStep(sequence_id=1, token_ids=IDS[:5], position=45, num_logits=5)
    strayed = backend.forward(batch(other, part(0, 45, 50, 5)))
    whole = TorchBackend(model()).forward(batch(part(0, 0, 50, 5)))
    np.testing.assert_allclose(strayed[5:], whole, atol=1e-4)
    assert abs(strayed[:5] - whole).max() > 0.1
    backend.free(0)
    backend.forward(batch(SequenceStep(sequence_id=1, token_ids=IDS[:1], position=50, num_logits=1)))


def test_forks_that_cannot_be() -> None:
    backend = TorchBackend(model())
    backend.forward(batch(part(0, 0, 5), part(1, 0, 5)))
    with pytest.raises(ValueError, match="sequence 7 is not in the cache"):
        backend.fork(7, 8)
    with pytest.raises(ValueError, match="sequence 1 is in the cache already"):
        backend.fork(0, 1)


def test_threads_wait_for_each_other() -> None:
    class Watched(TorchBackend):
        users = 0

        def _advance(self, step: SequenceStep) -> Tensor:
            self.users += 1
            time.sleep(0.002)
            assert self.users == 1, "two threads are in the model"
            hidden = super()._advance(step)
            self.users -= 1
            return hidden

    backend = Watched(model())
    with ThreadPoolExecutor(3) as threads:
        steps = [StepBatch(steps=(part(index, 0, 5),)) for index in range(9)]
        logits = list(threads.map(backend.forward, steps))
    assert all(np.array_equal(each, logits[0]) for each in logits)
