"""Settings of a model that trains in a second, and a progress that remembers and can kill a run."""

from __future__ import annotations

from pathlib import Path

from gemma2.training.loop import StepReport


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


class KilledError(Exception):
    """Stands for a process that is killed."""


class Silent:
    """Shows nothing, remembers losses, and dies after a step if told so."""

    def __init__(self, die_at: int | None = None) -> None:
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self._die_at = die_at

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        if report.step == self._die_at:
            raise KilledError

    def on_validation(self, step: int, loss: float, bits_per_byte: float) -> None:
        self.validations.append((step, loss))

    def on_checkpoint(self, path: Path) -> None:
        pass
