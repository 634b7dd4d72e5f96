"""How much memory training takes of the machine, and how the C library deals with it."""

from __future__ import annotations

import ctypes
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has allocated on a CUDA device, or else had in the machine's memory, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def return_large_tensors() -> bool:
    """Lets the C library return the memory of each tensor of 2 MB and more as soon as it is freed.

    glibc keeps freed memory for later, but finds it again badly for aligned requests, which all of PyTorch's are: a
    training step of the 2B at 2 × 1024 tokens then takes half more for activations than it holds. The price is that
    the system clears pages anew, some hundredths of a step. It holds for the whole process from now on.

    Returns:
        Whether the C library is one that can be told so: glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        library.gnu_get_libc_version  # noqa: B018  (others have mallopt in name only)
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        return bool(library.mallopt(mmap_threshold, 2_000_000) and library.mallopt(trim_threshold, 1 << 28))
    except (OSError, AttributeError):
        return False
