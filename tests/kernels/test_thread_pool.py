"""The pool that kernels share their loops over: many short loops, several callers, idleness, fork, the end.

`tests/kernels/cpp/selftest.cpp` runs the pool alone, for the sanitizers.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels
from gemma2._kernels import Activations, Runtime

Floats = npt.NDArray[np.float32]


def copied(runtime: Runtime, x: Floats, out: Activations) -> Floats:
    """x, copied by a loop of several tasks (40 rows of 5 groups are two tasks or more)."""
    _kernels.write_activations(runtime, x, out)
    return out.dequantized()


@pytest.mark.parametrize("num_threads", range(1, 9))
def test_many_short_loops(num_threads: int) -> None:
    runtime, out = Runtime(num_threads), Activations("float32", 400, 300)
    base = np.arange(400 * 300, dtype=np.float32).reshape(400, 300)
    for i in range(150):
        x = base[: 40 + i % 50] + i  # the number of tasks changes from loop to loop
        np.testing.assert_array_equal(copied(runtime, x, out), x)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_callers_on_several_threads_take_turns(num_threads: int) -> None:
    runtime = Runtime(num_threads)
    wrong: list[str] = []

    def call(seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((60, 300)).astype(np.float32)
        out = Activations("float32", 60, 300)
        for _ in range(100):
            if not np.array_equal(copied(runtime, x, out), x):
                wrong.append(f"caller {seed}")

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    assert not wrong


def test_an_idle_pool_uses_no_processor_time() -> None:
    runtime, out = Runtime(8), Activations("float32", 400, 300)
    copied(runtime, np.zeros((400, 300), dtype=np.float32), out)
    time.sleep(0.1)  # the look-out for the next loop ends after 0.1 ms; slower where cores are shared
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02  # 7 workers that spun would use 0.5 s or more


def test_pools_come_and_go() -> None:
    x, out = np.ones((100, 300), dtype=np.float32), Activations("float32", 100, 300)
    before = threading_count()
    for i in range(30):
        runtime = Runtime(1 + i % 6)
        if i % 3:
            np.testing.assert_array_equal(copied(runtime, x, out), x)
        if i % 2:
            time.sleep(0.002)  # now its workers sleep
        del runtime
    gc.collect()
    assert threading_count() == before


def threading_count() -> int:
    """Threads of this process, those that Python does not know included; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:
        return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("asleep", [False, True])
def test_after_fork_loops_run_on_the_caller_alone(asleep: bool) -> None:
    runtime, out = Runtime(4), Activations("float32", 100, 300)
    x = np.arange(30_000, dtype=np.float32).reshape(100, 300)
    copied(runtime, x, out)
    if asleep:
        time.sleep(0.05)
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process with threads
        child = os.fork()
    if child == 0:
        same = np.array_equal(copied(runtime, x + 1, out), x + 1)
        del runtime  # must not wait for threads that are not there
        fresh = np.array_equal(copied(Runtime(3), x + 2, out), x + 2)
        os.write(write_end, b"y" if same and fresh else b"n")
        os._exit(0)
    ready, _, _ = select.select([read_end], [], [], 30)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready, "the child hangs"
    assert os.read(read_end, 1) == b"y"
    os.close(read_end)
    os.close(write_end)
    np.testing.assert_array_equal(copied(runtime, x, out), x)  # and the parent goes on


CHILD_WITH_POOLS_OF_ITS_OWN = """
    import os, sys
    from gemma2._kernels import Runtime
    old = [Runtime(4) for _ in range(4)]
    child = os.fork()
    if child == 0:
        new = [Runtime(4) for _ in range(4)]  # their threads get the stacks, and so the handles, of those left behind
        del old[:]
        del new[:]
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_pools_left_behind_by_fork_do_not_touch_those_made_after_it() -> None:
    assert run_python(CHILD_WITH_POOLS_OF_ITS_OWN) == "7\n"


MORE_THREADS_THAN_THERE_IS_ROOM_FOR = """
    import resource
    from gemma2.errors import ConfigError
    from gemma2.runtime import make_runtime
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    try:
        make_runtime(1024)
    except ConfigError as error:
        print(error)
    print(make_runtime(2).num_threads)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs a limit on address space, as Linux has it")
def test_threads_that_the_system_does_not_give() -> None:
    refusal, threads = run_python(MORE_THREADS_THAN_THERE_IS_ROOM_FOR).splitlines()
    assert "the system does not give 1024 threads" in refusal and "GEMMA2_NUM_THREADS" in refusal
    assert threads == "2"


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("num_threads", [0, -1, 1025])
def test_numbers_of_threads_that_make_no_sense_are_refused(num_threads: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads must be from 1 to 1024, but is {num_threads}"):
        Runtime(num_threads)
