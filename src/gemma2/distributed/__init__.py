"""Many processes: who they are, and what is done to the model from outside so that each holds a part of it.

Read in this order: `ranks`, `fsdp`, `tensor_parallel`, `placement`, `gradients`, `tensor_files`. The model file knows
nothing of any of it, and one process uses none of it but `ONE_PROCESS`.
"""

from __future__ import annotations

from gemma2.distributed.ranks import ONE_PROCESS, Ranks, joined_ranks

__all__ = ["ONE_PROCESS", "Ranks", "joined_ranks"]
