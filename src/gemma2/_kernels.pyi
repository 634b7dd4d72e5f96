"""Compiled kernels for the CPU: arrays in, arrays out. Sources in `kernels/`."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

GROUP: Final[int]
"""Inputs that share a scale, in weights and in activations."""
TILE: Final[int]
"""Outputs of a matrix that are packed together."""
Q4_CODEBOOK: Final[tuple[int, ...]]
"""The values of the 16 codes of q4, in units of a block's scale."""

def available_isas() -> list[str]:
    """The instruction sets that this processor has, the best one first."""

class Runtime:
    """Threads and an instruction set: what every kernel needs besides its arrays."""

    def __init__(self, num_threads: int, isa: str = "auto") -> None: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...

class Activations:
    """Rows of activations as a matrix product reads them: "int8" (a scale per group), "bfloat16" or "float32"."""

    def __init__(self, format: str, capacity: int, width: int) -> None: ...
    @property
    def format(self) -> str: ...
    @property
    def capacity(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def rows(self) -> int: ...
    def dequantized(self) -> npt.NDArray[np.float32]:
        """The rows in use as (rows, width) float32."""

def matrix_bytes(format: str, outputs: int, inputs: int) -> int:
    """The size of a packed matrix in bytes."""

class Matrix:
    """A packed weight matrix (outputs, inputs) over memory that it keeps alive: (size,) uint8, 64-byte aligned."""

    def __init__(self, format: str, outputs: int, inputs: int, data: npt.NDArray[Any]) -> None: ...
    @property
    def format(self) -> str: ...
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def activation_format(self) -> str: ...

# Kernels on rows

def rms_norm(
    runtime: Runtime, x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], epsilon: float, out: Activations
) -> None:
    """out = x / sqrt(mean(x²) + epsilon) · (1 + weight), row by row. x: (rows, width)."""

def add_norm(
    runtime: Runtime,
    residual: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
    post_weight: npt.NDArray[np.float32],
    epsilon: float,
) -> None:
    """residual += rms_norm(y, post_weight), row by row, in place. residual and y: (rows, width)."""

def add_rms_norm(
    runtime: Runtime,
    residual: npt.NDArray[np.float32],
    y: npt.NDArray[np.float32],
    post_weight: npt.NDArray[np.float32],
    epsilon: float,
    next_weight: npt.NDArray[np.float32],
    out: Activations,
) -> None:
    """`add_norm`, then out = rms_norm(residual, next_weight), in one pass; the same bits as one after the other."""

def geglu(runtime: Runtime, gate_up: npt.NDArray[np.float32], out: Activations) -> None:
    """out = gelu_tanh(gate) · up. gate_up: (rows, 2 · out.width), in each row the gate first."""

def write_activations(runtime: Runtime, x: npt.NDArray[np.float32], out: Activations) -> None:
    """out = x: (rows, width). A group of int8 that holds NaN or infinity becomes NaN."""

def soft_cap(runtime: Runtime, x: npt.NDArray[np.float32], cap: float) -> None:
    """x = cap · tanh(x / cap) in place. x: (rows, width); cap above 0."""

def embed(
    runtime: Runtime, matrix: Matrix, ids: npt.NDArray[np.int32], scale: float, out: npt.NDArray[np.float32]
) -> None:
    """out = scale · (outputs `ids` of the matrix). ids: (rows,); out: (rows, matrix.inputs)."""

# Kernels on rows of logits: (rows, width) float32, the values of a row neighbours, the rows at any distance

def top_k(
    runtime: Runtime,
    logits: npt.NDArray[np.float32],
    k: int,
    ids: npt.NDArray[np.int32],
    values: npt.NDArray[np.float32],
) -> None:
    """The k largest of each row, descending; equal ones by ascending id, NaN last. ids, values: (rows, k)."""

def softmax_weights(
    runtime: Runtime, logits: npt.NDArray[np.float32], temperature: float, out: npt.NDArray[np.float32]
) -> None:
    """out = exp((logits - max) / temperature): (rows, width); NaN where a row holds NaN, +inf or -inf alone."""

def softmax(
    runtime: Runtime, logits: npt.NDArray[np.float32], temperature: float, out: npt.NDArray[np.float32]
) -> None:
    """`softmax_weights`, divided by the sum of each row."""

def log_normalizers(runtime: Runtime, logits: npt.NDArray[np.float32], out: npt.NDArray[np.float64]) -> None:
    """out = log(sum(exp(logits))) of each row: (rows,); NaN for a row that holds NaN, +inf or -inf alone."""

def block_sums(runtime: Runtime, x: npt.NDArray[np.float32], block: int, out: npt.NDArray[np.float64]) -> None:
    """out[i] = the sum of x[i · block : (i + 1) · block], in float64. x: (size,); out: (size / block, rounded up)."""

def nucleus(runtime: Runtime, weights: npt.NDArray[np.float32], fraction: float, ids: npt.NDArray[np.int32]) -> int:
    """Writes the fewest largest weights that sum to at least `fraction` of all to ids[:n], ascending, and returns n.

    Of equal weights the first. weights, ids: (size,); no weight may be negative or NaN, and one must be above 0.
    """

# Packing of weights

def pack_matrix(
    runtime: Runtime,
    weights: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    format: str,
    out: npt.NDArray[np.uint8],
    importance: npt.NDArray[np.float32] | None = None,
    feedback: npt.NDArray[np.float32] | None = None,
) -> tuple[float, float]:
    """Rounds weights (outputs, inputs), float32 or the bits of bfloat16, into `out`: (matrix_bytes,), 64-byte aligned.

    importance: (inputs,) weights of the squared error. feedback: (inputs, block), for q4 and q8: row k says how much of
    the error at input k is taken off each input of its block; those up to k are not read. Ranges of rows that start at
    multiples of 32 can be packed one by one. Returns the sums of (w - rounded w)² and of w². Raises ValueError for NaN,
    infinity, and weights beyond the format's range.
    """

def unpack_matrix(runtime: Runtime, matrix: Matrix) -> npt.NDArray[np.float32]:
    """The weights that a packed matrix stands for: (outputs, inputs)."""

# Ceilings of the machine

def measure_read_bandwidth(runtime: Runtime, data: npt.NDArray[np.uint8], seconds: float) -> tuple[float, float]:
    """Bytes per second that the threads read of `data` (1-D, 64-byte aligned): (best, median) of several passes."""

def measure_dot_peak(runtime: Runtime, kind: str, seconds: float) -> tuple[float, float]:
    """Operations per second of multiply-adds in registers, two each: (best, median) of several passes.

    kind: "int8", "bfloat16" or "float32".
    """

# Matrix products

def float_matmul(runtime: Runtime, x: Activations, w: Matrix, out: npt.NDArray[np.float32]) -> None:
    """out = x · wᵀ for weights in float32 or bfloat16. out: (x.rows, w.outputs)."""

def matmul(runtime: Runtime, x: Activations, w: Matrix, out: npt.NDArray[np.float32]) -> None:
    """out = x · wᵀ for weights of any format. out: (x.rows, w.outputs)."""

# The product with 4- and 8-bit weights

def quantized_matmul(runtime: Runtime, x: Activations, w: Matrix, out: npt.NDArray[np.float32]) -> None:
    """out (rows, outputs) = x · Wᵀ. x: int8; w: q4 or q8. The same bits whatever the threads, isa and other rows."""

# Attention and its cache

KV_BLOCK: Final[int]
"""Tokens of a block of the cache."""

class KVCache:
    """Keys and values of one layer in blocks, over memory that it keeps alive.

    dtype: "float32", "bfloat16" or "int8" (a scale per token and head). head_dim: even, at most 1024.
    memory: (num_blocks · block_bytes,) uint8, 64-byte aligned; what is in it does not matter.
    """

    def __init__(
        self, dtype: str, kv_heads: int, head_dim: int, num_blocks: int, memory: npt.NDArray[np.uint8]
    ) -> None: ...
    @staticmethod
    def block_bytes(dtype: str, kv_heads: int, head_dim: int) -> int:
        """The size of a block: `KV_BLOCK` tokens of all heads."""

    @property
    def dtype(self) -> str: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    def keys(self, block: int, kv_head: int) -> npt.NDArray[np.float32]:
        """The keys of a block as (KV_BLOCK, head_dim); those of tokens not written yet are anything."""

    def values(self, block: int, kv_head: int) -> npt.NDArray[np.float32]:
        """The values of a block as (KV_BLOCK, head_dim)."""

class BatchTable:
    """The sequences of one forward pass and where their blocks are (copied).

    row_starts: (n + 1,) int32, rows row_starts[i] … row_starts[i + 1] - 1 are the next tokens of sequence i.
    positions: (n,) int32, the absolute position of the first of them.
    block_tables: (n, blocks) int32, entry j is the block of positions j · KV_BLOCK and on, anything where no row sees.
    """

    def __init__(
        self,
        row_starts: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
    ) -> None: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_rows(self) -> int: ...

def append_kv(
    runtime: Runtime,
    qkv: npt.NDArray[np.float32],
    cos: npt.NDArray[np.float32],
    sin: npt.NDArray[np.float32],
    table: BatchTable,
    cache: KVCache,
    query_scale: float,
    queries: npt.NDArray[np.float32],
) -> None:
    """Turns queries and keys by their position (RoPE, half-split), and writes keys and values into the cache.

    qkv: (rows, (heads + 2 · kv_heads) · head_dim). cos, sin: (rows, head_dim / 2). queries: (rows, heads · head_dim),
    written: turned and multiplied by query_scale. The first token of a block zeroes its values; so a sequence that
    goes on inside a block needs the block itself or a copy of it.
    """

def attend(
    runtime: Runtime,
    queries: npt.NDArray[np.float32],
    table: BatchTable,
    cache: KVCache,
    window: int,
    cap: float,
    out: npt.NDArray[np.float32],
) -> None:
    """out = softmax(cap · tanh(q · k / cap)) · v over the keys that a row sees, of the rows after `append_kv`.

    window: tokens that a row sees, itself included; 0 for all. cap: 0 for none. queries, out: (rows, heads · head_dim).
    A row's bits depend on its query, keys and values only.
    """

def copy_block(runtime: Runtime, cache: KVCache, source: int, destination: int) -> None:
    """Copies a block of all heads, for a sequence that shares the beginning of it with another one."""

def add_selected_outputs(
    runtime: Runtime,
    x: Activations,
    w: Matrix,
    ids: npt.NDArray[np.int32],
    values: npt.NDArray[np.float32],
) -> None:
    """values[row, i] += x[row] · w[ids[row, i]], for weights in q4 or q8: the products that `matmul` makes, but few.

    ids, values: (x.rows, n).
    """
