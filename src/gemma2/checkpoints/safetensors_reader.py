"""Opens a Hugging Face model folder: reads headers only, and finds every error before anything is computed.

The way down: which files hold the weights (one, or those of the index) → the config → each file's header → do the
files agree with the index → do the tensors agree with the architecture → is a stored head the embedding.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

import numpy as np

from gemma2.checkpoints.checkpoint import Checkpoint, LazyTensor
from gemma2.checkpoints.layout import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, explain_no_weights, first_few
from gemma2.checkpoints.names import EMBEDDING, TIED_HEAD, expected_tensors
from gemma2.checkpoints.safetensors_format import parse_json_object, read_header
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, nearest_name

_COMPARE_BYTES: Final = 1 << 24


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens a model folder with config.json and safetensors, in one file or sharded with an index.

    Only headers are read, which takes milliseconds at any size. One case reads more: a folder that stores
    `lm_head.weight` beside the embedding. Gemma 2's head is tied, so the two must be equal byte for byte, and that is
    compared in full, stopping at the first difference: about a second for 2B, and a sample would let a head pass that
    was tuned in a few rows only. Values are not searched for NaN or infinity.

    Args:
        folder: the folder; a name on the Hugging Face hub goes through `resolve_model` first.

    Returns:
        The config and the tensors, memory-mapped.

    Raises:
        CheckpointError: the folder or a file is missing, damaged, not safetensors, or does not fit the config.
        ConfigError: config.json is missing or does not describe a Gemma 2.
    """
    folder = Path(folder).expanduser()
    try:
        return _open(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error


def _open(folder: Path) -> Checkpoint:
    weights = _find_weights(folder)
    config = Gemma2Config.from_json_file(folder / CONFIG_FILE)
    _refuse_quantized(folder / CONFIG_FILE)
    held = {file_name: open_safetensors(folder / file_name) for file_name in weights.file_names}
    if weights.weight_map is not None:
        _check_index(folder, weights.weight_map, held)
    found = {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
    head = found.pop(TIED_HEAD, None)
    expected = expected_tensors(config)
    _check_names(folder, found, expected)
    _check_shapes(folder, found, expected)
    if head is not None:
        _check_head(head, found[EMBEDDING])
    return Checkpoint(folder=folder, config=config, tensors=MappingProxyType({name: found[name] for name in expected}))


# -- Which files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Weights:
    file_names: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    """Tensor → file name, as the index says; None if there is one file and no index."""


def _find_weights(folder: Path) -> _Weights:
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: no such folder; a model is a folder with {CONFIG_FILE} and {SINGLE_FILE} (or shards and their "
            "index). A published one comes with `gemma2 pull google/gemma-2-2b-it`"
        )
    if not folder.is_dir():
        ending = {".gguf": "GGUF is not read yet", ".safetensors": "give the folder that it lies in"}
        what = ending.get(folder.suffix, "give the folder that holds the model")
        raise CheckpointError(f"{folder}: is a file, but a model is a folder; {what}")
    names = sorted(path.name for path in folder.iterdir())
    if INDEX_FILE in names:
        weight_map = parse_index((folder / INDEX_FILE).read_bytes(), folder / INDEX_FILE)
        files = tuple(dict.fromkeys(weight_map.values()))
        if SINGLE_FILE in names and SINGLE_FILE not in files:
            raise CheckpointError(
                f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, which names other files ({first_few(files)}); "
                "delete the one that is not meant"
            )
        if absent := [name for name in files if not (folder / name).exists()]:
            raise CheckpointError(
                f"{folder / INDEX_FILE}: names {len(absent)} of {len(files)} files that are not there: "
                f"{first_few(absent)}; copy them too, or finish the download with `gemma2 pull`"
            )
        return _Weights(file_names=files, weight_map=weight_map)
    if SINGLE_FILE in names:
        return _Weights(file_names=(SINGLE_FILE,), weight_map=None)
    raise CheckpointError(f"{folder}: {explain_no_weights(names, folder=folder)}")


def parse_index(data: bytes, source: Path | str) -> dict[str, str]:
    """Parses `model.safetensors.index.json`.

    Args:
        data: its contents.
        source: what to call it in errors.

    Returns:
        Tensor name → name of the file that holds it, relative to the index.

    Raises:
        CheckpointError: it is not such an index, or a file name leads out of its folder.
    """
    try:
        values = parse_json_object(data)
    except ValueError as error:
        raise CheckpointError(f"{source}: is not valid JSON: {error}") from None
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        keys = first_few(map(repr, values)) or "nothing"
        raise CheckpointError(f"{source}: must have a weight_map from tensor names to file names, but has {keys}")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not file_name:
            raise CheckpointError(f"{source}: the file of {name} must be a file name, but is {file_name!r:.80}")
        path = PurePosixPath(file_name)
        # Judged by its letters and not resolved: in Hugging Face's cache every file is a link out of its folder.
        if path.is_absolute() or ".." in path.parts or "\\" in file_name or ":" in file_name or "\0" in file_name:
            raise CheckpointError(
                f"{source}: {name} is said to lie in {file_name!r}, but files must lie in the folder of the index"
            )
    return weight_map


def _refuse_quantized(config_file: Path) -> None:
    quantization = json.loads(config_file.read_text(encoding="utf-8")).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{config_file}: says that the weights are quantized ({method or 'quantization_config'}); open the "
            "unquantized model, gemma2 quantizes it by itself"
        )


# -- What they hold ---------------------------------------------------------------------------------------------


def open_safetensors(file: Path) -> dict[str, LazyTensor]:
    """Maps one safetensors file: name → tensor, in the order of the bytes.

    Raises:
        CheckpointError: it is not there, damaged, or not safetensors.
        OSError: the system refuses it.
    """
    if not file.is_file():
        what = "a folder" if file.is_dir() else "a link to a file that is not there; finish the download"
        raise CheckpointError(f"{file}: must be a safetensors file, but is {what}")
    if file.stat().st_size == 0:  # which cannot be mapped
        raise CheckpointError(f"{file}: is truncated: the file is empty; copy it again")
    # One mapping a file, and not one a tensor: each keeps a file descriptor, of which macOS grants 256.
    with file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: LazyTensor(
            name=name, shape=entry.shape, dtype=entry.dtype, file=file, _mapping=mapping, _start=entry.start
        )
        for name, entry in read_header(mapping, file).items()
    }


def _check_index(folder: Path, weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    """Checks that each file holds the tensors that the index says, and no other."""
    for file_name, tensors in held.items():
        assigned = [name for name, owner in weight_map.items() if owner == file_name]
        if absent := [name for name in assigned if name not in tensors]:
            raise CheckpointError(
                f"{folder / file_name}: lacks {_count(absent)} that {INDEX_FILE} says it holds: {first_few(absent)}; "
                "the files belong to different checkpoints"
            )
        for name in tensors:
            owner = weight_map.get(name)
            if owner is None:
                raise CheckpointError(f"{folder / file_name}: holds {name}, which {INDEX_FILE} does not list")
            if owner != file_name:
                also = "; both hold it" if name in held[owner] else ""
                raise CheckpointError(
                    f"{folder / file_name}: holds {name}, which {INDEX_FILE} assigns to {owner}{also}"
                )


# -- Do they fit the architecture -------------------------------------------------------------------------------


def _check_names(folder: Path, found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if not missing and not extra:
        return
    files = first_few(dict.fromkeys(str(found[name].file) for name in extra), limit=1) if extra else str(folder)
    problems = []
    if missing:
        problems.append(f"lacks {_count(missing)} of the {len(expected)} of this Gemma 2: {first_few(missing)}")
    if extra:
        problems.append(f"holds {_count(extra)} that this Gemma 2 does not have: {first_few(extra)}")
    raise CheckpointError(f"{files}: {' and '.join(problems)}.{_name_hint(missing, extra, expected)}")


def _name_hint(missing: list[str], extra: list[str], expected: Mapping[str, tuple[int, ...]]) -> str:
    if any(f"model.{name}" in expected for name in extra):
        return " The names lack 'model.' in front: the Gemma2Model inside was saved, save the Gemma2ForCausalLM"
    if any("lora_" in name or name.startswith("base_model.") for name in extra):
        return " They are those of an adapter; save the merged model"
    if any(name.endswith((".bias", ".absmax", ".qweight", ".scales")) for name in extra):
        return " Gemma 2 has no biases, and quantized weights are not read"
    if extra:
        return nearest_name(extra[0], missing or expected) or f" Does {CONFIG_FILE} belong to these weights?"
    return f" Is the copy whole, and does {CONFIG_FILE} belong to it?"


def _check_shapes(folder: Path, found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [found[name] for name, shape in expected.items() if found[name].shape != shape]
    if wrong:
        first = wrong[0]
        more = f" ({len(wrong) - 1} other tensors differ too)" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{first.file}: {first.name} has the shape {first.shape}, but {folder / CONFIG_FILE} asks for "
            f"{expected[first.name]}{more}"
        )


def _check_head(head: LazyTensor, embedding: LazyTensor) -> None:
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        left, right = head.raw_bytes(), embedding.raw_bytes()
        if all(
            np.array_equal(left[start : start + _COMPARE_BYTES], right[start : start + _COMPARE_BYTES])
            for start in range(0, len(left), _COMPARE_BYTES)
        ):
            return
    raise CheckpointError(
        f"{head.file}: {TIED_HEAD} differs from {EMBEDDING}, but Gemma 2's head is its embedding (tied). This model "
        "was trained with a head of its own, which gemma2 cannot express"
    )


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor" if len(names) == 1 else f"{len(names)} tensors"
