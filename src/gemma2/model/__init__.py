"""The model in PyTorch: for training, for accelerators, and as the reference.

Read in this order: `modeling`, `attention`, `kv_cache`; then `loading`, `packed_linear` and `torch_backend`.
"""

from __future__ import annotations

from gemma2.model.kv_cache import KVCache
from gemma2.model.loading import fold_adapter, load_model, state_arrays
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.model.packed_linear import pack_linear_layers
from gemma2.model.torch_backend import TorchBackend

__all__ = [
    "Gemma2ForCausalLM",
    "KVCache",
    "TorchBackend",
    "fold_adapter",
    "load_model",
    "pack_linear_layers",
    "state_arrays",
]
