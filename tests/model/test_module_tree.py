"""The module tree is the one that Google's post prints; parameters, their names and their first values."""

from __future__ import annotations

import copy

import pytest
import torch

from gemma2.checkpoints import expected_tensors
from gemma2.config import PRESETS, Gemma2Config
from gemma2.model import Gemma2ForCausalLM
from gemma2.model.modeling import Gemma2RMSNorm

SMALL = Gemma2Config(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    vocab_size=64,
    sliding_window=8,
    max_position_embeddings=64,
)

# "What's new in Gemma 2", Google, August 2024, section "Gemma 27B". There it says Gemma2SdpaAttention, after a kernel
# without the cap that transformers has since dropped.
TREE_OF_27B = """\
Gemma2ForCausalLM(
  (model): Gemma2Model(
    (embed_tokens): Embedding(256000, 4608, padding_idx=0)
    (layers): ModuleList(
      (0-45): 46 x Gemma2DecoderLayer(
        (self_attn): Gemma2Attention(
          (q_proj): Linear(in_features=4608, out_features=4096, bias=False)
          (k_proj): Linear(in_features=4608, out_features=2048, bias=False)
          (v_proj): Linear(in_features=4608, out_features=2048, bias=False)
          (o_proj): Linear(in_features=4096, out_features=4608, bias=False)
          (rotary_emb): Gemma2RotaryEmbedding()
        )
        (mlp): Gemma2MLP(
          (gate_proj): Linear(in_features=4608, out_features=36864, bias=False)
          (up_proj): Linear(in_features=4608, out_features=36864, bias=False)
          (down_proj): Linear(in_features=36864, out_features=4608, bias=False)
          (act_fn): PytorchGELUTanh()
        )
        (input_layernorm): Gemma2RMSNorm()
        (post_attention_layernorm): Gemma2RMSNorm()
        (pre_feedforward_layernorm): Gemma2RMSNorm()
        (post_feedforward_layernorm): Gemma2RMSNorm()
      )
    )
    (norm): Gemma2RMSNorm()
  )
  (lm_head): Linear(in_features=4608, out_features=256000, bias=False)
)"""

ATTENTION_OF_9B = """\
Gemma2Attention(
  (q_proj): Linear(in_features=3584, out_features=4096, bias=False)
  (k_proj): Linear(in_features=3584, out_features=2048, bias=False)
  (v_proj): Linear(in_features=3584, out_features=2048, bias=False)
  (o_proj): Linear(in_features=4096, out_features=3584, bias=False)
  (rotary_emb): Gemma2RotaryEmbedding()
)"""

ATTENTION_OF_2B = """\
Gemma2Attention(
  (q_proj): Linear(in_features=2304, out_features=2048, bias=False)
  (k_proj): Linear(in_features=2304, out_features=1024, bias=False)
  (v_proj): Linear(in_features=2304, out_features=1024, bias=False)
  (o_proj): Linear(in_features=2048, out_features=2304, bias=False)
  (rotary_emb): Gemma2RotaryEmbedding()
)"""


def test_the_tree_of_the_27b_is_the_posts() -> None:
    assert str(Gemma2ForCausalLM(PRESETS["27b"], device="meta")) == TREE_OF_27B


@pytest.mark.parametrize(("name", "printed"), [("9b", ATTENTION_OF_9B), ("2b", ATTENTION_OF_2B)])
def test_the_attention_of_the_other_sizes_is_the_posts(name: str, printed: str) -> None:
    assert str(Gemma2ForCausalLM(PRESETS[name], device="meta").model.layers[0].self_attn) == printed


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_table(name: str) -> None:
    model = Gemma2ForCausalLM(PRESETS[name], device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == expected_tensors(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == PRESETS[name].count_parameters().total


def test_first_values_are_for_training_from_scratch() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(SMALL)
    for module in model.modules():
        if isinstance(module, Gemma2RMSNorm):
            assert not module.weight.any()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert float(model.get_parameter(name).detach().std()) == pytest.approx(SMALL.initializer_range, rel=0.1)
    model.initialize(torch.Generator().manual_seed(3))
    again = Gemma2ForCausalLM(SMALL)
    again.initialize(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("move", ["to_empty", "bfloat16", "double", "deepcopy"])
def test_the_head_stays_the_embedding(move: str) -> None:
    """Whatever moves the parameters: two would drift apart in training, and take 1.2 GB more in a 2B."""
    if move == "to_empty":
        model = Gemma2ForCausalLM(SMALL, device="meta").to_empty(device="cpu")
    elif move == "deepcopy":
        model = copy.deepcopy(Gemma2ForCausalLM(SMALL))
    else:
        model = getattr(Gemma2ForCausalLM(SMALL), move)()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == SMALL.count_parameters().total


@pytest.mark.parametrize(("name", "scale"), [("2b", 48.0), ("9b", 59.75), ("27b", 68.0)])
def test_the_embedding_scale_is_rounded_to_bfloat16(name: str, scale: float) -> None:
    width = PRESETS[name].hidden_size
    assert float(torch.tensor(width**0.5, dtype=torch.bfloat16)) == scale
    config = SMALL.replace(hidden_size=width)
    model = Gemma2ForCausalLM(config, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(torch.tensor([[5]]))
        expected = (model.model.embed_tokens.weight[5].float() * scale).bfloat16()
    assert torch.equal(seen[0][0, 0], expected)


def test_rms_norm_rounds_once_at_the_end() -> None:
    """x̂ · (1 + w) in float32, rounded once: rounding x̂ first, as Llama does, gives other bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).bfloat16()
    norm = Gemma2RMSNorm(256, 1e-6, dtype=torch.bfloat16, device=None)
    with torch.no_grad():
        norm.weight.normal_(0, 0.5, generator=generator)
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        one = 1 + norm.weight.double()
        twice_rounded = (exact.bfloat16().double() * one.bfloat16().double()).bfloat16()
        ours = norm(x)
    assert (ours != (exact * one).bfloat16()).float().mean() < 1e-3  # but for float32's own last bit
    assert (ours != twice_rounded).float().mean() > 0.1
