"""How many bytes a Gemma 2 takes: to keep, to run and to train. Pure arithmetic on the config; nothing is measured.

Letters in formulas: D width, I MLP width, H head size, N query heads, K key/value heads, V vocabulary rows, B
sequences, L tokens of each, C tokens of one prefill chunk, S keys that a query meets, W window.

What is not covered: the interpreter and its libraries (about 0.4 GiB with PyTorch), the allocator's slack, and the
scratch of matrix-product libraries. So a figure here is a floor; leave a tenth more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError, nearest_name

GROUP_SIZE: Final = 64
"""Weights that share one scale in q8 and q4, and activations that do in their products."""
TILE_ROWS: Final = 32
"""Rows of a q8 or q4 matrix that are packed together; what is missing in the last tile is filled up."""
SCALE_BYTES: Final = 2
"""A weight's scale is a float16."""
KV_SCALE_BYTES: Final = 4
"""The scale of an int8 key or value is a float32."""
WEIGHT_FORMATS: Final[Mapping[str, float]] = {"float32": 32, "bfloat16": 16, "q8": 8.25, "q4": 4.25}
"""Bits per weight of a matrix whose width is a multiple of `GROUP_SIZE`: q8 is 8 + 16 / 64, q4 is 4 + 16 / 64."""
KV_FORMATS: Final = ("float32", "bfloat16", "int8")
ADAPTABLE_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a layer, which are what LoRA adapts."""

QUERY_BLOCK: Final = 256
"""Queries whose scores exist at once; attention takes long inputs in blocks of so many."""
BLOCK_VALUES: Final = 1 << 18
"""Values of a norm or GeGLU that are worked on at once: 1 MiB in float32, half of what two second-level caches hold."""
ENGINE_ROWS: Final = 512
"""Rows that the CPU engine takes through its layers together; longer chunks go in parts."""
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


def layer_matrices(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """Names the linear maps of one layer, each with (outputs, inputs)."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (queries, config.hidden_size),
        "k_proj": (keys, config.hidden_size),
        "v_proj": (keys, config.hidden_size),
        "o_proj": (config.hidden_size, queries),
        "gate_proj": (config.intermediate_size, config.hidden_size),
        "up_proj": (config.intermediate_size, config.hidden_size),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }


def weight_bytes(config: Gemma2Config, weight_format: str, *, second_plane: bool = False) -> int:
    """Size of all weights, the tied embedding once, in bytes.

    Matrices take the format's bits; the norms, a ten-thousandth of all, stay float32 where matrices are quantized.

    Args:
        config: the architecture.
        weight_format: one of `WEIGHT_FORMATS`. In q8 and q4, each `GROUP_SIZE` neighbours of a row share a float16
            scale; the embedding, which is the head, is quantized too. Rows are filled up to a multiple of
            `GROUP_SIZE`, and matrices to one of `TILE_ROWS`: the layout is that of kernels/matrix.h.
        second_plane: whether the head has two planes of 4 bits, as `gemma2 quantize` gives it in q4.

    Raises:
        ConfigError: there is no such format.
    """
    if weight_format not in WEIGHT_FORMATS:
        raise ConfigError(
            f"there is no weight format {weight_format!r}; they are {', '.join(WEIGHT_FORMATS)}."
            + nearest_name(weight_format, WEIGHT_FORMATS)
        )
    if weight_format in ("float32", "bfloat16"):
        return config.count_parameters().total * (4 if weight_format == "float32" else 2)
    value_bits = 8 if weight_format == "q8" else 4
    layer = sum(_quantized_bytes(*shape, value_bits=value_bits) for shape in _packed_layer_matrices(config))
    embedding = _quantized_bytes(config.vocab_size, config.hidden_size, value_bits=value_bits)
    norms = 4 * _norm_parameters(config)
    return embedding * (2 if second_plane else 1) + config.num_hidden_layers * layer + norms


def _packed_layer_matrices(config: Gemma2Config) -> list[tuple[int, int]]:
    """The matrices of a layer as they are packed: q, k and v are one, and so are gate and up."""
    rows = {name: outputs for name, (outputs, _) in layer_matrices(config).items()}
    width = config.hidden_size
    return [
        (rows["q_proj"] + rows["k_proj"] + rows["v_proj"], width),
        (width, rows["q_proj"]),
        (rows["gate_proj"] + rows["up_proj"], width),
        (width, config.intermediate_size),
    ]


def _quantized_bytes(num_rows: int, num_columns: int, *, value_bits: int) -> int:
    num_tiles, num_groups = -(-num_rows // TILE_ROWS), -(-num_columns // GROUP_SIZE)
    return num_tiles * TILE_ROWS * num_groups * (GROUP_SIZE * value_bits // 8 + SCALE_BYTES)


def kv_cache_bytes(config: Gemma2Config, num_tokens: int, *, kv_format: str = "bfloat16", bounded: bool = True) -> int:
    """Size of the KV cache of one sequence: 2 · K · H values for each token and layer.

    Args:
        config: the architecture.
        num_tokens: length of the sequence.
        kv_format: one of `KV_FORMATS`; int8 adds one float32 scale for each key and each value vector of a head.
        bounded: whether local layers keep only the last W tokens.

    Returns:
        The bytes; the CPU engine takes them in blocks of 64 tokens, so up to 63 tokens more.

    Raises:
        ConfigError: there is no such format.
    """
    if kv_format not in KV_FORMATS:
        raise ConfigError(f"there is no KV format {kv_format!r}; they are {', '.join(KV_FORMATS)}")
    bytes_per_value = {"float32": 4, "bfloat16": 2, "int8": 1}[kv_format]
    num_bytes = config.kv_cache_bytes(num_tokens, bytes_per_value=bytes_per_value, bounded=bounded)
    if kv_format == "int8":
        num_vectors = num_bytes // config.head_dim
        num_bytes += num_vectors * KV_SCALE_BYTES
    return num_bytes


def logits_bytes(config: Gemma2Config, num_rows: int) -> int:
    """Size of logits in float32: 4 · V for each row. One row a sequence is enough to generate."""
    return 4 * config.vocab_size * num_rows


def prefill_bytes(config: Gemma2Config, *, chunk_tokens: int, num_keys: int, bytes_per_value: int = 2) -> int:
    """Peak of the activations while a chunk of a prompt goes through a layer, weights and cache not counted.

        residual stream              4 · C · D            before and after attention, its output, the normed input
        the largest of
          a norm                     C · D, its output, and 4 in float32 for `BLOCK_VALUES` of it at a time
          MLP                        3 · C · I            gate, up and their product
          attention                  2 · C · (N + K) · H  q, k, v and the output
            and scores               N · min(C, 256) · S  in float32 twice, before and after the softmax

    Args:
        config: the architecture.
        chunk_tokens: C, tokens that go through the model at once.
        num_keys: S, tokens of the sequence so far, the chunk included.
        bytes_per_value: of everything but the scores; 2 for bf16.
    """
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    stream = 4 * chunk_tokens * config.hidden_size * bytes_per_value
    norm_values = chunk_tokens * config.hidden_size
    norm = bytes_per_value * norm_values + 4 * 4 * min(norm_values, BLOCK_VALUES)
    mlp = 3 * chunk_tokens * config.intermediate_size * bytes_per_value
    num_scores = config.num_attention_heads * min(chunk_tokens, QUERY_BLOCK) * num_keys
    attention = 2 * chunk_tokens * heads * bytes_per_value + num_scores * 2 * 4
    return stream + max(norm, mlp, attention)


def engine_prefill_bytes(config: Gemma2Config, *, chunk_tokens: int) -> int:
    """The CPU engine's buffers while a chunk of a prompt goes through it, with q8 or q4 weights.

    They are made once and used by every layer, so this is all at once; scores exist only in tiles that the processor's
    cache holds. For each of up to `ENGINE_ROWS` tokens, in float32 unless said:

        residual stream, update      2 · D
        attention                    (3 · N + 2 · K) · H  q, k and v; queries, turned; what the heads saw
        MLP                          2 · I                gate and up
        inputs of products           D + N · H + I        int8, with a scale and a sum for each `GROUP_SIZE`

    Args:
        config: the architecture.
        chunk_tokens: tokens that go through the model at once.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    floats = 2 * config.hidden_size + 3 * queries + 2 * keys + 2 * config.intermediate_size
    inputs = 0
    for width in (config.hidden_size, queries, config.intermediate_size):
        inputs += -(-width // GROUP_SIZE) * (GROUP_SIZE + 2 * 4)
    return min(chunk_tokens, ENGINE_ROWS) * (4 * floats + inputs)


# -- training -------------------------------------------------------------------------------------------------------


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
    """AdamW's two moments, float32."""
    activations: int
    """What the backward pass needs of the forward pass, and what it works on."""
    loss: int
    """A chunk of logits and, where the embedding is trained, the head's part of its gradient."""
    gathered: int = 0
    """What several processes put together for the moment: two layers, the gradients of one, the embedding and its."""

    @property
    def total(self) -> int:
        """All of it together."""
        kept = self.weights + self.master_weights + self.gradients + self.optimizer
        return kept + self.activations + self.loss + self.gathered


def full_training(
    config: Gemma2Config, *, batch_size: int, length: int, checkpointing: bool | int, grid: ProcessGrid = _ONE_PROCESS
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
        grid: the processes that share the work.
    """
    count = config.count_parameters().total
    embedding = config.count_parameters().embedding
    activations = activation_bytes(
        config, batch_size=batch_size, length=length, checkpointing=checkpointing, tensor=grid.tensor
    )
    if grid.size > 1:
        norms = _norm_parameters(config)
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
            gathered=(10 * _layer_parameters(config) // grid.tensor + 12 * part) if is_gathered else 0,
        )
    return TrainingMemory(
        weights=2 * count,
        master_weights=4 * count,
        gradients=2 * count,
        optimizer=8 * count,
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
    grid: ProcessGrid = _ONE_PROCESS,
) -> TrainingMemory:
    """Training of LoRA adapters on frozen weights, or of QLoRA if those are quantized.

    Adapters are float32 with float32 gradients and moments: 16 bytes a parameter. Quantized matrices are multiplied
    from a bf16 copy of one matrix at a time, which is counted with the weights. Several processes share weights and
    adapters, and put together two layers and the embedding for the moment; quantized weights, and the adapters beside
    them, are whole in each.

    Args:
        config: the architecture.
        rank: r, width of the adapters.
        modules: which linear maps get one; some of `ADAPTABLE_MODULES`.
        weight_format: of the frozen weights; one of `WEIGHT_FORMATS`.
        on_engine: whether the CPU engine multiplies them, which has them once more in q8, by columns.
        batch_size: B, sequences that go through at once.
        length: L, tokens of each.
        checkpointing: how many layers keep only their input and are computed again in the backward pass; True for all.
        grid: the processes that share the work.

    Raises:
        ConfigError: there is no such format or module, or the rank is below 1.
    """
    modules = tuple(modules)
    count = adapter_parameters(config, rank=rank, modules=modules)
    weights = weight_bytes(config, weight_format)
    if on_engine:
        weights += weight_bytes(config, "q8")
    elif weight_format in ("q8", "q4"):
        weights += 2 * max(outputs * inputs for outputs, inputs in layer_matrices(config).values())
    gathered = 0
    if grid.size > 1 and weight_format not in ("q8", "q4"):
        value_bytes = 4 if weight_format == "float32" else 2
        weights, count = -(-weights // grid.size), -(-count // grid.size)
        if grid.data > 1:
            two_layers = 2 * _layer_parameters(config)
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
        optimizer=8 * count,
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


def _layer_parameters(config: Gemma2Config) -> int:
    """Of the linear maps of one layer."""
    return sum(outputs * inputs for outputs, inputs in layer_matrices(config).values())


def _norm_parameters(config: Gemma2Config) -> int:
    return (4 * config.num_hidden_layers + 1) * config.hidden_size
