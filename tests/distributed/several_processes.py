"""Processes that stay and do what they are told, all of them the same, joined as `torchrun` joins its own."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

IMPORTS = [
    "gemma2.training.distill",
    "gemma2.training.pretrain",
    "gemma2.training.tune",
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
"""What processes share who are forked from one that has imported it; imports take longer than what is tested."""


class Processes:
    """So many processes, joined by gloo; use it in a `with` statement."""

    def __init__(self, number: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(number):
            own, other = context.Pipe()
            process = context.Process(target=_work, args=(rank, number, port, other), daemon=True)
            process.start()
            self._ends.append(own)
            self._processes.append(process)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()

    def all_do(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """Lets every process call `task`, a function of a module, and returns what each gave, by number."""
        for end in self._ends:
            end.send((task, args))
        answers = []
        for rank, end in enumerate(self._ends):
            assert end.poll(100), f"process {rank} does not answer"
            answers.append(end.recv())
        problems = [f"process {rank}: {text}" for rank, (failed, text) in enumerate(answers) if failed]
        assert not problems, "\n".join(problems)
        return [value for _, value in answers]


def _work(rank: int, number: int, port: int, end: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        task, args = end.recv()
        try:
            answer = (False, task(*args))
        except BaseException:
            answer = (True, traceback.format_exc())
        end.send(answer)
