"""What memory this machine has: read from the system, with no library and no GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma2.errors import Gemma2Error


@dataclass(frozen=True, kw_only=True)
class Place:
    """A memory that a model can lie in: the machine's own, or a GPU's."""

    name: str
    total_bytes: int
    free_bytes: int
    """What programs can still take; the total where the system does not say."""

    def judge(self, num_bytes: int) -> str:
        """Says whether `num_bytes` fit: "fits", "needs room" (they would, if other programs left), or "too large"."""
        if num_bytes <= self.free_bytes:
            return "fits"
        return "needs room" if num_bytes <= self.total_bytes else "too large"


def find_places() -> list[Place]:
    """Returns the machine's memory, if the system tells it, and each NVIDIA device's."""
    memory = main_memory()
    return ([memory] if memory is not None else []) + nvidia_devices()


def main_memory(root: Path = Path("/")) -> Place | None:
    """Reads the machine's memory, or the smaller limit of the container that this runs in.

    Args:
        root: where /proc and /sys lie; for tests.

    Returns:
        None if the system does not tell.
    """
    total = free = 0
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kibibytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
        total = kibibytes["MemTotal"] * 1024
        free = kibibytes.get("MemAvailable", kibibytes["MemTotal"]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        total = free = _system_memory()
    if not total:
        return None
    for folder, limit_file, used_file in (
        (root / "sys/fs/cgroup", "memory.max", "memory.current"),
        (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = int((folder / limit_file).read_text())  # "max" where there is none
            used = int((folder / used_file).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that were read once count as used, but are dropped when memory is asked for.
            used -= int(statistics.get("inactive_file", 0))
        except (OSError, ValueError):
            continue
        if limit < total:
            return Place(name="this container", total_bytes=limit, free_bytes=max(0, min(free, limit - used)))
    return Place(name="this machine", total_bytes=total, free_bytes=free)


def nvidia_devices(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> list[Place]:
    """Asks nvidia-smi for the GPUs; an empty list where there is none.

    Args:
        run: what starts the program; for tests.
    """
    command = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        result = run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    places = []
    for line in result.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[2].isdigit() and fields[3].isdigit():
            places.append(
                Place(
                    name=f"GPU {fields[0]} ({fields[1]})",
                    total_bytes=int(fields[2]) * 1024**2,
                    free_bytes=int(fields[3]) * 1024**2,
                )
            )
    return places


def parse_size(text: str) -> int:
    """Reads a size like "24GiB", "24G" or "80 GB" (both in powers of 1024, as memory is sold) as bytes.

    Raises:
        Gemma2Error: it is no size.
    """
    units = {"": 1024**3, "g": 1024**3, "gb": 1024**3, "gib": 1024**3, "m": 1024**2, "mb": 1024**2, "mib": 1024**2}
    stripped = text.strip().lower()
    number = stripped.rstrip("bgim ")
    unit = stripped[len(number) :].strip()
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if unit not in units or not 0 < size < 1e9:
        raise Gemma2Error(f"a size of memory is a number with GiB or MiB, like 24GiB, but this is {text!r}")
    return int(size * units[unit])


def _system_memory() -> int:
    """The total where there is no /proc: macOS tells through sysctl, other systems through sysconf."""
    if sys.platform == "darwin":
        try:
            command = ["sysctl", "-n", "hw.memsize"]
            return int(subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            return 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
