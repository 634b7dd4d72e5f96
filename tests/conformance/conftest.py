"""Runs every test that asks for `spec` once for each backend."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, BackendSpec


@pytest.fixture(
    params=[
        pytest.param(spec, id=spec.name, marks=[pytest.mark.gpu] if spec.device == "cuda" else []) for spec in BACKENDS
    ]
)
def spec(request: pytest.FixtureRequest) -> BackendSpec:
    """One of the backends."""
    spec: BackendSpec = request.param
    if spec.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return spec
