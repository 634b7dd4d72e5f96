"""The module tree as PyTorch's print() shows it, from the config alone."""

from __future__ import annotations

from gemma2.config import Gemma2Config


def module_tree(config: Gemma2Config) -> str:
    """Writes what `print(Gemma2ForCausalLM(config))` does, without PyTorch; a test holds the two together."""
    width, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim

    def linear(name: str, inputs: int, outputs: int) -> str:
        return f"({name}): Linear(in_features={inputs}, out_features={outputs}, bias=False)"

    # PyTorch writes equal neighbours in a ModuleList as "(0-45): 46 x".
    last = config.num_hidden_layers - 1
    layers = f"(0-{last}): {last + 1} x " if last else "(0): "
    return f"""\
Gemma2ForCausalLM(
  (model): Gemma2Model(
    (embed_tokens): Embedding({config.vocab_size}, {width}, padding_idx={config.pad_token_id})
    (layers): ModuleList(
      {layers}Gemma2DecoderLayer(
        (self_attn): Gemma2Attention(
          {linear("q_proj", width, queries)}
          {linear("k_proj", width, keys)}
          {linear("v_proj", width, keys)}
          {linear("o_proj", queries, width)}
          (rotary_emb): Gemma2RotaryEmbedding()
        )
        (mlp): Gemma2MLP(
          {linear("gate_proj", width, mlp)}
          {linear("up_proj", width, mlp)}
          {linear("down_proj", mlp, width)}
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
  {linear("lm_head", width, config.vocab_size)}
)"""
