"""The model that a run trains: new or from a checkpoint, whole or a part of it, with an adapter or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gemma2.checkpoints import Checkpoint
from gemma2.checkpoints.safetensors_writer import StoredDtype
from gemma2.config import Gemma2Config
from gemma2.distributed import Ranks
from gemma2.distributed.fsdp import GatheredModel
from gemma2.model.loading import DTYPES, load_model
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.activation_checkpointing import checkpoint_layers
from gemma2.training.adapters import adapter_first_values, add_adapter, save_adapter
from gemma2.training.settings import LoopSettings
from gemma2.training.shared_model import load_shared, new_shared, save_model
from gemma2.training.tune_settings import AdapterSettings

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model, and what is needed to run it in several processes and to write out what it has learned."""

    model: Gemma2ForCausalLM
    gathered: GatheredModel | None = None
    """What stands around it, if processes share its weights."""
    adapter: AdapterSettings | None = None
    first_values: dict[str, Tensor] | None = None
    """Of the adapter; see `adapter_first_values`."""

    @property
    def is_shared(self) -> bool:
        """Whether this process has a part of it."""
        return self.gathered is not None

    def around(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, with the model whole while it runs, as far as it asks for that."""
        return function if self.gathered is None else self.gathered.around(function)


def new_model(config: Gemma2Config, run: LoopSettings, ranks: Ranks, device: torch.device) -> TrainedModel:
    """A new model in float32, whose first values depend on the seed alone.

    Args:
        config: the architecture.
        run: the seed, the dtype of products and which layers keep only their input.
        ranks: the processes, which share it if there are several.
        device: where to, if there is one.

    Raises:
        ConfigError: the model cannot be cut so, or has fewer layers.
    """
    generator = torch.Generator(device=device).manual_seed(run.seed)
    if ranks.world_size > 1:
        gathered = new_shared(
            config,
            ranks,
            generator=generator,
            gather_dtype=_gather_dtype(run),
            checkpointing=run.gradient_checkpointing,
        )
        return TrainedModel(model=gathered.model, gathered=gathered)
    model = Gemma2ForCausalLM(config, device="meta").to_empty(device=device)
    model.initialize(generator)
    checkpoint_layers(model, run.gradient_checkpointing)
    return TrainedModel(model=model)


def model_from_checkpoint(
    checkpoint: Checkpoint,
    run: LoopSettings,
    ranks: Ranks,
    device: torch.device,
    *,
    adapter: AdapterSettings | None,
    load: Callable[[], Gemma2ForCausalLM] | None = None,
) -> TrainedModel:
    """A model to go on with: in float32 if its weights are trained, else in the dtype of products and with an adapter.

    Args:
        checkpoint: an opened model folder.
        run: the seed, the dtype of products and which layers keep only their input.
        ranks: the processes, which share it if there are several.
        device: where to, if it is not shared.
        adapter: what to train; None for every weight.
        load: opens it in another way, such as with quantized weights, which are then whole in each process.

    Raises:
        ConfigError: the model cannot be cut so, or see `add_adapter`.
        CheckpointError: a file cannot be read.
    """
    is_full, gathered = adapter is None, None
    if ranks.world_size > 1 and load is None:
        gathered = load_shared(
            checkpoint,
            ranks,
            dtype=torch.float32 if is_full else DTYPES[run.dtype],
            adapter=adapter,
            seed=run.seed,
            gather_dtype=_gather_dtype(run) if is_full else None,
            checkpointing=run.gradient_checkpointing,
        )
        model = gathered.model
    else:
        model = load() if load else load_model(checkpoint, dtype="float32" if is_full else run.dtype, device=device)
        if adapter is not None:
            add_adapter(model, adapter, seed=run.seed)
        checkpoint_layers(model, run.gradient_checkpointing)
    first_values = None if is_full else adapter_first_values(model)
    return TrainedModel(model=model, gathered=gathered, adapter=adapter, first_values=first_values)


def save_trained(
    folder: Path,
    trained: TrainedModel,
    ranks: Ranks,
    *,
    base_model: str,
    dtype: StoredDtype,
    tokenizer_files: Sequence[Path],
    extra_files: Mapping[str, str],
) -> Path:
    """Writes what was learned, the folder "adapter" or "model"; all processes must take part.

    Args:
        folder: of the run.
        trained: the model.
        ranks: the processes.
        base_model: what an adapter names as the model that it belongs to.
        dtype: what a model is stored in.
        tokenizer_files: of a model.
        extra_files: name → contents of further files.

    Raises:
        CheckpointError: it cannot be written.
    """
    if trained.adapter is not None:
        return save_adapter(
            folder / "adapter",
            trained.model,
            trained.adapter,
            base_model=base_model,
            first_values=trained.first_values,
            extra_files=extra_files,
            ranks=ranks,
        )
    return save_model(
        folder / "model", trained.model, ranks, dtype=dtype, tokenizer_files=tokenizer_files, extra_files=extra_files
    )


def _gather_dtype(run: LoopSettings) -> torch.dtype | None:
    return torch.bfloat16 if run.dtype == "bfloat16" else None
