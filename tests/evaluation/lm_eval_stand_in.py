"""What `gemma2.evaluation.lm_eval` needs of lm-eval, for machines without it: its base class and its registry."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None


class _CacheHook:
    def add_partial(self, attr: str, request: Any, result: Any) -> None: ...


class _LM:
    def __init__(self) -> None:
        self.cache_hook = _CacheHook()


def put_in_place() -> None:
    """Makes `import lm_eval.api.model` work, if lm-eval is not installed."""
    if IS_INSTALLED:
        return
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        sys.modules[name] = ModuleType(name)
    sys.modules["lm_eval.api.model"].LM = _LM  # type: ignore[attr-defined]
    sys.modules["lm_eval.api.registry"].register_model = lambda *names: lambda cls: cls  # type: ignore[attr-defined]
