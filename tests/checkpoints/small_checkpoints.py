"""Small random models for tests: a config in which no two sizes agree, its tensors, and folders written by hand.

The folders are written with json and bytes alone, so that a test of the reader does not lean on the writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gemma2.checkpoints import expected_tensors
from gemma2.config import Gemma2Config

Arrays = dict[str, npt.NDArray[Any]]

SMALL = Gemma2Config(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    query_pre_attn_scalar=7,
    vocab_size=130,
    max_position_embeddings=64,
    sliding_window=8,
)

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int8": "I8", "int64": "I64"}


def random_tensors(config: Gemma2Config = SMALL, *, dtype: str = "float32", seed: int = 0) -> Arrays:
    """Returns every tensor of `config`, normally distributed; `dtype` is a name that numpy or ml_dtypes knows."""
    generator = np.random.default_rng(seed)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return {name: generator.normal(size=shape).astype(kind) for name, shape in expected_tensors(config).items()}


def safetensors_bytes(tensors: Mapping[str, npt.NDArray[Any]], *, pad: int = 0) -> bytes:
    """Returns a safetensors file; `pad` more spaces end the header, to put the data at an odd address."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        end = position + array.nbytes
        code = _CODES[str(array.dtype)]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    return with_header(header, b"".join(array.tobytes() for array in tensors.values()), pad=pad)


def with_header(header: object, data: bytes, *, pad: int = 0) -> bytes:
    """Returns a safetensors file with any header (an object to write as JSON, or raw bytes) before `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    return len(text).to_bytes(8, "little") + text + data


def write_model(folder: Path, tensors: Arrays, config: Gemma2Config = SMALL) -> Path:
    """Writes a folder with config.json and one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config.to_json_file(folder / "config.json")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def write_sharded_model(folder: Path, tensors: Arrays, config: Gemma2Config = SMALL, *, shards: int = 3) -> Path:
    """Writes a folder with config.json, an index, and the tensors dealt out to `shards` files in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    config.to_json_file(folder / "config.json")
    names = list(tensors)
    weight_map = {}
    for index in range(shards):
        file_name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        weight_map.update(dict.fromkeys(part, file_name))
        (folder / file_name).write_bytes(safetensors_bytes(part))
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    """Writes model.safetensors.index.json."""
    contents = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents), encoding="utf-8")


def read_index(folder: Path) -> dict[str, str]:
    """Returns the weight_map of a folder's index."""
    values = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    weight_map: dict[str, str] = values["weight_map"]
    return weight_map
