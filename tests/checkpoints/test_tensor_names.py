from __future__ import annotations

import math

import pytest
from small_checkpoints import SMALL

from gemma2.checkpoints import expected_tensors
from gemma2.config import PRESETS


def test_names_and_shapes_of_the_2b() -> None:
    shapes = expected_tensors(PRESETS["2b"])
    assert len(shapes) == 288  # as model.safetensors.index.json of google/gemma-2-2b-it lists
    assert next(iter(shapes)) == "model.embed_tokens.weight"
    assert list(shapes)[-1] == "model.norm.weight"
    assert {name.removeprefix("model.layers.25."): shape for name, shape in shapes.items() if ".25." in name} == {
        "input_layernorm.weight": (2304,),
        "self_attn.q_proj.weight": (2048, 2304),
        "self_attn.k_proj.weight": (1024, 2304),
        "self_attn.v_proj.weight": (1024, 2304),
        "self_attn.o_proj.weight": (2304, 2048),
        "post_attention_layernorm.weight": (2304,),
        "pre_feedforward_layernorm.weight": (2304,),
        "mlp.gate_proj.weight": (9216, 2304),
        "mlp.up_proj.weight": (9216, 2304),
        "mlp.down_proj.weight": (2304, 9216),
        "post_feedforward_layernorm.weight": (2304,),
    }


@pytest.mark.parametrize("size", PRESETS)
def test_the_table_holds_every_parameter_once(size: str) -> None:
    config = PRESETS[size]
    assert sum(map(math.prod, expected_tensors(config).values())) == config.count_parameters().total


def test_transformers_has_the_same_tensors() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL.to_dict()))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    assert expected_tensors(SMALL) == theirs
