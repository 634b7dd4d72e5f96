"""The CPU engine: Gemma 2 over compiled kernels, without torch."""

from gemma2.cpu.backend import KV_CACHE_DTYPES, CpuBackend, check_kv_cache
from gemma2.cpu.threads import default_num_threads, resolve_num_threads

__all__ = ["KV_CACHE_DTYPES", "CpuBackend", "check_kv_cache", "default_num_threads", "resolve_num_threads"]
