from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import safetensors_bytes, with_header

from gemma2.checkpoints.safetensors_format import build_header, read_header
from gemma2.errors import CheckpointError

SOURCE = Path("some/model.safetensors")
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4).astype(ml_dtypes.bfloat16)


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_sound_header() -> None:
    data = safetensors_bytes({"a": A, "b": B})
    entries = read_header(data, SOURCE)
    assert list(entries) == ["a", "b"]
    assert (entries["a"].dtype, entries["a"].shape) == ("F32", (2, 3))
    assert data[entries["a"].start : entries["a"].end] == A.tobytes()
    assert data[entries["b"].start : entries["b"].end] == B.tobytes()
    assert entries["b"].end == len(data)


WHOLE = safetensors_bytes({"a": A, "b": B})
TWO = b"\0" * 48

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "shorter than a length": (b"\1\0\0", "truncated"),
    "cut in the header": (WHOLE[:30], "truncated: its header needs"),
    "cut in a tensor": (WHOLE[:-1], "truncated: b ends at byte"),
    "absurd header length": ((1 << 60).to_bytes(8, "little") + b"{}", "claims a header of 1152921504606846976 bytes"),
    "zero header length": (b"\0" * 64, "claims a header of 0 bytes"),
    "text instead of a file": (b"This is not a model, it is a note.", "claims a header"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "git lfs pull"),
    "gguf": (b"GGUF\3\0\0\0" + b"\0" * 64, "GGUF"),
    "torch zip": (b"PK\x03\x04" + b"\0" * 64, "PyTorch"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "header is no json": (with_header(b"{nonsense}", b""), "damaged"),
    "header is a list": (with_header([1], b""), "does not begin with '{'"),
    "header is not utf-8": (with_header(b'{"\xff\xfe": 1}', b""), "damaged"),
    "header nested deeply": (with_header(b'{"a":' + b"[" * 100_000, b""), "damaged"),
    "number too long": (with_header(b'{"a":' + b"1" * 10_000 + b"}", b""), "damaged"),
    "a name twice": (with_header(b'{"a": 1, "a": 2}', b""), "'a' comes twice"),
    "metadata not text": (with_header({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "entry is no object": (with_header({"a": 3}, b""), "entry of a must have"),
    "entry without offsets": (with_header({"a": {"dtype": "F32", "shape": [1]}}, b""), "entry of a must have"),
    "integers": (with_header({"a": entry("I8")}, TWO), "a is stored as I8, but only F32, BF16, F16"),
    "8-bit floats": (with_header({"a": entry("F8_E4M3")}, TWO), "a is stored as F8_E4M3"),
    "double": (with_header({"a": entry("F64")}, TWO), "a is stored as F64"),
    "dtype is a list": (with_header({"a": entry([])}, TWO), "a is stored as"),
    "negative shape": (with_header({"a": entry(shape=[-2, -3])}, TWO[:24]), "the shape of a"),
    "shape with a fraction": (with_header({"a": entry(shape=[2, 3.0])}, TWO[:24]), "the shape of a"),
    "shape with true": (with_header({"a": entry(shape=[True, 6])}, TWO[:24]), "the shape of a"),
    "shape is a number": (with_header({"a": entry(shape=6)}, TWO[:24]), "the shape of a"),
    "shape beyond bounds": (with_header({"a": entry(shape=[1 << 62, 1 << 62])}, TWO[:24]), "takes"),
    "one offset": (with_header({"a": entry(offsets=[0])}, TWO[:24]), "data_offsets of a"),
    "offsets backwards": (with_header({"a": entry(offsets=[24, 0])}, TWO[:24]), "data_offsets of a"),
    "offsets negative": (with_header({"a": entry(offsets=[-24, 0])}, TWO[:24]), "data_offsets of a"),
    "size unlike shape": (with_header({"a": entry(offsets=[0, 20])}, TWO[:20]), "takes 24 bytes"),
    "offsets out of range": (
        with_header({"a": entry(), "b": entry(offsets=[24, 48])}, TWO[:40]),
        "truncated: b ends at byte",
    ),
    "overlap": (with_header({"a": entry(), "b": entry(offsets=[20, 44])}, TWO[:44]), "bytes of b overlap those of a"),
    "the same bytes twice": (with_header({"a": entry(), "b": entry()}, TWO[:24]), "overlap"),
    "gap": (with_header({"a": entry(), "b": entry(offsets=[25, 49])}, TWO + b"\0"), "1 bytes between a and b"),
    "bytes left over": (WHOLE + b"\0", "1 bytes after b"),
    "only bytes": (with_header({}, TWO), "48 bytes after the header"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, message = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        read_header(data, SOURCE)
    assert str(caught.value).startswith("some/model.safetensors: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def _json_change(change: Callable[[dict[str, Any]], None]) -> bytes:
    size = int.from_bytes(WHOLE[:8], "little")
    header = json.loads(WHOLE[8 : 8 + size])
    change(header)
    return with_header(header, WHOLE[8 + size :])


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A sound file of which some bytes, the length or one number of the header were changed."""
    kind = draw(st.sampled_from(["bytes", "cut", "grow", "number"]))
    data = bytearray(WHOLE)
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    if kind == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if kind == "grow":
        return bytes(data) + draw(st.binary(min_size=1, max_size=9))
    name, key = draw(st.sampled_from(["a", "b"])), draw(st.sampled_from(["shape", "data_offsets"]))
    index, value = draw(st.integers(0, 1)), draw(st.integers(-2, 40))

    def change(header: dict[str, Any]) -> None:
        values = header[name][key]
        values[index % len(values)] = value

    return _json_change(change)


def library_reads(data: bytes) -> dict[str, Any]:
    """What the safetensors library makes of a file: name → dtype, shape and data."""
    deserialize: Any = safetensors.deserialize
    return dict(deserialize(data))


@settings(max_examples=400, deadline=None)
@given(data=damaged_files())
def test_what_the_safetensors_library_refuses_is_refused(data: bytes) -> None:
    try:
        theirs = library_reads(data)
    except Exception:
        theirs = None
    try:
        ours = read_header(data, SOURCE)
    except CheckpointError:
        ours = None
    if theirs is None:
        assert ours is None
    elif ours is not None:
        assert {name: (e.dtype, list(e.shape), data[e.start : e.end]) for name, e in ours.items()} == {
            name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in theirs.items()
        }


@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    codes=st.lists(st.sampled_from(["F32", "BF16", "F16"]), min_size=6, max_size=6),
)
@settings(deadline=None)
def test_a_built_header_is_read_by_us_and_by_the_library(shapes: list[tuple[int, ...]], codes: list[str]) -> None:
    tensors = [(f"t{index}", code, shape) for index, (code, shape) in enumerate(zip(codes, shapes, strict=False))]
    header, entries = build_header(tensors)
    assert len(header) % 8 == 0
    assert entries[0].start == len(header)
    data = header + b"\1" * (entries[-1].end - len(header))
    assert list(read_header(data, SOURCE).values()) == entries
    theirs = library_reads(data)
    assert {(name, t["dtype"], tuple(t["shape"])) for name, t in theirs.items()} == set(tensors)
