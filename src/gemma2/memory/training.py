"""What a step of training takes, in each of the processes that share it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError, nearest_name
from gemma2.memory.running import QUERY_BLOCK
from gemma2.memory.weights import (
    ADAPTABLE_MODULES,
    embedding_bytes,
    layer_matrices,
    layer_parameters,
    norm_parameters,
    weight_bytes,
)

BLOCK_LOGITS: Final = 1 << 20
"""Logits of a training loss that are worked on at once: 4 MiB in float32, which stay in the processor's cache."""
LARGE_VOCABULARY: Final = 1 << 16


def loss_chunk_tokens(vocab_size: int) -> int:
    """How many tokens' logits exist at once in training.

    4 MiB in float32 for a small vocabulary, so that they stay in the processor's cache between the passes over them,
    and never fewer than 128 tokens: each chunk also reads and writes the whole gradient of the embedding, which must be
    little beside its matrix products. 192 for a large one: products of 128 rows run a tenth slower.
    """
    return max(128 if vocab_size < LARGE_VOCABULARY else 192, BLOCK_LOGITS // vocab_size)


@dataclass(frozen=True, kw_only=True)
class ProcessGrid:
    """How many processes share a training step, one on each GPU."""

    data: int = 1
    """Into how many parts a batch is cut, among which the weights are shared (FSDP)."""
    tensor: int = 1
    """How many processes share each matrix product."""

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data * self.tensor


_ONE_PROCESS: Final = ProcessGrid()


def uneven_sizes(config: Gemma2Config, tensor: int) -> list[str]:
    """Names what `tensor` processes cannot share evenly; nothing if they can share every product."""
    sizes = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.num_key_value_heads,
        "inner units of the MLP": config.intermediate_size,
        "words of the vocabulary": config.vocab_size,
    }
    return [f"{size:,} {name}" for name, size in sizes.items() if size % tensor]


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """What a training step holds at its peak in each process, each in bytes."""

    weights: int
    """What the forward pass multiplies with."""
    master_weights: int
    """Float32 copy of what is trained, which the optimizer moves by steps too small for bf16."""
    gradients: int
    optimizer: int
    """AdamW's two moments, float32; Muon has one of each matrix of a layer."""
    activations: int
    """What the backward pass needs of the forward pass, and what it works on."""
    loss: int
    """A chunk of logits and, where the embedding is trained, the head's part of its gradient."""
    reference: int = 0
    """The model that training began with, where a loss compares with it."""
    gathered: int = 0
    """What several processes put together for the moment: two layers, the gradients of one, the embedding and its."""

    @property
    def total(self) -> int:
        """All of it together."""
        kept = self.weights + self.master_weights + self.gradients + self.optimizer
        return kept + self.activations + self.loss + self.reference + self.gathered


def full_training(
    config: Gemma2Config,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool | int,
    muon: bool = False,
    grid: ProcessGrid = _ONE_PROCESS,
) -> TrainingMemory:
    """Training of every weight with AdamW in mixed precision: 16 bytes a parameter, and what a batch adds.

    bf16 weights and gradients (2 + 2), float32 master weights and two float32 moments (4 + 4 + 4). Processes that share
    the weights (grid.data above 1) hold parts of float32 weights, gradients and moments (4 + 4 + 8), and for the moment

        layers        2 · 2 + 2 + 4 a matrix weight of a layer   two in bf16, the gradients of one in bf16 and float32
        embedding     3 · 4 · V · D                              float32: itself, its gradient, and what is added to it

    Args:
        config: the architecture.
        batch_size: B, sequences that go through a process at once (not those that gradients are accumulated over).
        length: L, tokens of each.
        checkpointing: how many layers keep only their input and are computed again in the backward pass; True for all.
        muon: whether the optimizer is Muon, which runs in one process.
        grid: the processes that share the work.
    """
    count = config.count_parameters().total
    embedding = config.count_parameters().embedding
    activations = activation_bytes(
        config, batch_size=batch_size, length=length, checkpointing=checkpointing, tensor=grid.tensor
    )
    if grid.size > 1:
        norms = norm_parameters(config)
        share = norms + -(-(count - norms) // grid.size)
        is_gathered = grid.data > 1
        part = embedding // grid.tensor
        return TrainingMemory(
            weights=0 if is_gathered else 2 * share,
            master_weights=4 * share,
            gradients=4 * share,
            optimizer=8 * share,
            activations=activations,
            loss=_loss_bytes(config, tensor=grid.tensor) + (0 if is_gathered else 4 * part),
            gathered=(10 * layer_parameters(config) // grid.tensor + 12 * part) if is_gathered else 0,
        )
    return TrainingMemory(
        weights=2 * count,
        master_weights=4 * count,
        gradients=2 * count,
        optimizer=8 * count - (4 * config.num_hidden_layers * layer_parameters(config) if muon else 0),
        activations=activations,
        loss=_loss_bytes(config) + 4 * embedding,
    )


def adapter_training(
    config: Gemma2Config,
    *,
    rank: int,
    modules: Iterable[str] = ADAPTABLE_MODULES,
    weight_format: str = "bfloat16",
    on_engine: bool = False,
    batch_size: int,
    length: int,
    checkpointing: bool | int,
    muon: bool = False,
    grid: ProcessGrid = _ONE_PROCESS,
) -> TrainingMemory:
    """Training of LoRA adapters on frozen weights, or of QLoRA if those are quantized.

    Adapters are float32 with float32 gradients and moments: 16 bytes a parameter. Quantized matrices are multiplied
    from a bf16 copy of one matrix at a time, which is counted with the weights; the embedding stays bf16
    beside them. Several processes share weights and adapters, and put together two layers and the embedding for the
    moment; quantized weights, and the adapters beside them, are whole in each.

    Args:
        config: the architecture.
        rank: r, width of the adapters.
        modules: which linear maps get one; some of `ADAPTABLE_MODULES`.
        weight_format: of the frozen weights; one of `WEIGHT_FORMATS`.
        on_engine: whether the CPU engine multiplies them, which has them once more in q8, by columns.
        batch_size: B, sequences that go through at once.
        length: L, tokens of each.
        checkpointing: how many layers keep only their input and are computed again in the backward pass; True for all.
        muon: whether the optimizer is Muon, which runs in one process.
        grid: the processes that share the work.

    Raises:
        ConfigError: there is no such format or module, or the rank is below 1.
    """
    modules = tuple(modules)
    count = adapter_parameters(config, rank=rank, modules=modules)
    weights = weight_bytes(config, weight_format)
    if on_engine:
        weights += weight_bytes(config, "q8")
    elif weight_format in ("q8", "q4"):  # bitsandbytes' maps; the embedding is no map, and stays as it is
        embedding = config.count_parameters().embedding
        weights += 2 * embedding - embedding_bytes(config, weight_format)
        weights += 2 * max(outputs * inputs for outputs, inputs in layer_matrices(config).values())
    gathered = 0
    if grid.size > 1 and weight_format not in ("q8", "q4"):
        value_bytes = 4 if weight_format == "float32" else 2
        weights, count = -(-weights // grid.size), -(-count // grid.size)
        if grid.data > 1:
            two_layers = 2 * layer_parameters(config)
            gathered = value_bytes * (two_layers + config.count_parameters().embedding) // grid.tensor
    activations = activation_bytes(
        config, batch_size=batch_size, length=length, checkpointing=checkpointing, frozen=True, tensor=grid.tensor
    )
    num_kept = _layers_kept(config, checkpointing)[0]
    activations += 2 * rank * len(modules) * num_kept * batch_size * length
    return TrainingMemory(
        weights=weights,
        master_weights=4 * count,
        gradients=4 * count,
        optimizer=(4 if muon else 8) * count,
        activations=activations,
        loss=_loss_bytes(config, tensor=grid.tensor),
        gathered=gathered,
    )


def adapter_parameters(config: Gemma2Config, *, rank: int, modules: Iterable[str] = ADAPTABLE_MODULES) -> int:
    """Counts the parameters of LoRA adapters: r · (inputs + outputs) for each adapted map of each layer.

    Raises:
        ConfigError: there is no such module, or the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"the rank of an adapter must be at least 1, but is {rank}")
    matrices = layer_matrices(config)
    per_layer = 0
    for module in dict.fromkeys(modules):
        if module not in matrices:
            raise ConfigError(
                f"there is no linear map {module!r} in a layer; they are {', '.join(ADAPTABLE_MODULES)}."
                + nearest_name(module, ADAPTABLE_MODULES)
            )
        per_layer += rank * sum(matrices[module])
    return config.num_hidden_layers * per_layer


def activation_bytes(
    config: Gemma2Config,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool | int,
    frozen: bool = False,
    tensor: int = 1,
) -> int:
    """What the backward pass keeps of the forward pass, in bf16, and what it works on at once.

    For each token and layer, in bytes:

        norms         8 · D                their four inputs
        attention     4 · N·H + 4 · K·H    q, k, v and the output
        MLP           4 · I                gate and up
        trained maps  4 · D + 2 · I        the results of two norms and of GeGLU; beside frozen weights, adapters have
                                           them made again

    No scores are kept; the backward pass makes those of `QUERY_BLOCK` queries again. With checkpointing each layer
    keeps its input, 2 · D a token, and the layer that is being computed again keeps the above. What is worked on is the
    larger of 18 bytes for each score of a block, and four values as wide as the MLP for each token. Processes that
    share products share all that is of heads or of the MLP.

    Args:
        config: the architecture.
        batch_size: B, sequences that go through at once.
        length: L, tokens of each.
        checkpointing: how many layers keep only their input and are computed again in the backward pass; True for all.
        frozen: whether what is trained are adapters.
        tensor: how many processes share each matrix product.
    """
    layer = kept_layer_bytes(config, frozen=frozen, tensor=tensor)
    num_kept, num_checkpointed = _layers_kept(config, checkpointing)
    per_token = layer * num_kept + 2 * config.hidden_size * num_checkpointed
    # The last norm's input, its output (kept by the loss) and the gradient that the loss forms for it.
    per_token += 6 * config.hidden_size
    scores = 18 * config.num_attention_heads * min(length, QUERY_BLOCK) * length
    mlp = 4 * 2 * config.intermediate_size * length
    return batch_size * (length * per_token + max(scores, mlp) // tensor)


def _layers_kept(config: Gemma2Config, checkpointing: bool | int) -> tuple[int, int]:
    """Of how many layers all is there at once, the one that is computed again among them; how many keep their input."""
    layers = config.num_hidden_layers
    checkpointed = layers if checkpointing is True else min(int(checkpointing), layers)
    return layers - checkpointed + (checkpointed > 0), checkpointed


def kept_layer_bytes(config: Gemma2Config, *, frozen: bool, tensor: int = 1) -> int:
    """What the backward pass keeps of one layer, for each token; see `activation_bytes`."""
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    of_norms = 8 * config.hidden_size + 4 * 4  # 1 / rms of each norm's input, in float32
    of_products = 4 * heads + 4 * config.intermediate_size
    if not frozen:
        of_norms += 4 * config.hidden_size
        of_products += 2 * config.intermediate_size
    return of_norms + of_products // tensor


def _loss_bytes(config: Gemma2Config, *, tensor: int = 1) -> int:
    # A chunk's logits in bf16, whose place their gradient takes, and five float32 values for each of a block.
    num_words = config.vocab_size // tensor
    return loss_chunk_tokens(num_words) * num_words * 2 + 5 * 4 * BLOCK_LOGITS
