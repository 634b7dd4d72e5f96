"""The files of a Hugging Face model folder, by name, and what a folder that is not one holds instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

CONFIG_FILE: Final = "config.json"
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
SHARD_PATTERN: Final = "model-*-of-*.safetensors"
PACKED_SUFFIX: Final = ".gemma2.safetensors"
"""How files of packed weights end; see `packed_format`."""
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"


def shard_file(index: int, count: int) -> str:
    """Names shard `index` (from 0) of `count`: the plain name if it is the only one, else HF's `-00001-of-00002`."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def first_few(names: Iterable[str], *, limit: int = 3) -> str:
    """Lists the first `limit` names and says how many follow, so that 288 missing tensors stay one line."""
    names = list(names)
    text = ", ".join(names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def readable_size(num_bytes: int) -> str:
    """Writes a size as disks and the hub do, in steps of 1000: 5228683776 is "5.2 GB"."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def explain_no_weights(names: Sequence[str], *, folder: Path | None = None) -> str:
    """Says why a folder or repository with these files cannot be opened as a model, and what to do.

    Args:
        names: file names at the top of the folder; there is neither `model.safetensors` nor an index among them.
        folder: where they lie, if on this machine, to look one level deeper.
    """
    if packed := _ending(names, PACKED_SUFFIX):
        return (
            f"holds weights packed for the CPU engine ({first_few(packed)}), which run but are no checkpoint; use the "
            "model that they were made from"
        )
    adapter = [name for name in names if name.startswith("adapter_")]
    if adapter:
        return (
            f"holds an adapter ({first_few(adapter)}){_base_model(folder)}, not a whole model; open the model that it "
            "was trained on and name this folder as its adapter (--adapter), or make one of both with `gemma2 merge`"
        )
    if gguf := _ending(names, ".gguf"):
        return (
            f"holds GGUF weights ({first_few(gguf)}), which are not read yet; use the safetensors folder from which "
            "the file was made"
        )
    if pickles := _ending(names, ".bin", ".pt", ".pth", ".ckpt"):
        return (
            f"holds PyTorch pickles ({first_few(pickles)}), which are not read, as opening one can run any code; "
            "convert it once with transformers, in a place that you trust it: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if shards := [name for name in names if Path(name).match(SHARD_PATTERN)]:
        return f"holds shards ({first_few(shards)}) but not {INDEX_FILE}, which says what lies in which; copy it too"
    if others := _ending(names, ".safetensors"):
        return f"holds {first_few(others)}, but the weights must be called {SINGLE_FILE}; rename the file if it is them"
    if others := _ending(names, ".h5", ".keras", ".msgpack", ".npz", ".onnx", ".tflite", ".task", ".nemo"):
        return f"holds weights in a format that is not read ({first_few(others)}); convert them to safetensors"
    if folder is not None and (inner := _inner_model(folder)):
        return f"is not a model folder, but {inner} looks like one; open that"
    found = f"it has {first_few(sorted(names), limit=5)}" if names else "it is empty"
    return (
        f"holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there, nor packed weights (*{PACKED_SUFFIX}); "
        f"{found}"
    )


def _ending(names: Iterable[str], *suffixes: str) -> list[str]:
    return sorted(name for name in names if name.endswith(suffixes))


def _base_model(folder: Path | None) -> str:
    """Returns " for 'google/gemma-2-2b'" if the adapter's settings say so; an unreadable file says nothing."""
    if folder is None:
        return ""
    try:
        base = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" for {base!r}" if isinstance(base, str) and base else ""


def _inner_model(folder: Path) -> Path | None:
    """Finds the model one level down: a run's checkpoints, or a repository in Hugging Face's cache."""
    for pattern in (f"*/{CONFIG_FILE}", f"snapshots/*/{CONFIG_FILE}"):
        for config in sorted(folder.glob(pattern)):
            return config.parent
    return None
