"""Random weights of a real shape, made directly in packed form: to measure speed, no files are needed.

They cost what trained ones cost, since kernels do the same work for all values; what the model says is noise. Each
matrix lies in memory of its own, as reading it must cost what it costs, and no two of its blocks are equal.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.config import Gemma2Config
from gemma2.quantization import PACKED_FORMATS, SECOND_PLANE, PackedModel, packed_shapes

_ALIGNMENT: Final = 64
_GROUP: Final = 64
_TILE: Final = 32
_EMBEDDING: Final = "model.embed_tokens.weight"
# Rounding to 4 bits loses about 7% of the embedding, which is what the second plane holds.
_DEVIATIONS: Final = {_EMBEDDING: 0.02, SECOND_PLANE: 0.0014}
_POOL_BYTES: Final = 16 << 20
"""Random values that are made one by one; more are made of them by flipping bits, ten times as fast."""

_BLOCKS: Final[dict[str, np.dtype[np.void]]] = {
    # Of 32 outputs and 64 inputs: the layouts of kernels/matrix.h.
    "q4": np.dtype([("values", np.uint8, 1024), ("scales", np.float16, _TILE)]),
    "q8": np.dtype([("values", np.uint8, 2048), ("scales", np.float16, _TILE)]),
    "bfloat16": np.dtype([("values", np.uint16, _TILE * _GROUP)]),
    "float32": np.dtype([("values", np.uint32, _TILE * _GROUP)]),
}
# Which bits of a value may be flipped. In a float: its sign and the low ones, so that its magnitude stays. In q8: all
# but the lowest, which is set in every value, so that none becomes -128, which the format does not have.
_FLIPPED: Final = {"q4": 0xFF, "q8": 0xFE, "bfloat16": 0x801F, "float32": 0x801FFFFF}
# Root of the mean square of a random value of scale 1: of the codebook's, and of the odd numbers from -127 to 127.
_CODE_DEVIATION: Final = {
    "q4": float(np.sqrt(np.mean(np.square(kernels.Q4_CODEBOOK)))),
    "q8": float(np.sqrt(np.mean(np.square(np.arange(-127, 128, 2))))),
}


def random_packed_model(
    config: Gemma2Config,
    format: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    second_plane: bool = False,
) -> PackedModel:
    """Makes a model of random weights.

    Matrices have a standard deviation of about inputs ** -0.5, so that each layer keeps the size of its activations,
    and the embedding 0.02; norms' weights are 0, which multiplies by 1. Values are spread evenly, not normally.

    Args:
        config: the architecture; its widths must be multiples of 64 and its vocabulary of 32, as those of all
            published sizes are.
        format: one of `PACKED_FORMATS`.
        seed: the same seed gives the same weights.
        progress: called with (bytes done, bytes in all) after each tensor.
        second_plane: whether the embedding has one (see `SECOND_PLANE`); q4 only.

    Returns:
        The model, in memory of its own: that of its weights and 64 MiB while it is made.

    Raises:
        ValueError: there is no such format, or a width does not divide.
    """
    if format not in PACKED_FORMATS:
        raise ValueError(f"a packed format is one of {', '.join(PACKED_FORMATS)}, but this is {format!r}")
    if second_plane and format != "q4":
        raise ValueError(f"only q4 has a second plane, but the format is {format}")
    shapes = packed_shapes(config)
    if second_plane:
        shapes[SECOND_PLANE] = shapes[_EMBEDDING]
    sizes = {name: _size_bytes(name, shape, format) for name, shape in shapes.items()}
    total = sum(sizes.values())
    memory = _anonymous_memory(total)
    random = np.random.Generator(np.random.SFC64(seed))
    pools: dict[float, npt.NDArray[np.void]] = {}
    tensors: dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.float32]] = {}
    start = 0
    for name, shape in shapes.items():
        place = memory[start : start + sizes[name]]
        start += sizes[name]
        if len(shape) == 1:
            tensors[name] = place[: 4 * shape[0]].view(np.float32)  # zeros, as the system gives memory
        else:
            deviation = _DEVIATIONS.get(name, shape[1] ** -0.5)
            if deviation not in pools:
                pools[deviation] = _make_pool(random, format, deviation)
            _fill(place, pools[deviation], random, format)
            tensors[name] = place
        if progress is not None:
            progress(start, total)
    return PackedModel(config=config, format=format, tensors=tensors)


def _size_bytes(name: str, shape: tuple[int, ...], format: str) -> int:
    if len(shape) == 1:
        return -(-4 * shape[0] // _ALIGNMENT) * _ALIGNMENT
    outputs, inputs = shape
    if outputs % _TILE or inputs % _GROUP:
        raise ValueError(
            f"{name}: random weights need outputs in multiples of {_TILE} and inputs in multiples of {_GROUP}, but "
            f"they are {outputs} and {inputs}"
        )
    return outputs // _TILE * (inputs // _GROUP) * _BLOCKS[format].itemsize


def _anonymous_memory(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros that take no room before they are written, and go back to the system with the last array over them."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8)


def _make_pool(random: np.random.Generator, format: str, deviation: float) -> npt.NDArray[np.void]:
    """Blocks of random weights of this standard deviation."""
    block = _BLOCKS[format]
    pool = np.empty(_POOL_BYTES // block.itemsize, block)
    shape = pool["values"].shape
    if format in _CODE_DEVIATION:
        pool["values"] = random.integers(0, 256, shape, np.uint8)
        if format == "q8":
            pool["values"] |= 1
        scale = deviation / _CODE_DEVIATION[format]
        # Of either sign: the mean of q4's codebook is not 0, and a mean in every weight would turn the residual stream
        # of all tokens into one and the same direction.
        signs = random.choice(np.array([-1.0, 1.0]), pool["scales"].shape)
        pool["scales"] = signs * random.uniform(0.8 * scale, 1.2 * scale, pool["scales"].shape)
    else:
        values = random.random(shape, np.float32)
        values *= np.float32(2 * 3**0.5 * deviation)
        values -= np.float32(3**0.5 * deviation)
        pool["values"] = values.view(np.uint32) >> (16 if format == "bfloat16" else 0)
    return pool


def _fill(place: npt.NDArray[np.uint8], pool: npt.NDArray[np.void], random: np.random.Generator, format: str) -> None:
    """Writes the pool over and over, each time with other bits of the values flipped."""
    block = _BLOCKS[format]
    flipped = np.zeros(1, block)
    flipped["values"] = _FLIPPED[format]
    mask = flipped.view(np.uint64)
    source, target = pool.view(np.uint64).reshape(len(pool), -1), place.view(np.uint64).reshape(-1, len(mask))
    for first in range(0, len(target), len(source)):
        part = target[first : first + len(source)]
        bits = mask & random.integers(0, 1 << 64, len(mask), np.uint64)
        np.bitwise_xor(source[: len(part)], bits, out=part)
