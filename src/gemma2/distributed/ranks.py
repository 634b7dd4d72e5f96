"""The processes of a run: how many there are, how they are arranged, and what they tell each other.

They stand in a grid of `data` rows and `tensor` columns. Processes of one column see different rows of a batch and
share the weights among them (FSDP); processes of one row see the same tokens, and each multiplies with its part of
every matrix (tensor parallelism). Neighbours in number stand in one row, so that a row lies within one machine.

`torchrun` starts the processes and says by environment variables who is who: RANK, LOCAL_RANK, WORLD_SIZE and
LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from gemma2.errors import ConfigError
from gemma2.model.device import choose_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA: Final = "data"
TENSOR: Final = "tensor"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all, and what they agree on. With one process everything here answers at once."""

    rank: int = 0
    """This process, from 0."""
    data: int = 1
    """How many parts a batch is cut into."""
    tensor: int = 1
    """How many processes share each matrix product."""
    device: torch.device | None = None
    """Of this process; None to choose as for one process."""
    mesh: DeviceMesh | None = None
    """The grid, with the axes "data" and "tensor"; None for one process."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.data * self.tensor

    @property
    def is_first(self) -> bool:
        """Whether this process writes logs, plots and models."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of a batch this process sees."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Which part of each matrix this process multiplies with."""
        return self.rank % self.tensor

    def total(self, *values: float) -> tuple[float, ...]:
        """Sums values over the parts of the batch, in float64; processes that see the same part have the same values.

        All processes must ask, and in the same order.
        """
        if self.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return tuple((sums / self.tensor).tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process. All processes must ask."""
        return flag if self.world_size == 1 else self.total(float(flag))[0] > 0

    def first_does(self, work: Callable[[], T]) -> T:
        """Lets the first process do something and gives its result, or its error, to all.

        Args:
            work: gives something that can be pickled.

        Raises:
            Exception: what `work` raised, in all processes.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                outcome = [work(), None]
            except Exception as raised:
                error, outcome = raised, [None, raised]
        torch.distributed.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by number. All processes must ask."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Waits until all processes have come here."""
        self.any(False)

    def describe(self, device: torch.device) -> str:
        """Says on what the run is, for people."""
        if self.world_size == 1:
            return str(device)
        how = f"{self.data} × {self.tensor} (data × tensor)" if self.tensor > 1 else "batches cut among them"
        return f"{self.world_size} processes on {device.type}, {how}"

    def check_batch(self, batch_size: int, micro_batch_size: int | None) -> None:
        """Checks that a batch can be shared out.

        Raises:
            ConfigError: it cannot, in rows of one number for each process.
        """
        if batch_size % self.data:
            raise ConfigError(
                f"run.batch_size is {batch_size}, the rows of all processes, and must be a multiple of the {self.data} "
                "parts that a batch is cut into (parallel.data)"
            )
        rows = batch_size // self.data
        if micro_batch_size is not None and rows % micro_batch_size:
            raise ConfigError(
                f"run.micro_batch_size is {micro_batch_size}, but of run.batch_size {batch_size} each of {self.data} "
                f"parts has {rows} rows, which must be a multiple of it"
            )

    def rows_at_once(self, batch_size: int, micro_batch_size: int | None) -> int:
        """How many rows of a batch go through the model together in each process."""
        return micro_batch_size or batch_size // self.data


ONE_PROCESS: Final = Ranks()


@contextmanager
def joined_ranks(*, data: int | None, tensor: int, device: str) -> Iterator[Ranks]:
    """Finds the other processes and arranges all of them.

    If this process has joined others already, as in a program that calls `torch.distributed.init_process_group` by
    itself, that is used and left as it is.

    Args:
        data: how many parts a batch is cut into; None for as many as there are processes for.
        tensor: how many processes share each matrix product.
        device: as for `choose_device`; "auto" and "cuda" give each process of a machine a GPU of its own.

    Yields:
        The ranks; `ONE_PROCESS` if this process is alone.

    Raises:
        ConfigError: the processes cannot be arranged so, or there are more of them here than GPUs.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    data = _check_arrangement(data, tensor, world_size)
    if world_size == 1:
        yield ONE_PROCESS
        return
    if not torch.distributed.is_available():
        raise ConfigError("this PyTorch was built without torch.distributed, which several processes need")
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"several processes need a newer PyTorch than {torch.__version__}; 2.13 is tested")
    own_device = _own_device(device)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    if not joined:
        # Objects and flags travel between processors in any case.
        torch.distributed.init_process_group("gloo" if own_device.type == "cpu" else "cpu:gloo,cuda:nccl")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(own_device.type, (data, tensor), mesh_dim_names=(DATA, TENSOR))
    yield Ranks(
        rank=torch.distributed.get_rank(),
        data=data,
        tensor=tensor,
        device=own_device,
        mesh=mesh,
    )
    if not joined:  # after an error the others may be gone, and leaving would wait for them
        torch.distributed.destroy_process_group()


def _check_arrangement(data: int | None, tensor: int, world_size: int) -> int:
    started = "1 process was started" if world_size == 1 else f"{world_size} processes were started"
    if data is None:
        if world_size % tensor:
            raise ConfigError(
                f"parallel.tensor is {tensor}, but {started}, which must be a multiple of it; "
                f"start with torchrun --nproc-per-node {tensor}, or set parallel.tensor to 1"
            )
        return world_size // tensor
    if data * tensor != world_size:
        raise ConfigError(
            f"parallel.data and parallel.tensor are {data} and {tensor}, which need {data * tensor} processes, but "
            f"{started}; start with torchrun --nproc-per-node {data * tensor}, or set parallel.data to auto"
        )
    return data


def _own_device(name: str) -> torch.device:
    device = choose_device(name, setting="run.device")
    if device.type != "cuda":
        return device
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device.index is not None and here > 1:
        raise ConfigError(
            f"run.device is {name!r}, but {here} processes were started here, and each needs a GPU of its own; set "
            "run.device to cuda"
        )
    if here > found:
        raise ConfigError(
            f"{here} processes were started here, but there are {found} GPUs; start no more than one for each"
        )
    return torch.device("cuda", local_rank if device.index is None else device.index)
