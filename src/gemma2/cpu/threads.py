"""How many threads the CPU engine uses unless it is told."""

from __future__ import annotations

import os
from pathlib import Path

from gemma2.errors import ConfigError

VARIABLE = "GEMMA2_NUM_THREADS"


MAX_THREADS = 1024


def resolve_num_threads(num_threads: int | None) -> int:
    """Returns the number asked for, or `default_num_threads()` for None.

    Raises:
        ConfigError: it is not a whole number from 1 to 1024.
    """
    if num_threads is None:
        return default_num_threads()
    if not isinstance(num_threads, int) or isinstance(num_threads, bool) or not 1 <= num_threads <= MAX_THREADS:
        raise ConfigError(f"num_threads must be a whole number from 1 to {MAX_THREADS}, but is {num_threads!r}")
    return num_threads


def default_num_threads() -> int:
    """One thread for each physical core that this process may use; or what GEMMA2_NUM_THREADS says.

    Two hardware threads of a core share its arithmetic and its way to memory, so the second adds nothing here. A
    container's limit on processor time (cgroup v2 `cpu.max`) counts as well.

    Raises:
        ConfigError: GEMMA2_NUM_THREADS is not a whole number from 1 to 1024.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if not forced.isdecimal() or len(forced) > 9 or not 1 <= int(forced) <= MAX_THREADS:
            raise ConfigError(f"{VARIABLE} must be a whole number from 1 to {MAX_THREADS}, but is {forced!r:.80}")
        return int(forced)
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _cpu_limit()))


def _siblings(cpu: int) -> str:
    """The hardware threads of a processor's core, as one text; the processor alone where the system does not say."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _cpu_limit() -> int:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return os.cpu_count() or 1
