"""The machine under `gemma2 bench`: its ceilings, its memory, its name."""

from __future__ import annotations

import mmap
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.cli.bench_measure import Ceilings
from gemma2.runtime import make_runtime

_READ_SECONDS: Final = 0.4
_DOT_SECONDS: Final = 0.2
_ENOUGH_BYTES: Final = 256 << 20
"""More than the caches hold: reading so much again comes from memory."""
_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")

DOT_KINDS: Final[Mapping[str, str]] = {"q4": "int8", "q8": "int8", "bfloat16": "bfloat16", "float32": "float32"}
"""For each weight format, the product that prefill is held against."""


class ThisMachine:
    """Measures with threads of its own, which sleep in between.

    Args:
        num_threads: as many as the backend has.
        isa: its instruction set.
        weight_format: its weights' format.
        tensors: its weights; the largest is read for the bandwidth, or if that is too small, memory of this object.
    """

    def __init__(
        self, *, num_threads: int, isa: str, weight_format: str, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        self._runtime = make_runtime(num_threads, isa)
        self._kind = DOT_KINDS[weight_format]
        self._own_bytes = 0
        self._array = max(tensors.values(), key=lambda tensor: tensor.nbytes)
        if self._array.nbytes < _ENOUGH_BYTES:
            memory = mmap.mmap(-1, _ENOUGH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._array = np.frombuffer(memory, np.uint8)
            self._array[:] = 1  # or all its pages would be one page of zeros
            self._own_bytes = _ENOUGH_BYTES

    def ceilings(self) -> Ceilings:
        """See `Machine`."""
        read_best, read = kernels.measure_read_bandwidth(self._runtime, self._array, _READ_SECONDS)
        dot_best, dot = kernels.measure_dot_peak(self._runtime, self._kind, _DOT_SECONDS)
        return Ceilings(read=read, read_best=read_best, dot=dot, dot_best=dot_best)

    def reset_peak(self) -> None:
        """See `Machine`; Linux only."""
        try:
            _CLEAR.write_text("5")
        except OSError:
            return

    def peak_bytes(self) -> int:
        """See `Machine`."""
        try:
            lines = _STATUS.read_text().splitlines()
            peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak - self._own_bytes


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
