"""Gemma 2: run it, adapt it, train it, understand it.

`gemma2.load(...)` gives an `LLM`, a model that generates; `Gemma2Config` is the architecture as data; every mistake
that a caller can mend is a `Gemma2Error`. Importing this package loads nothing heavy: `load` and what stands behind it
come in when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2.config import Gemma2Config
from gemma2.errors import Gemma2Error

if TYPE_CHECKING:
    from gemma2.api import LLM, load

__version__ = "0.1.0"
__all__ = ["LLM", "Gemma2Config", "Gemma2Error", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name in ("LLM", "load"):
        from gemma2 import api

        return getattr(api, name)
    raise AttributeError(f"module 'gemma2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
