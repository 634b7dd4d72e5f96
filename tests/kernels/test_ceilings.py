"""Ceilings: plausible figures and clear errors. How fast this machine is, no test says."""

import numpy as np
import pytest

from gemma2 import _kernels as kernels

ISAS = kernels.available_isas()
KINDS = ("int8", "bfloat16", "float32")


def aligned_bytes(size: int, offset: int = 0) -> np.ndarray:
    memory = np.zeros(size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + size]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_dot_peak_is_plausible(kind, isa, num_threads):
    best, median = kernels.measure_dot_peak(kernels.Runtime(num_threads, isa), kind, 0.01)
    # From a slow emulator to a few hundred cores.
    assert 1e6 < median <= best < 1e16


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 511, 512, 513, 1 << 20, (1 << 20) + 1, (5 << 20) + 777])
def test_read_bandwidth_of_any_size(size, isa):
    for num_threads in (1, 2, 3):
        best, median = kernels.measure_read_bandwidth(kernels.Runtime(num_threads, isa), aligned_bytes(size), 0.0)
        assert 0 < median <= best < 1e15


def test_read_takes_longer_for_more_bytes():
    """A loop that the compiler dropped would read a hundred times as much in the same time."""
    runtime = kernels.Runtime(1)
    small = 8 << 20
    large = 8 * small
    seconds = {}
    for size in (small, large):
        best, _ = kernels.measure_read_bandwidth(runtime, aligned_bytes(size), 0.1)
        seconds[size] = size / best
    assert seconds[large] > 2 * seconds[small]


def test_mistakes_are_named():
    runtime = kernels.Runtime(1)
    with pytest.raises(ValueError, match="int8, bfloat16 or float32, but is 'int4'"):
        kernels.measure_dot_peak(runtime, "int4", 0.1)
    for seconds in (-1.0, 61.0, float("nan")):
        with pytest.raises(ValueError, match="seconds must be from 0 to 60"):
            kernels.measure_dot_peak(runtime, "int8", seconds)
        with pytest.raises(ValueError, match="seconds must be from 0 to 60"):
            kernels.measure_read_bandwidth(runtime, aligned_bytes(64), seconds)
    with pytest.raises(ValueError, match="at least one byte"):
        kernels.measure_read_bandwidth(runtime, aligned_bytes(64)[:0], 0.1)
    with pytest.raises(ValueError, match="multiple of 64"):
        kernels.measure_read_bandwidth(runtime, aligned_bytes(64, offset=8), 0.1)
    with pytest.raises(TypeError):
        kernels.measure_read_bandwidth(runtime, np.zeros(64, np.float32), 0.1)
