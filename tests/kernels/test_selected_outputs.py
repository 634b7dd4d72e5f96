"""Products with chosen rows of a matrix: the bits of the whole product."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from gemma2 import _kernels as kernels

ISAS = pytest.mark.parametrize("isa", kernels.available_isas())


def packed(outputs: int, inputs: int, weights: str) -> kernels.Matrix:
    size = kernels.matrix_bytes(weights, outputs, inputs)
    whole = np.zeros(size + 64, dtype=np.uint8)
    data = whole[-whole.ctypes.data % 64 :][:size]
    values = np.random.default_rng(outputs).normal(0, 1, (outputs, inputs)).astype(np.float32)
    kernels.pack_matrix(kernels.Runtime(1), values, weights, data)
    return kernels.Matrix(weights, outputs, inputs, data)


def activations(runtime: kernels.Runtime, rows: int, inputs: int) -> kernels.Activations:
    x = np.random.default_rng(rows).normal(0, 1, (rows, inputs)).astype(np.float32)
    made = kernels.Activations("int8", rows, inputs)
    kernels.write_activations(runtime, x, made)
    return made


@ISAS
@pytest.mark.parametrize("weights", ["q4", "q8"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 64), (33, 65), (100, 200)])
@pytest.mark.parametrize("rows", [1, 3])
def test_all_outputs_are_the_whole_product(isa: str, weights: str, outputs: int, inputs: int, rows: int) -> None:
    runtime = kernels.Runtime(2, isa)
    w, x = packed(outputs, inputs, weights), activations(runtime, rows, inputs)
    whole = np.empty((rows, outputs), dtype=np.float32)
    kernels.matmul(runtime, x, w, whole)
    ids = np.stack([np.random.default_rng(row).permutation(outputs) for row in range(rows)]).astype(np.int32)
    values = np.zeros_like(whole)
    kernels.add_selected_outputs(runtime, x, w, ids, values)
    assert np.array_equal(values, np.take_along_axis(whole, ids, axis=1))


def test_it_adds_and_takes_none() -> None:
    runtime = kernels.Runtime(1)
    w, x = packed(40, 64, "q4"), activations(runtime, 2, 64)
    ids = np.array([[3, 3, 39], [0, 1, 2]], dtype=np.int32)
    once, twice = np.zeros((2, 3), dtype=np.float32), np.full((2, 3), 5, dtype=np.float32)
    kernels.add_selected_outputs(runtime, x, w, ids, once)
    kernels.add_selected_outputs(runtime, x, w, ids, twice)
    assert np.array_equal(twice, once + np.float32(5))
    kernels.add_selected_outputs(runtime, x, w, np.empty((2, 0), np.int32), np.empty((2, 0), np.float32))


@pytest.mark.parametrize("wrong", [-1, 40])
def test_an_id_outside_is_refused(wrong: int) -> None:
    runtime = kernels.Runtime(1)
    w, x = packed(40, 64, "q4"), activations(runtime, 1, 64)
    ids: npt.NDArray[np.int32] = np.array([[0, wrong]], dtype=np.int32)
    with pytest.raises(ValueError, match=f"ids must be from 0 to 39, but one is {wrong}"):
        kernels.add_selected_outputs(runtime, x, w, ids, np.zeros((1, 2), dtype=np.float32))
