"""LoRA and its variants on a model, by PEFT: added from outside, trained alone, saved in PEFT's format.

The model stays what it is, with Hugging Face's names; each adapted `nn.Linear` becomes PEFT's layer of the same name.
Adapters are float32, whatever the frozen weights are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma2.checkpoints.adapters import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PREFIX
from gemma2.checkpoints.staging import clear_errors, publish, staging_folder
from gemma2.config import Gemma2Config
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.placement import whole_tensor
from gemma2.errors import ConfigError, MissingDependencyError
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.lean_lora import use_lean_lora
from gemma2.training.tune_settings import AdapterSettings

_NAME = "default"
_FROM_WEIGHTS = ("pissa", "olora")
"""Initializations that take something out of the frozen weights."""


def add_adapter(model: Gemma2ForCausalLM, settings: AdapterSettings, *, seed: int) -> None:
    """Puts adapters into a model, in place, and freezes all else.

    Args:
        model: on its device; its linear maps may be quantized (see `quantize_frozen`).
        settings: which maps, how wide, how they begin.
        seed: of their first values.

    Raises:
        ConfigError: a layer is named that the model does not have, or r is larger than a map.
        MissingDependencyError: PEFT is not installed.
    """
    check_adapter(model.config, settings)
    from peft import inject_adapter_in_model

    device = model.model.embed_tokens.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        inject_adapter_in_model(_lora_config(settings), model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    use_lean_lora(model)


def check_adapter(config: Gemma2Config, settings: AdapterSettings) -> None:
    """Refuses what `add_adapter` refuses, before there is a model.

    Raises:
        ConfigError: a layer is named that the model does not have, or r is larger than a map.
        MissingDependencyError: PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(
            "adapters need peft, which is not installed; install it with: pip install 'gemma2[train]'"
        )
    layers = settings.layers_to_transform
    if layers is not None:
        unknown = [index for index in layers if not 0 <= index < config.num_hidden_layers]
        if unknown or not layers:
            raise ConfigError(
                f"adapter.layers_to_transform must name layers from 0 to {config.num_hidden_layers - 1}, but "
                f"holds {unknown or 'none'}"
            )
    narrowest = min(config.hidden_size, config.num_key_value_heads * config.head_dim)
    if settings.r > narrowest:
        raise ConfigError(f"adapter.r is {settings.r}, but the narrowest map of this model has a side of {narrowest}")


def needs_weights(settings: AdapterSettings) -> bool:
    """Whether adapters begin with something that is computed from the weights below them."""
    return settings.use_dora or settings.init_lora_weights in _FROM_WEIGHTS


def adapter_first_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies what the adapters are now; `save_adapter` needs it where they begin with a part of the frozen weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Runs the model as it was before adapters came: the reference of preference losses."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(
    folder: Path,
    model: Gemma2ForCausalLM,
    settings: AdapterSettings,
    *,
    base_model: str,
    first_values: dict[str, Tensor] | None = None,
    extra_files: Mapping[str, str] | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT, vLLM and `gemma2` read.

    With pissa and olora the frozen weights were changed at the start. What is written is an adapter for the weights as
    they were, of twice the rank: B A - B₀ A₀, where A₀ and B₀ are the first values.

    Args:
        folder: where to; an adapter that is there is replaced.
        model: with adapters.
        settings: as they were added.
        base_model: what to name as the model that it belongs to.
        first_values: from `adapter_first_values`, before the first step; needed for pissa and olora.
        extra_files: name → contents of further files.
        ranks: the processes, all of which must take part; the first one writes.

    Raises:
        CheckpointError: it cannot be written.
    """
    from peft import get_peft_model_state_dict

    config = _lora_config(settings)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.target_modules = sorted(settings.modules)  # PEFT keeps a set, whose order differs from process to process
    # One after the other, and in each process alike: a part may have to be fetched from each.
    whole = {name: whole_tensor(p) for name, p in model.named_parameters() if "lora_" in name}
    tensors = get_peft_model_state_dict(model, state_dict=whole, adapter_name=_NAME)
    if settings.init_lora_weights in _FROM_WEIGHTS:
        assert first_values is not None
        tensors = _without_beginning(tensors, {name: whole_tensor(value) for name, value in first_values.items()})
        config.r, config.lora_alpha, config.init_lora_weights = 2 * settings.r, 2 * settings.lora_alpha, True
        if settings.use_rslora:
            config.lora_alpha = settings.lora_alpha * 2**0.5
    if ranks.is_first:
        _write(folder, tensors, config, extra_files or {})
    ranks.wait()
    return folder


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Any, extra_files: Mapping[str, str]) -> None:
    from safetensors.torch import save

    with staging_folder(folder, may_overwrite=lambda _: True) as staging, clear_errors(folder):
        # Not save_file, which lets nobody but the owner read what it writes.
        data = save(
            {f"{PREFIX}{name}": value.detach().cpu().contiguous() for name, value in tensors.items()},
            metadata={"format": "pt"},
        )
        (staging / ADAPTER_WEIGHTS_FILE).write_bytes(data)
        config.save_pretrained(str(staging))
        for name, contents in extra_files.items():
            (staging / name).write_text(contents, encoding="utf-8")
        publish(staging, folder, weights=_weight_files, config_file=ADAPTER_CONFIG_FILE)


def _weight_files(folder: Path) -> list[Path]:
    return list(folder.glob("adapter_model.*"))


def _lora_config(settings: AdapterSettings) -> Any:
    from peft import LoraConfig

    values = settings.model_dump()
    values["target_modules"] = list(settings.modules)
    return LoraConfig(task_type="CAUSAL_LM", **values)


def _without_beginning(tensors: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Tensor]:
    """[A; A₀] and [B, -B₀] of each map; what DoRA has trained are the lengths of the same rows."""
    joined = {}
    for name, value in tensors.items():
        if "lora_magnitude_vector" in name:
            joined[name] = value
            continue
        before = first[name.replace(".weight", f".{_NAME}.weight")].to(value.device)
        is_a = ".lora_A." in name
        joined[name] = torch.cat([value.detach(), before if is_a else -before], dim=0 if is_a else 1)
    return joined
