"""Teachers that answer while a student learns: in PyTorch, whole or shared by processes, or on the CPU engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from gemma2.checkpoints import Checkpoint, packed_model
from gemma2.distributed import Ranks
from gemma2.distributed.fsdp import GatheredModel
from gemma2.model.loading import DTYPES, load_model
from gemma2.training.distill_settings import TeacherSettings
from gemma2.training.distillation import TeacherLogits, torch_teacher
from gemma2.training.engine_teacher import engine_teacher
from gemma2.training.objectives import Batch
from gemma2.training.quantized_base import quantized_linear
from gemma2.training.settings import LoopSettings
from gemma2.training.shared_model import load_shared


def is_teacher_shared(teacher: TeacherSettings, ranks: Ranks) -> bool:
    """Whether processes share the teacher's weights too. Quantized ones and the CPU engine's are whole in each."""
    is_torch = teacher.cache is None and teacher.backend == "torch"
    return ranks.world_size > 1 and is_torch and teacher.weights != "nf4"


def teacher_weights(teacher: TeacherSettings, run: LoopSettings) -> str:
    """The form of a teacher's weights, where settings leave it open."""
    if teacher.weights != "auto":
        return teacher.weights
    return run.dtype if teacher.backend == "torch" else "q8"


def live_teacher(
    teacher: TeacherSettings,
    checkpoint: Checkpoint,
    run: LoopSettings,
    ranks: Ranks,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Callable[[Batch], TeacherLogits], GatheredModel | None]:
    """Opens a teacher.

    Args:
        teacher: what runs it, in which weights.
        checkpoint: its opened folder.
        run: the dtype of products and the number of threads.
        ranks: the processes.
        device: where to, in PyTorch, if it is not shared.
        say: is given a line where opening takes its time.

    Returns:
        The teacher, and what its logits must be asked for within, if processes share its weights.

    Raises:
        CheckpointError: a file cannot be read.
    """
    weights = teacher_weights(teacher, run)
    if teacher.backend == "cpu":
        from gemma2.cpu import CpuBackend, resolve_num_threads

        # Several processes share the cores: each has as many threads as PyTorch was given in it.
        asked = run.num_threads if ranks.world_size == 1 else torch.get_num_threads()
        packed = packed_model(checkpoint, weights, num_threads=resolve_num_threads(asked), notify=say)
        return engine_teacher(CpuBackend(packed, num_threads=asked)), None
    dtype = run.dtype if weights == "nf4" else weights
    compute_dtype = DTYPES[dtype]
    if is_teacher_shared(teacher, ranks):
        gathered = load_shared(checkpoint, ranks, dtype=compute_dtype)
        gathered.requires_grad_(False).eval()
        return torch_teacher(gathered.model, compute_dtype=compute_dtype), gathered
    replace = partial(quantized_linear, "nf4", dtype) if weights == "nf4" else None
    model = load_model(checkpoint, dtype=dtype, device=device, replace_linear=replace)
    model.requires_grad_(False).eval()
    return torch_teacher(model, compute_dtype=compute_dtype), None
