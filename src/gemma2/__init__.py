"""Gemma 2: run it, adapt it, train it, understand it.

`gemma2.load(...)` gives a model that generates; `Gemma2Config` is the architecture as data. Importing this package
loads nothing heavy: `load` and what stands behind it come in when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2.config import Gemma2Config

if TYPE_CHECKING:
    from gemma2.api import load

__version__ = "0.1.0"
__all__ = ["Gemma2Config", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name == "load":
        from gemma2.api import load

        return load
    raise AttributeError(f"module 'gemma2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
