"""What memory there is, read from files and programs that are made up here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemma2.cli.machine import Place, main_memory, nvidia_devices, parse_size
from gemma2.errors import Gemma2Error

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total: 0\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_memory_counts_and_not_unused_memory(tmp_path: Path) -> None:
    place = main_memory(write(tmp_path, {"proc/meminfo": MEMINFO}))
    assert place == Place(name="this machine", total_bytes=16 * GIB, free_bytes=8 * GIB)


@pytest.mark.parametrize(
    "names",
    [
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
            "sys/fs/cgroup/memory/memory.stat",
        ),
    ],
)
def test_a_container_has_what_it_is_allowed(tmp_path: Path, names: tuple[str, str, str]) -> None:
    contents = [str(4 * GIB), str(3 * GIB), f"anon 1\ninactive_file {2 * GIB}\n"]
    root = write(tmp_path, {"proc/meminfo": MEMINFO, **dict(zip(names, contents, strict=True))})
    # 3 GiB are used, but 2 of them are files read once, which give way.
    assert main_memory(root) == Place(name="this container", total_bytes=4 * GIB, free_bytes=3 * GIB)


def test_a_container_without_a_limit_is_the_machine(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}
    place = main_memory(write(tmp_path, files))
    assert place is not None and place.total_bytes == 16 * GIB


def test_gpus_are_those_that_nvidia_smi_lists() -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        lines = "0, NVIDIA H100 80GB HBM3, 81559, 81000\n1, NVIDIA T4, 15360, 100\n2, Odd, [N/A], [N/A]\n"
        return subprocess.CompletedProcess(command, 0, stdout=lines)

    first, second = nvidia_devices(run)
    assert first == Place(name="GPU 0 (NVIDIA H100 80GB HBM3)", total_bytes=81559 * 2**20, free_bytes=81000 * 2**20)
    assert second.name == "GPU 1 (NVIDIA T4)"


def test_no_nvidia_smi_means_no_gpu() -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError("nvidia-smi")

    assert nvidia_devices(run) == []


def test_verdicts() -> None:
    place = Place(name="this machine", total_bytes=10, free_bytes=6)
    assert [place.judge(size) for size in (6, 7, 10, 11)] == ["fits", "needs room", "needs room", "too large"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("80 GB", 80 * GIB), ("1.5g", GIB * 3 // 2), ("512M", GIB // 2)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-4GiB", "0", "4 KiB", "nan", "inf", "1e30"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Gemma2Error, match="a size of memory is a number with GiB or MiB, like 24GiB"):
        parse_size(text)
