"""From the rows of a model's matrices to packed ones: which tensors make a packed one, and how large it is."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.config import Gemma2Config
from gemma2.quantization.feedback import Feedback
from gemma2.quantization.packed_model import PACKED_FORMATS, SECOND_PLANE, packed_shapes
from gemma2.runtime import make_runtime

ROUNDING_VERSION: Final = 1
"""Is raised when weights are rounded in a better way, so that copies made before are made again."""
ALIGNMENT: Final = 64
"""What the address of every packed tensor is a multiple of, as the kernels need it."""
TILE: Final = kernels.TILE
"""Rows that are packed together. Ranges of rows that begin at its multiples can be packed one by one."""
_NUM_SAMPLED_ROWS: Final = 8 * kernels.TILE
EMBEDDING: Final = "model.embed_tokens.weight"

_FUSED: Final = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

# Windows knows no flags; its anonymous mappings are private anyway.
_PRIVATE: Final[dict[str, Any]] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)


@dataclass(frozen=True, kw_only=True)
class RoundingError:
    """What rounding did to some weights, or to what they put out."""

    squared_error: float = 0.0
    """Sum of (w - rounded w)², or of the outputs' errors squared."""
    squared_weight: float = 0.0
    """Sum of w², or of the outputs squared."""

    def __add__(self, other: RoundingError) -> RoundingError:
        return RoundingError(
            squared_error=self.squared_error + other.squared_error,
            squared_weight=self.squared_weight + other.squared_weight,
        )

    @property
    def relative(self) -> float:
        """The root of their quotient; of weights, it is that of outputs too if inputs are independent and alike."""
        return (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0


def packed_parts(config: Gemma2Config) -> dict[str, tuple[str, ...]]:
    """Names, for each tensor of a packed model, the tensors whose rows it holds, one tensor after the other."""
    parts = {}
    for name in packed_shapes(config):
        module = name.removesuffix(".weight")
        for fused, separate in _FUSED.items():
            if module.endswith(fused):
                prefix = module.removesuffix(fused)
                parts[name] = tuple(f"{prefix}{part}.weight" for part in separate)
        parts.setdefault(name, (name,))
    return parts


def with_second_plane(weight_format: str, wanted: bool | None) -> bool:
    """Whether an embedding is packed in two planes (`SECOND_PLANE`); None: in q4, the one format that has them.

    Raises:
        ValueError: it is wanted of a format that has no second plane.
    """
    if wanted and weight_format != "q4":
        raise ValueError(f"only q4 has a second plane, but the format is {weight_format}")
    return weight_format == "q4" if wanted is None else wanted


def packed_sizes(config: Gemma2Config, weight_format: str, *, second_plane: bool | None = None) -> dict[str, int]:
    """The bytes of each tensor of a packed model, in the order of use; those of a norm are its values in float32.

    Args:
        config: the architecture.
        weight_format: one of `PACKED_FORMATS`.
        second_plane: whether `SECOND_PLANE` is there, which then comes after the embedding; None: in q4.
    """
    second_plane = with_second_plane(weight_format, second_plane)
    sizes = {}
    for name, shape in packed_shapes(config).items():
        sizes[name] = 4 * shape[0] if len(shape) == 1 else kernels.matrix_bytes(weight_format, *shape)
        if name == EMBEDDING and second_plane:
            sizes[SECOND_PLANE] = sizes[name]
    return sizes


def aligned_memory(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros at a multiple of `ALIGNMENT` that take no room before they are written.

    They go back to the system with the last array over them. Linux may give them large pages, which make reading
    weights in long runs faster.
    """
    memory = mmap.mmap(-1, max(num_bytes, 1), **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, count=num_bytes)


class Packer:
    """Rounds rows of weights into packed form.

    Args:
        weight_format: one of `PACKED_FORMATS`.
        num_threads: threads that share the rows.
    """

    def __init__(self, weight_format: str, num_threads: int) -> None:
        if weight_format not in PACKED_FORMATS:
            raise ValueError(f"a packed format is one of {', '.join(PACKED_FORMATS)}, but this is {weight_format!r}")
        self.format: Final = weight_format
        self._runtime = make_runtime(num_threads)

    def num_bytes(self, num_rows: int, num_inputs: int) -> int:
        """The packed size of so many rows. Rows before a multiple of `TILE` take a whole number of tiles."""
        return kernels.matrix_bytes(self.format, num_rows, num_inputs) if num_rows else 0

    def pack(
        self, rows: npt.NDArray[Any], out: npt.NDArray[np.uint8], *, feedback: Feedback | None = None
    ) -> RoundingError:
        """Rounds some rows.

        Args:
            rows: (outputs, inputs) float32, or the bits of bfloat16 as uint16.
            out: (num_bytes,), written; at a multiple of `ALIGNMENT`.
            feedback: how errors make up for each other, for q8 and q4; left out, every weight is rounded on its own.

        Raises:
            ValueError: a weight is NaN, infinite or too large for the format.
        """
        if feedback is None:
            error, weight = kernels.pack_matrix(self._runtime, rows, self.format, out)
        else:
            error, weight = kernels.pack_matrix(
                self._runtime, rows, self.format, out, feedback.importance, feedback.factors
            )
        return RoundingError(squared_error=error, squared_weight=weight)

    def pack_lost(
        self, rows: npt.NDArray[Any], first: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]
    ) -> RoundingError:
        """Rounds what the packing of `rows` lost; see `SECOND_PLANE`.

        Args:
            rows: as they were given to `pack`.
            first: what `pack` made of them.
            out: the packed bytes of the second plane, written.

        Returns:
            The error of both planes together.
        """
        outputs, inputs = rows.shape
        lost = kernels.unpack_matrix(self._runtime, kernels.Matrix(self.format, outputs, inputs, first))
        exact = rows if rows.dtype == np.float32 else bfloat16_to_float32(rows)
        np.subtract(exact, lost, out=lost)
        error, _ = kernels.pack_matrix(self._runtime, lost, self.format, out)
        flat = exact.reshape(-1)
        return RoundingError(squared_error=error, squared_weight=float(np.dot(flat, flat)))

    def output_error(
        self, rows: npt.NDArray[Any], planes: Sequence[npt.NDArray[np.uint8]], samples: npt.NDArray[np.float32]
    ) -> RoundingError:
        """What rounding does to the outputs of the first of some rows, for these inputs.

        Args:
            rows: as they were given to `pack`.
            planes: what `pack` made of them, and `pack_lost` if there is a second plane.
            samples: (n, inputs).
        """
        count = min(len(rows), _NUM_SAMPLED_ROWS)
        exact = rows[:count] if rows.dtype == np.float32 else bfloat16_to_float32(rows[:count])
        lost = exact.copy()
        for plane in planes:
            data = plane[: self.num_bytes(*exact.shape)]
            lost -= kernels.unpack_matrix(self._runtime, kernels.Matrix(self.format, count, exact.shape[1], data))
        outputs, errors = samples @ exact.T, samples @ lost.T
        return RoundingError(
            squared_error=float(np.sum(errors * errors)), squared_weight=float(np.sum(outputs * outputs))
        )


def layout_of(weight_format: str) -> dict[str, str]:
    """What decides how packed bytes are read, besides the format's name."""
    codebook = " ".join(map(str, kernels.Q4_CODEBOOK)) if weight_format == "q4" else ""
    return {"group": str(kernels.GROUP), "tile": str(kernels.TILE), "codebook": codebook}


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widens the bits of bfloat16, which is exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
