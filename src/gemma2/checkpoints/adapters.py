"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, opened and checked whole.

An adapter changes linear maps W of a model by a product of low rank (LoRA, arXiv 2106.09685):

    W' = W + s · B A                  A (r, inputs), B (outputs, r)
    s  = lora_alpha / r               with use_rslora: lora_alpha / √r (arXiv 2312.03732)

and with use_dora the rows of W' are stretched to a trained length m (arXiv 2402.09353): m · W' / ‖W'‖ for each row.
Names are those that PEFT writes: "base_model.model." + Hugging Face's name of the map + ".lora_A.weight".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2.checkpoints.layout import first_few
from gemma2.checkpoints.names import expected_tensors
from gemma2.checkpoints.safetensors_format import parse_json_object
from gemma2.checkpoints.safetensors_reader import open_safetensors
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, nearest_name
from gemma2.memory.weights import ADAPTABLE_MODULES

ADAPTER_CONFIG_FILE: Final = "adapter_config.json"
ADAPTER_WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."

Floats = npt.NDArray[np.float32]
_PARTS: Final = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
_CHANGING_WEIGHTS: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's `init_lora_weights` under which it takes something out of the weights below the adapter."""
_TIED: Final = ("lm_head", "embed_tokens")


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """What an adapter does to one linear map."""

    a: Floats
    """(r, inputs)"""
    b: Floats
    """(outputs, r)"""
    scale: float
    magnitude: Floats | None = None
    """(outputs,) with DoRA: the length of each row of the changed map."""

    def apply(self, weight: Floats) -> Floats:
        """Returns the changed map, in float32.

        Args:
            weight: (outputs, inputs) float32; it is left alone.
        """
        changed = weight + (self.scale * self.b) @ self.a
        if self.magnitude is not None:
            changed *= (self.magnitude / np.linalg.norm(changed, axis=1))[:, None]
        return changed.astype(np.float32, copy=False)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was checked against a model's architecture."""

    folder: Path
    base_model: str
    """What it was trained on, as its config names it; may be empty."""
    updates: Mapping[str, LowRankUpdate]
    """By the name of the tensor that it changes: "model.layers.0.self_attn.q_proj.weight"."""

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained."""
        return sum(
            update.a.size + update.b.size + (0 if update.magnitude is None else update.magnitude.size)
            for update in self.updates.values()
        )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and not a model."""
    return (Path(folder).expanduser() / ADAPTER_CONFIG_FILE).is_file()


def open_adapter(folder: str | Path, config: Gemma2Config) -> Adapter:
    """Opens an adapter for a model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: the architecture of the model that it changes.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter is not LoRA or one of its variants that are read
            (rsLoRA, DoRA), changes the embedding or the head, or does not fit the model.
    """
    folder = Path(folder).expanduser()
    file = folder / ADAPTER_CONFIG_FILE
    settings = _read_config(folder, file)
    _refuse_what_is_not_read(settings, file)
    try:
        tensors = open_safetensors(folder / ADAPTER_WEIGHTS_FILE)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
    weights_file = folder / ADAPTER_WEIGHTS_FILE
    parts: dict[str, dict[str, Floats]] = {}
    for name, tensor in tensors.items():
        module, part = _split(name, weights_file)
        _check_module(module, config, weights_file)
        values = tensor.numpy().astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{weights_file}: {name} holds NaN or infinity; the training run went wrong")
        parts.setdefault(module, {})[part] = values
    if not parts:
        raise CheckpointError(f"{weights_file}: holds no tensor; save the adapter again")
    shapes = expected_tensors(config)
    updates = {
        f"{module}.weight": _update(module, held, shapes[f"{module}.weight"], settings, weights_file)
        for module, held in parts.items()
    }
    return Adapter(
        folder=folder,
        base_model=str(settings.get("base_model_name_or_path") or ""),
        updates=MappingProxyType({name: updates[name] for name in shapes if name in updates}),
    )


def _read_config(folder: Path, file: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; an adapter is a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}"
        )
    if not file.is_file():
        hint = " This is a whole model" if (folder / "config.json").is_file() else ""
        raise CheckpointError(f"{folder}: holds no {ADAPTER_CONFIG_FILE}, so it is no adapter.{hint}")
    try:
        return parse_json_object(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error}") from None


def _refuse_what_is_not_read(settings: Mapping[str, Any], file: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type must be LORA, the kind of adapter that is read, but is {kind!r}")
    if settings.get("modules_to_save"):
        raise CheckpointError(
            f"{file}: modules_to_save holds {settings['modules_to_save']}, whole matrices beside the adapter, which "
            "are not read; merge the adapter with PEFT and use the merged model"
        )
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {settings['bias']!r}, but Gemma 2 has no biases; it must be 'none'")
    if settings.get("fan_in_fan_out"):
        raise CheckpointError(f"{file}: fan_in_fan_out is for maps that are stored transposed; Gemma 2 has none")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGING_WEIGHTS):
        raise CheckpointError(
            f"{file}: init_lora_weights is {init!r}, so the adapter is for weights that PEFT changes when it loads it; "
            "save it for the weights as they are (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for name in ("alora_invocation_tokens", "layer_replication"):
        if settings.get(name):
            raise CheckpointError(
                f"{file}: {name} is set, which changes more than linear maps and is not read; train without it"
            )
    rank = settings.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{file}: r must be a whole number of at least 1, but is {rank!r}")
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"{file}: lora_alpha must be a number, but is {alpha!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            raise CheckpointError(f"{file}: {name} must be an object, but is {settings[name]!r}")


def _split(name: str, file: Path) -> tuple[str, str]:
    """The map that a tensor belongs to, and which part of the update it is."""
    for ending, part in _PARTS.items():
        if name.startswith(PREFIX) and name.endswith("." + ending):
            return name[len(PREFIX) : -len(ending) - 1], part
    module = name.removeprefix(PREFIX)
    if any(part in module.split(".") for part in _TIED):
        raise CheckpointError(f"{file}: {_tied_sentence(module)}")
    raise CheckpointError(
        f"{file}: holds {name!r}, which is no part of a LoRA adapter; its tensors are called "
        f"{PREFIX}….lora_A.weight, ….lora_B.weight and, with DoRA, ….lora_magnitude_vector"
    )


def _check_module(module: str, config: Gemma2Config, file: Path) -> None:
    name = module.rpartition(".")[2]
    if name in _TIED:
        raise CheckpointError(f"{file}: {_tied_sentence(module)}")
    known = [key.removesuffix(".weight") for key in expected_tensors(config)]
    if module not in known or name not in ADAPTABLE_MODULES:
        raise CheckpointError(
            f"{file}: changes {module}, which is no linear map of this Gemma 2 of {config.num_hidden_layers} layers."
            + nearest_name(module, [key for key in known if key.rpartition(".")[2] in ADAPTABLE_MODULES])
        )


def _tied_sentence(module: str) -> str:
    return (
        f"changes {module}, but embedding and head are one matrix in Gemma 2, and an adapter would change one of the "
        "two uses only; train without it"
    )


def _update(
    module: str, held: Mapping[str, Floats], shape: tuple[int, ...], settings: Mapping[str, Any], file: Path
) -> LowRankUpdate:
    outputs, inputs = shape
    missing = [ending for ending, part in _PARTS.items() if part != "magnitude" and part not in held]
    if missing:
        raise CheckpointError(f"{file}: lacks {PREFIX}{module}.{first_few(missing)}; is the copy whole?")
    a, b = held["a"], held["b"]
    rank = _pattern(settings.get("rank_pattern") or {}, module, settings["r"])
    for name, array, expected in (("lora_A", a, (rank, inputs)), ("lora_B", b, (outputs, rank))):
        if array.shape != expected:
            raise CheckpointError(
                f"{file}: {module}.{name} has the shape {array.shape}, but this model and r = {rank} ask for "
                f"{expected}; is it an adapter of another model?"
            )
    magnitude = held.get("magnitude")
    if bool(settings.get("use_dora")) != (magnitude is not None):
        says = "says use_dora" if settings.get("use_dora") else "does not say use_dora"
        has = "has no" if magnitude is None else "has a"
        raise CheckpointError(f"{file}: {module} {has} lora_magnitude_vector, but {ADAPTER_CONFIG_FILE} {says}")
    if magnitude is not None and magnitude.shape != (outputs,):
        raise CheckpointError(
            f"{file}: {module}.lora_magnitude_vector has the shape {magnitude.shape}, but ({outputs},) is needed"
        )
    alpha = float(_pattern(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"]))
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LowRankUpdate(a=a, b=b, scale=scale, magnitude=magnitude)


def _pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the name after a dot."""
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default
