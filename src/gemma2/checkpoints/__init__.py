"""Models on disk: reading, writing and fetching them, and the one table of tensor names.

A reader yields (Hugging Face name, lazy array); a writer takes (name, array); a converter is the two put together.
"""

from __future__ import annotations

from gemma2.checkpoints.adapters import Adapter, LowRankUpdate, is_adapter, open_adapter
from gemma2.checkpoints.checkpoint import Checkpoint, LazyTensor
from gemma2.checkpoints.hub import pull
from gemma2.checkpoints.layout import TOKENIZER_FILES
from gemma2.checkpoints.names import expected_tensors
from gemma2.checkpoints.packed_cache import packed_model
from gemma2.checkpoints.packed_folder import is_packed, open_packed, save_packed, unused_packed_files
from gemma2.checkpoints.packed_format import PackedFile
from gemma2.checkpoints.resolve import resolve_model
from gemma2.checkpoints.safetensors_reader import open_checkpoint
from gemma2.checkpoints.safetensors_writer import save_checkpoint
from gemma2.checkpoints.stop_ids import generation_stop_ids

__all__ = [
    "TOKENIZER_FILES",
    "Adapter",
    "Checkpoint",
    "LazyTensor",
    "LowRankUpdate",
    "PackedFile",
    "expected_tensors",
    "generation_stop_ids",
    "is_adapter",
    "is_packed",
    "open_adapter",
    "open_checkpoint",
    "open_packed",
    "packed_model",
    "pull",
    "resolve_model",
    "save_checkpoint",
    "save_packed",
    "unused_packed_files",
]
