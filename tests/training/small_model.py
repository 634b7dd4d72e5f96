"""A model of a few thousand weights whose caps both bite, packed rows for it, and what transformers makes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemma2.config import Gemma2Config
from gemma2.data import PackedBatch
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.objectives import Batch, next_token_objective

CONFIG = Gemma2Config(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=12,
    vocab_size=150,
    sliding_window=5,
    max_position_embeddings=64,
    attn_logit_softcapping=2.0,  # low, so that both caps bite
    final_logit_softcapping=3.0,
)


def small_model(dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any) -> Gemma2ForCausalLM:
    """Weights so large that scores and logits pass their caps."""
    model = Gemma2ForCausalLM(CONFIG.replace(**changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model


def packed_row(*lengths: int, padding: int = 0, seed: int = 0) -> PackedBatch:
    """One row of documents of random tokens, with padding at its end."""
    draw = np.random.default_rng(seed)
    columns: list[list[int]] = [[], [], [], []]
    for segment, length in enumerate(lengths, start=1):
        ids = [2, *draw.integers(3, 150, length).tolist()]
        columns[0] += ids[:-1]
        columns[1] += ids[1:]
        columns[2] += range(length)
        columns[3] += [segment] * length
    for column, filler in zip(columns, (0, -100, 0, 0), strict=True):
        column += [filler] * padding
    arrays = [np.array([column], dtype=np.int64) for column in columns]
    return PackedBatch(input_ids=arrays[0], labels=arrays[1], positions=arrays[2], segment_ids=arrays[3])


def stacked(*batches: PackedBatch) -> PackedBatch:
    """One batch with all their rows, which are of one length."""
    names = [field.name for field in dataclasses.fields(PackedBatch)]
    return PackedBatch(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names})


def batch_of(packed: PackedBatch) -> Batch:
    """On the CPU."""
    return Batch.on_device(packed, torch.device("cpu"))


DOCUMENTS = packed_row(9, 14, 3, padding=4)


def with_adapter(
    model: Gemma2ForCausalLM, *, std: float = 0.3, is_lean: bool = True, **settings: Any
) -> Gemma2ForCausalLM:
    """Puts adapters into a model, in place, whose updates are not zero.

    Args:
        model: to adapt.
        std: of the updates' second matrices.
        is_lean: whether our arithmetic computes them, or PEFT's own.
        settings: those of `AdapterSettings`.
    """
    from gemma2.training.adapters import add_adapter
    from gemma2.training.tune_settings import AdapterSettings

    add_adapter(model, AdapterSettings(**{"r": 3, "lora_alpha": 6, **settings}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    for module in model.modules():
        if not is_lean and hasattr(module, "lora_A"):
            vars(module).pop("forward", None)
    return model


def loss_and_gradients(
    model: Gemma2ForCausalLM, dtype: torch.dtype, packed: PackedBatch = DOCUMENTS
) -> tuple[float, dict[str, Tensor]]:
    """The summed loss of the next token with products in `dtype`, and its gradient by each trained parameter."""
    model.zero_grad()
    loss = next_token_objective(compute_dtype=dtype, compiled=False)(model, batch_of(packed))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            gradients[name] = parameter.grad
    return loss.item(), gradients


def reference_logits(model: Gemma2ForCausalLM, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """(L, V) logits of a row's segments from transformers in float64, each run alone, and its parameters.

    Call it inside `hf_reference.float64_casts`, and take gradients there too.
    """
    from hf_reference import hf_model

    weights = {name: value.detach().numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    reference = hf_model(model.config, weights, torch.float64)
    ids, segments = torch.from_numpy(packed.input_ids[0]), packed.segment_ids[0]
    logits = []
    for segment in range(1, segments.max() + 1):
        logits.append(reference(ids[None, np.flatnonzero(segments == segment)]).logits[0])
    logits.append(torch.zeros(int((segments == 0).sum()), model.config.vocab_size, dtype=torch.float64))
    return torch.cat(logits), dict(reference.named_parameters())


class LargestTensor(TorchDispatchMode):
    """Notes the most rows that a tensor of `width` columns has while it is on, backward passes included.

    Tensors that do not lie row by row in memory, such as the embedding turned round, are other tensors' values.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.num_rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[-1] == self.width and leaf.is_contiguous():
                self.num_rows = max(self.num_rows, leaf.numel() // self.width)
        return result
