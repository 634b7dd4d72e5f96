"""What kernels run on: threads and an instruction set, made here so that every mistake is a `ConfigError`."""

from __future__ import annotations

import os
from typing import Final

from gemma2 import _kernels as kernels
from gemma2.errors import ConfigError, nearest_name

VARIABLE: Final = "GEMMA2_ISA"


def resolve_isa(isa: str, *, setting: str = "isa") -> str:
    """Returns the name of an instruction set that this processor has.

    Args:
        isa: its name, or "auto" for what `GEMMA2_ISA` says, or else the best there is.
        setting: what to call it in the error.

    Raises:
        ConfigError: the processor has none of this name.
    """
    available = kernels.available_isas()
    name = isa.strip().lower()
    if name == "auto" and (forced := os.environ.get(VARIABLE, "").strip()):
        setting, isa, name = VARIABLE, forced, forced.lower()
    if name == "auto":
        return available[0]
    if name not in available:
        raise ConfigError(
            f"{setting} must be an instruction set of this processor, {', '.join(available)}, or auto, but is "
            f"{isa!r:.80}." + nearest_name(name, available)
        )
    return name


def make_runtime(num_threads: int, isa: str = "auto") -> kernels.Runtime:
    """Starts threads.

    Args:
        num_threads: from 1 to 1024, the caller's own among them.
        isa: "auto" for the best instruction set that the processor has (the environment's `GEMMA2_ISA` changes that),
            or one of `available_isas()`. Upper or lower case is the same.

    Raises:
        ConfigError: the processor has no such instruction set, or the system does not give so many threads.
    """
    if not isinstance(isa, str):
        raise ConfigError(f"isa must be a name, such as 'auto', but is {isa!r}")
    isa = resolve_isa(isa)
    try:
        return kernels.Runtime(num_threads, isa)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"the system does not give {num_threads} threads: {error}; ask for fewer, by num_threads or "
            "GEMMA2_NUM_THREADS, or raise its limits"
        ) from None


def share_cores_with_torch() -> None:
    """Lets PyTorch's threads sleep soon after each task, so that the engine's find free cores when the two take turns.

    GNU's OpenMP, which PyTorch has on Linux, keeps its threads turning for some milliseconds otherwise. It reads how
    long when it is loaded, so this must come before PyTorch is imported; what the user has set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
