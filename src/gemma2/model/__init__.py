"""The model in PyTorch: for training, for accelerators, and as the reference.

Read in this order: `modeling`, `attention`, `kv_cache`, then `torch_backend` and `loading`.
"""

from __future__ import annotations

from gemma2.model.kv_cache import KVCache
from gemma2.model.loading import load_model, state_arrays
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.model.torch_backend import TorchBackend

__all__ = ["Gemma2ForCausalLM", "KVCache", "TorchBackend", "load_model", "state_arrays"]
