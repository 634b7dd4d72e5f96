"""The CPU engine: Gemma 2 over compiled kernels, without torch."""

from gemma2.cpu.backend import KV_CACHE_DTYPES, CpuBackend

__all__ = ["KV_CACHE_DTYPES", "CpuBackend"]
