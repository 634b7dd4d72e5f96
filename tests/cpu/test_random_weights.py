"""Random weights in packed form: of the right size and layout, none alike, and of the magnitude that was promised."""

import itertools

import numpy as np
import pytest

from gemma2 import _kernels as kernels
from gemma2.config import PRESETS
from gemma2.cpu.random_weights import random_packed_model
from gemma2.quantization import PACKED_FORMATS, SECOND_PLANE, packed_shapes

SMALL = PRESETS["2b"].replace(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    query_pre_attn_scalar=64,
    vocab_size=80_000,
)


@pytest.fixture(scope="module")
def runtime():
    return kernels.Runtime(2)


def unpack(runtime, model, name):
    outputs, inputs = packed_shapes(model.config)[name]
    return kernels.unpack_matrix(runtime, kernels.Matrix(model.format, outputs, inputs, model.tensors[name]))


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_every_tensor_is_there_in_its_size(format):
    model = random_packed_model(SMALL, format)
    shapes = packed_shapes(SMALL)
    assert list(model.tensors) == list(shapes)
    for name, shape in shapes.items():
        tensor = model.tensors[name]
        assert tensor.ctypes.data % 64 == 0, name
        if len(shape) == 1:
            assert tensor.dtype == np.float32 and tensor.shape == shape and not tensor.any()
        else:
            assert tensor.dtype == np.uint8 and tensor.shape == (kernels.matrix_bytes(format, *shape),)


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_magnitudes(format, runtime):
    model = random_packed_model(SMALL, format)
    for name, shape in packed_shapes(SMALL).items():
        if len(shape) == 2:
            weights = unpack(runtime, model, name)
            deviation = 0.02 if "embed" in name else shape[1] ** -0.5
            assert weights.std() == pytest.approx(deviation, rel=0.1), name
            # No value is so large that it would rule a sum; NaN and infinity fail too.
            assert np.abs(weights).max() < 4 * deviation, name
            assert abs(weights.mean()) < 0.01 * deviation, name


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_no_two_rows_are_alike(format, runtime):
    """Nor where the pool of random values begins again: words with equal rows would have equal logits."""
    weights = unpack(runtime, random_packed_model(SMALL, format), "model.embed_tokens.weight")
    signs = np.packbits(weights > 0, axis=1)
    assert len({row.tobytes() for row in signs}) == len(weights)


def test_q8_has_no_value_beyond_127():
    model = random_packed_model(SMALL, "q8")
    blocks = model.tensors["model.embed_tokens.weight"].reshape(-1, 2112)
    values = blocks[:, :2048].view(np.int8)
    assert values.min() == -127 and values.max() == 127


def test_matrices_have_memory_of_their_own():
    model = random_packed_model(SMALL, "q4")
    spans = sorted((tensor.ctypes.data, tensor.nbytes) for tensor in model.tensors.values())
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following
    gates = [model.tensors[f"model.layers.{index}.mlp.gate_up_proj.weight"] for index in range(2)]
    assert not np.array_equal(*gates)


def test_a_seed_gives_the_same_weights():
    first, same, other = (random_packed_model(SMALL, "q4", seed) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(first.tensors[name], same.tensors[name])
    assert not np.array_equal(first.tensors[name], other.tensors[name])


def test_a_second_plane_is_as_large_as_what_rounding_lost(runtime):
    model = random_packed_model(SMALL, "q4", second_plane=True)
    shape = packed_shapes(SMALL)["model.embed_tokens.weight"]
    plane = kernels.unpack_matrix(runtime, kernels.Matrix("q4", *shape, model.tensors[SECOND_PLANE]))
    assert plane.std() == pytest.approx(0.07 * 0.02, rel=0.1)
    with pytest.raises(ValueError, match="only q4 has a second plane"):
        random_packed_model(SMALL, "q8", second_plane=True)


def test_progress_ends_at_the_whole():
    calls = []
    model = random_packed_model(SMALL, "q8", progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == len(model.tensors)
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    assert calls[-1][1] == sum(-(-tensor.nbytes // 64) * 64 for tensor in model.tensors.values())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="float32, bfloat16, q8, q4, but this is 'q5'"):
        random_packed_model(SMALL, "q5")
    with pytest.raises(ValueError, match=r"embed_tokens.* 79999 and 256"):
        random_packed_model(SMALL.replace(vocab_size=79_999), "q4")
