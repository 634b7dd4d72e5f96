"""What kernels run on: threads and an instruction set, made here so that every mistake is a `ConfigError`."""

from __future__ import annotations

from gemma2 import _kernels as kernels
from gemma2.errors import ConfigError


def make_runtime(num_threads: int, isa: str = "auto") -> kernels.Runtime:
    """Starts threads.

    Args:
        num_threads: from 1 to 1024, the caller's own among them.
        isa: "auto" for the best instruction set that the processor has (`GEMMA2_ISA` changes that), or one of
            `available_isas()`.

    Raises:
        ConfigError: the processor has no such instruction set, or the system does not give so many threads.
    """
    if not isinstance(isa, str):
        raise ConfigError(f"isa must be a name, such as 'auto', but is {isa!r}")
    try:
        return kernels.Runtime(num_threads, isa)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"the system does not give {num_threads} threads: {error}; ask for fewer, by num_threads or "
            "GEMMA2_NUM_THREADS, or raise its limits"
        ) from None
