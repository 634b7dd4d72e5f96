"""Settings of a model that trains in a second."""

from __future__ import annotations

from pathlib import Path


def settings_for(corpus: Path) -> str:
    """Settings for a corpus, with {output} to fill in."""
    return f"""
output: {{output}}
model: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
         num_key_value_heads: 2, head_dim: 8, query_pre_attn_scalar: 8, sliding_window: 8,
         max_position_embeddings: 64}}
tokenizer: {{vocab_size: 530}}
data: {{train: [{corpus}], validation: [{corpus}], validation_max_tokens: 400, shuffle_buffer: 50}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 2}}
run: {{num_steps: 12, batch_size: 4, sequence_length: 32, num_threads: 1, log_every: 1,
       validate_every: 6, checkpoint_every: 3, save_dtype: float32}}
"""
