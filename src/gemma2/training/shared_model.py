"""A model of which every process holds a part: from the tree without memory to parts that can be filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma2.checkpoints import Checkpoint, save_checkpoint
from gemma2.checkpoints.safetensors_writer import StoredDtype
from gemma2.config import Gemma2Config
from gemma2.distributed import Ranks
from gemma2.distributed.fsdp import GatheredModel, share_weights
from gemma2.distributed.placement import fill, fill_from_checkpoint, initialize, whole_tensor
from gemma2.distributed.tensor_parallel import split_products
from gemma2.model.loading import load_model, state_arrays
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.activation_checkpointing import checkpoint_layers
from gemma2.training.adapters import add_adapter, needs_weights
from gemma2.training.tune_settings import AdapterSettings


def share_model(
    model: Gemma2ForCausalLM,
    ranks: Ranks,
    *,
    gather_dtype: torch.dtype | None = None,
    checkpointing: bool | int = False,
) -> GatheredModel:
    """Cuts a model among processes and gives each the memory of its part.

    Args:
        model: all of it on "meta", with adapters if it is to have any; changed in place.
        ranks: the processes, more than one.
        gather_dtype: see `share_weights`.
        checkpointing: see `checkpoint_layers`.

    Returns:
        What the model must be run through. Its values are still to be filled in (see `distributed.placement`).

    Raises:
        ConfigError: the model cannot be cut so.
    """
    split_products(model, ranks)
    checkpoint_layers(model, checkpointing)
    gathered = share_weights(model, ranks, gather_dtype=gather_dtype)
    assert ranks.device is not None
    gathered.to_empty(device=ranks.device)
    return gathered


def new_shared(
    config: Gemma2Config,
    ranks: Ranks,
    *,
    generator: torch.Generator,
    gather_dtype: torch.dtype | None = None,
    checkpointing: bool | int = False,
) -> GatheredModel:
    """A new model in float32, with the first values that one process would draw.

    Args:
        config: the architecture.
        ranks: the processes, more than one.
        generator: what draws the values; in the same state in all processes.
        gather_dtype: see `share_weights`.
        checkpointing: see `share_model`.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    model = Gemma2ForCausalLM(config, device="meta")
    gathered = share_model(model, ranks, gather_dtype=gather_dtype, checkpointing=checkpointing)
    initialize(model, generator)
    return gathered


def load_shared(
    checkpoint: Checkpoint,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    adapter: AdapterSettings | None = None,
    seed: int = 0,
    gather_dtype: torch.dtype | None = None,
    checkpointing: bool | int = False,
) -> GatheredModel:
    """Opens a model so that every process reads its part of each tensor, and no more.

    The exception are adapters that begin with something computed from the weights below them (pissa, olora, DoRA):
    for those each process first has the whole model in the machine's memory.

    Args:
        checkpoint: an opened model folder.
        ranks: the processes, more than one.
        dtype: of the weights.
        adapter: to put into it; all else is then frozen.
        seed: of the adapter's first values, which are those of one process.
        gather_dtype: see `share_weights`.
        checkpointing: see `share_model`.

    Raises:
        ConfigError: the model cannot be cut so, or see `add_adapter`.
        CheckpointError: a file cannot be read.
    """
    values: dict[str, Tensor] = {}
    if adapter is not None and needs_weights(adapter):
        model = load_model(checkpoint, dtype=dtype)
        add_adapter(model, adapter, seed=seed)
        values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    else:
        model = Gemma2ForCausalLM(checkpoint.config, dtype=dtype, device="meta")
        if adapter is not None:
            _pretend_weights(model)
            add_adapter(model, adapter, seed=seed)
            values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    gathered = share_model(model.to("meta"), ranks, gather_dtype=gather_dtype, checkpointing=checkpointing)
    if adapter is None or not needs_weights(adapter):
        fill_from_checkpoint(model, checkpoint)
    fill({name: p for name, p in model.named_parameters() if name in values}, values)
    return gathered


def _pretend_weights(model: Gemma2ForCausalLM) -> None:
    """Gives linear maps weights of their shape on the CPU that take no memory, for PEFT puts adapters beside them."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            weight = torch.empty((), dtype=module.weight.dtype).expand(module.weight.shape)
            module.weight = nn.Parameter(weight, requires_grad=False)


def save_model(
    folder: Path,
    model: Gemma2ForCausalLM,
    ranks: Ranks,
    *,
    dtype: StoredDtype,
    tokenizer_files: Sequence[Path],
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Writes a model folder, as `save_checkpoint` does, over one that is there.

    With several processes all must take part: each tensor in turn is put together, and the first process writes it.

    Args:
        folder: where to.
        model: whole, or a part of it in each process.
        ranks: the processes.
        dtype: what to store.
        tokenizer_files: see `save_checkpoint`.
        extra_files: see `save_checkpoint`.

    Raises:
        CheckpointError: it cannot be written.
    """
    arrays = state_arrays(model, whole=whole_tensor)
    if ranks.is_first:
        save_checkpoint(
            folder,
            model.config,
            arrays,
            dtype=dtype,
            tokenizer_files=tokenizer_files,
            extra_files=extra_files,
            overwrite=True,
        )
    else:
        for _ in arrays:
            pass
    ranks.wait()
    return folder
