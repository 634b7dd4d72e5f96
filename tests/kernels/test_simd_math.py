"""exp, tanh and GELU over all of float32 against float64, through the kernels that use them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels
from gemma2._kernels import Activations, Runtime

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

ISAS = _kernels.available_isas()
FAST_ISAS = [isa for isa in ISAS if isa != "scalar"] or ISAS


def every(step: int) -> Floats:
    """Every step-th float32 of all, in the order of the bits: both signs, subnormal numbers, no NaN, no infinity."""
    x = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
    finite: Floats = x[np.isfinite(x)]
    return finite


def ulps(got: Floats, exact: Doubles) -> Doubles:
    """The error in units of the distance of float32 numbers around the exact result."""
    exponent = np.frexp(exact)[1].astype(np.float64) - 24
    distances: Doubles = np.abs(got - exact) / np.exp2(np.maximum(exponent, -149))
    return distances


def tanh(x: Floats, isa: str) -> Floats:
    copy = x[None].copy()
    _kernels.soft_cap(Runtime(1, isa), copy, 1.0)
    capped: Floats = copy[0]
    return capped


def gelu(x: Floats, isa: str) -> Floats:
    out = Activations("float32", 1, len(x))
    _kernels.geglu(Runtime(1, isa), np.concatenate([x, np.ones_like(x)])[None], out)
    gated: Floats = out.dequantized()[0]
    return gated


def exp(x: Floats, isa: str) -> Floats:
    """Of numbers that are not above 0: they are taken from a maximum of 0."""
    out = np.empty((1, len(x) + 1), dtype=np.float32)
    _kernels.softmax_weights(Runtime(1, isa), np.concatenate([x, np.zeros(1, dtype=np.float32)])[None], 1.0, out)
    weights: Floats = out[0, :-1]
    return weights


@pytest.mark.parametrize("isa", FAST_ISAS)
def test_tanh(isa: str) -> None:
    x = every(4001)
    assert ulps(tanh(x, isa), np.tanh(x.astype(np.float64))).max() <= 2.5


@pytest.mark.parametrize("isa", FAST_ISAS)
def test_gelu(isa: str) -> None:
    x = every(4001)
    x = x[x > -9.9]
    wide = x.astype(np.float64)
    exponent = -2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)  # of e; the docstring's t is of 2
    with np.errstate(over="ignore", under="ignore"):
        exact = wide / (1 + np.exp(exponent))
    got = gelu(x, isa)
    assert ulps(got, exact)[x >= 0].max() <= 2.2
    assert np.abs(got - exact)[x < 0].max() <= 5e-8
    normal = (x < 0) & (np.abs(exact) > 2.0**-126)
    relative = np.abs(got - exact)[normal] / np.abs(exact[normal])
    assert (relative <= 2.8 * (1 + exponent[normal] / math.log(2)) * 2.0**-24).all()


@pytest.mark.parametrize("isa", FAST_ISAS)
def test_exp(isa: str) -> None:
    x = every(4001)
    x = np.concatenate([x[(x <= 0) & (x > -100)], -np.linspace(0, 100, 400_001, dtype=np.float32)])
    got, exact = exp(x, isa), np.exp(x.astype(np.float64))
    assert ulps(got, exact)[x >= -87.3365].max() <= 1.1
    assert not got[x < -87.34].any()
    assert exp(np.array([-3.4e38, -np.inf], dtype=np.float32), isa).tolist() == [0, 0]


def test_every_instruction_set_gives_the_same_bits() -> None:
    x = every(130_003)
    for function in (tanh, gelu):
        assert len({function(x, isa).tobytes() for isa in ISAS}) == 1
    x = x[x <= 0]
    assert len({exp(x, isa).tobytes() for isa in ISAS}) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number(isa: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, -20.0, 0.0, -0.0], dtype=np.float32)
    # Any NaN, not only the usual one: its low bits must not become an exponent.
    odd_nan = np.array([0x7FC00001, 0xFFC001FF, 0x7FFFFFFF], dtype=np.uint32).view(np.float32)
    got = gelu(x, isa)
    assert np.isnan(got[0]) and got[1] == np.inf and got[3] == x[3]
    assert np.abs(got[[2, 4, 5]]).max() < 2e-37  # x below -10 counts as -10
    assert got[6:].tolist() == [0, 0]
    for function in (tanh, gelu):
        assert np.isnan(function(odd_nan, isa)).all()
    assert np.isnan(exp(odd_nan, isa)).all()
