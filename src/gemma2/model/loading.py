"""From a checkpoint to the PyTorch model and back, one tensor at a time."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any, Final

import ml_dtypes
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gemma2.checkpoints import Adapter, Checkpoint, LazyTensor, expected_tensors
from gemma2.errors import CheckpointError, ConfigError, nearest_name
from gemma2.model.modeling import Gemma2ForCausalLM, refuse_float16

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model can be loaded in, by name."""

_STORED: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_HUGE_PAGE_BYTES: Final = 1 << 21


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    replace_linear: Callable[[nn.Linear], nn.Module] | None = None,
    replace_embedding: Callable[[nn.Embedding], tuple[nn.Module, nn.Module]] | None = None,
) -> Gemma2ForCausalLM:
    """Builds the model of a checkpoint and fills every parameter from it.

    The tree is built without memory, and each tensor is read from the file straight into the memory of its parameter.
    So the peak is the model's own size, and one tensor more where values are converted or go to an accelerator. The
    parameters are not views of the file: training may write to them, a file that changes cannot change them, and
    Linux may give them large pages.

    Args:
        checkpoint: an opened model folder.
        dtype: float32 or bfloat16, as a torch dtype or by name (float64 as a torch dtype, for references). "auto" is
            what most of the bytes are stored in; float16 becomes float32, since Gemma 2 cannot run in it and bfloat16
            would round it.
        device: where to put the parameters; None for the CPU.
        replace_linear: what to put in the place of each linear map of a layer as soon as it is filled, such as a
            quantized one; so the whole model is never there in its first form.
        replace_embedding: what to put in the places of the embedding and of the head, likewise.

    Returns:
        The model; the head and the embedding are one parameter.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: there is no such dtype.
        ValueError: the dtype is one that Gemma 2 cannot run in.
    """
    chosen = stored_dtype(checkpoint) if dtype == "auto" else _dtype_of(dtype)
    refuse_float16(chosen)
    target = torch.device("cpu" if device is None else device)
    model = Gemma2ForCausalLM(checkpoint.config, dtype=chosen, device="meta")
    for name in expected_tensors(checkpoint.config):
        value = _read(checkpoint.tensors[name], chosen, target)
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        assert owner.get_parameter(attribute).shape == value.shape, name
        setattr(owner, attribute, nn.Parameter(value))
        if replace_linear is not None and isinstance(owner, nn.Linear):
            parent, _, child = owner_name.rpartition(".")
            setattr(model.get_submodule(parent), child, replace_linear(owner))
        if replace_embedding is not None and isinstance(owner, nn.Embedding):
            model.model.embed_tokens, model.lm_head = replace_embedding(owner)  # type: ignore[assignment]
    model.lm_head.weight = model.model.embed_tokens.weight
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unfilled, f"the table of tensors lacks {unfilled}"
    return model


@torch.no_grad()
def fold_adapter(model: Gemma2ForCausalLM, adapter: Adapter) -> None:
    """Folds an adapter into the weights that it changes, in float32, rounded once to the weights' dtype."""
    for name, update in adapter.updates.items():
        parameter = model.get_parameter(name)
        changed = update.apply(parameter.detach().float().cpu().numpy())
        parameter.copy_(torch.from_numpy(changed))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype that most bytes of a checkpoint are stored in; float32 for float16 (see `load_model`)."""
    num_bytes = dict.fromkeys(_STORED, 0)
    for tensor in checkpoint.tensors.values():
        num_bytes[tensor.dtype] += tensor.num_bytes
    stored = _STORED[max(num_bytes, key=lambda name: num_bytes[name])]
    return torch.float32 if stored == torch.float16 else stored


def state_arrays(
    model: Gemma2ForCausalLM, *, whole: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yields (Hugging Face name, array) of every parameter, as `save_checkpoint` takes them.

    Args:
        model: on any device; in float32 or bfloat16.
        whole: gives all values of a parameter, where this process holds only a part of them.

    Yields:
        Arrays in float32 or ml_dtypes.bfloat16, in the order of the forward pass; the head is the embedding and does
        not come. On the CPU they share the parameters' memory: save them before the next training step.

    Raises:
        CheckpointError: the head is no longer the embedding, so that one of the two would be lost.
    """
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        raise CheckpointError(
            "lm_head.weight is not the embedding's parameter any more, but Gemma 2 stores one for both; tie them again "
            "with model.lm_head.weight = model.model.embed_tokens.weight"
        )
    for name in expected_tensors(model.config):
        value = whole(model.get_parameter(name)).cpu().contiguous()
        if value.dtype == torch.bfloat16:
            yield name, value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield name, value.numpy()


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        hint = " Gemma 2 overflows float16; use bfloat16" if dtype in ("float16", "half", "fp16") else ""
        raise ConfigError(
            f"dtype must be auto, {' or '.join(DTYPES)}, but is {dtype!r}.{hint or nearest_name(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def _read(tensor: LazyTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    stored = _STORED[tensor.dtype]
    value = _empty(tensor.shape, stored)
    tensor.read_into(value.view(-1).view(torch.uint8).numpy())
    if stored != dtype and device.type == "cpu":
        return _empty(tensor.shape, dtype).copy_(value)
    return value.to(device=device, dtype=dtype)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory on the CPU; a large tensor's in large pages where Linux gives them, which are found again faster."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
