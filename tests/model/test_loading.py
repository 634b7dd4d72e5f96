"""Loading fills every parameter and holds each value once; what is saved loads again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from gemma2.checkpoints import expected_tensors, open_checkpoint, save_checkpoint
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, ConfigError
from gemma2.model import Gemma2ForCausalLM, load_model, state_arrays
from gemma2.model.loading import stored_dtype

CONFIG = Gemma2Config(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    vocab_size=70_000,  # an embedding of several megabytes, which goes into memory of its own kind
    sliding_window=8,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model stored in each dtype, float16 included, and with float32 norms beside bf16 matrices."""
    root = tmp_path_factory.mktemp("models")
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, shape in expected_tensors(CONFIG).items()
    }
    kinds = {
        "float32": arrays,
        "bfloat16": {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()},
        "float16": {name: value.astype(np.float16) for name, value in arrays.items()},
        "mixed": {
            name: value if "norm" in name else value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()
        },
    }
    for kind, values in kinds.items():
        (root / kind).mkdir()
        CONFIG.to_json_file(root / kind / "config.json")
        save_file(values, root / kind / "model.safetensors")
    return {kind: root / kind for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.float32),
        ("mixed", "auto", torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float16", torch.bfloat16, torch.bfloat16),
        ("mixed", torch.float64, torch.float64),
    ],
)
def test_every_parameter_is_filled(
    folders: dict[str, Path], kind: str, dtype: str | torch.dtype, expected: torch.dtype
) -> None:
    checkpoint = open_checkpoint(folders[kind])
    model = load_model(checkpoint, dtype=dtype)
    assert [name for name, _ in model.named_parameters()] != []
    assert {name for name, _ in model.named_parameters()} == set(checkpoint.tensors)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == expected and parameter.requires_grad and parameter.is_contiguous()
        values = torch.from_numpy(checkpoint.tensors[name].numpy().astype(np.float32)).to(expected)
        assert torch.equal(parameter, values), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_auto_means(folders: dict[str, Path]) -> None:
    found = {kind: stored_dtype(open_checkpoint(folder)) for kind, folder in folders.items()}
    assert found == {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float32,
        "mixed": torch.bfloat16,
    }


def test_loaded_parameters_can_be_trained(folders: dict[str, Path]) -> None:
    """They are not the mapped file: writing to it would kill the process, and change the file for others."""
    before = (folders["float32"] / "model.safetensors").read_bytes()
    model = load_model(open_checkpoint(folders["float32"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([[2, 5, 7]])).square().mean().backward()
    optimizer.step()
    assert (folders["float32"] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Gemma2ForCausalLM(CONFIG, dtype=dtype)
    arrays = dict(state_arrays(model))
    assert list(arrays) == list(expected_tensors(CONFIG))
    save_checkpoint(tmp_path / "model", CONFIG, state_arrays(model))
    again = load_model(open_checkpoint(tmp_path / "model"))
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    ids = torch.tensor([[2, 69_999, 5, 0]])
    assert torch.equal(model(ids), again(ids))


def test_a_head_that_was_cut_loose_is_not_dropped_silently() -> None:
    model = Gemma2ForCausalLM(CONFIG)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the embedding's parameter any more"):
        list(state_arrays(model))


def test_an_unknown_dtype_is_refused(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["float32"])
    with pytest.raises(ConfigError, match=r"dtype must be auto, float32 or bfloat16, but is 'bfloat'. Did you mean"):
        load_model(checkpoint, dtype="bfloat")
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        load_model(checkpoint, dtype=torch.int8)


def test_a_file_cut_off_after_it_was_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["bfloat16"] / "config.json").read_bytes())
    data = (folders["bfloat16"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(checkpoint)


PEAK = """
import sys
from pathlib import Path
import torch
from gemma2.checkpoints import open_checkpoint
from gemma2.model import load_model

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.zeros(8).bfloat16().float().sum()
checkpoint = open_checkpoint(sys.argv[1])
before = peak()
model = load_model(checkpoint, dtype=sys.argv[2])
size = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux gives it")
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "auto"), ("bfloat16", "float32")])
def test_the_peak_of_loading_is_the_models_size(tmp_path: Path, stored: str, dtype: str) -> None:
    """No second copy, no mapped pages beside it. A fifth of the weights are the embedding, as in the 2B."""
    config = CONFIG.replace(hidden_size=512, intermediate_size=4096, num_hidden_layers=12, vocab_size=40_000)
    arrays = (
        (name, np.ones(shape, dtype=ml_dtypes.bfloat16 if stored == "bfloat16" else np.float32))
        for name, shape in expected_tensors(config).items()
    )
    save_checkpoint(tmp_path / "model", config, arrays)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "model"), dtype], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(result.stdout) <= 1.15
