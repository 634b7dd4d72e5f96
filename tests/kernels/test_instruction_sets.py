"""Every kernel gives the same bits on every instruction set and processor, and the sanitizers find nothing.

`cpp/selftest.cpp` prints a hash of each result. It is built here, into `build/`, where the next run finds it: for this
processor, and for Arm's as well where a cross compiler and an emulator are installed (on Debian
`apt install g++-aarch64-linux-gnu qemu-user`). The first build takes minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
# Virtual environments carry cmake and ninja without being in PATH.
PATHS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake", path=PATHS) and shutil.which("ninja", path=PATHS)), reason="needs cmake and ninja"
)


def run(command: list[str], timeout_seconds: float = 1800) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": PATHS}, timeout=timeout_seconds, text=True, capture_output=True
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def build(name: str, *options: str) -> str:
    """Returns the path of the selftest, built with these options of CMake."""
    folder = ROOT / "build" / name
    flags = ["-DGEMMA2_BUILD_MODULE=OFF", "-DGEMMA2_BUILD_SELFTEST=ON", *options]
    run(["cmake", "-S", ".", "-B", str(folder), "-G", "Ninja", *flags])
    run(["cmake", "--build", str(folder)])
    return str(folder / "kernels" / "kernels_selftest")


def hashes(program: list[str], isa: str, num_threads: int = 2) -> dict[str, str]:
    lines = run([*program, isa, str(num_threads)]).splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


def test_every_instruction_set_and_processor_gives_the_same_bits() -> None:
    program = [build("selftest")]
    isas = run([*program, "--isas"]).split()
    assert "scalar" in isas
    expected = hashes(program, isas[0], num_threads=1)
    assert len(expected) > 100
    for isa in isas:
        for num_threads in (1, 3):
            assert hashes(program, isa, num_threads) == expected, f"{isa}, {num_threads} threads"

    if not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR[0])):
        pytest.skip("equal on this processor; Arm's needs g++-aarch64-linux-gnu and qemu-user")
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}"]
    program = [*EMULATOR, build("selftest-aarch64", *system)]
    isas = run([*program, "--isas"]).split()
    assert isas == ["neon", "scalar"]
    for isa in isas:
        assert hashes(program, isa) == expected, f"{isa} on aarch64"


@pytest.mark.skipif("GEMMA2_TEST_SANITIZERS" not in os.environ, reason="GEMMA2_TEST_SANITIZERS=1 asks for it: minutes")
def test_the_sanitizers_find_nothing() -> None:
    program = [build("selftest-sanitize", "-DGEMMA2_SANITIZE=ON")]
    for isa in run([*program, "--isas"]).split():
        assert hashes(program, isa, num_threads=3)
