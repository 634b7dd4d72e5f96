"""What every run does alike, whatever it trains: it looks at the machine, and goes on from where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from gemma2.distributed import Ranks
from gemma2.model.device import choose_device
from gemma2.text import Tokenizer
from gemma2.training.loop import Trainer, ValidationResult
from gemma2.training.optimizer import check_optimizer
from gemma2.training.settings import LoopSettings, OptimizerSettings


def check_machine(run: LoopSettings, optimizer: OptimizerSettings, ranks: Ranks) -> torch.device:
    """Returns the device of a run.

    Raises:
        ConfigError: it is not there, the batch cannot be shared out, or the optimizer cannot be had.
    """
    device = ranks.device or choose_device(run.device, setting="run.device")
    ranks.check_batch(run.batch_size, run.micro_batch_size)
    check_optimizer(optimizer, ranks.world_size)
    return device


def use_threads(run: LoopSettings) -> None:
    """Gives PyTorch as many threads as the settings say, if they do."""
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)


def resume_and_train(
    trainer: Trainer,
    state: tuple[str, dict[str, Any]] | None,
    *,
    say: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> ValidationResult | None:
    """Goes back to a checkpoint, if there is one, and trains; see `Trainer.train`.

    Args:
        trainer: of a run that has not begun.
        state: what `RunFolder.last_state` found.
        say: is told of the checkpoint.
        should_stop: asked after each step.
    """
    if state is not None:
        name, values = state
        trainer.load_state_dict(values)
        say(f"resumed from {name}: step {trainer.step}, {trainer.tokens_seen:,} tokens seen")
    return trainer.train(should_stop=should_stop)


def generation_config(tokenizer: Tokenizer, template: str) -> dict[str, str]:
    """generation_config.json of a model that learned from examples: answers end with <end_of_turn> if it learned so.

    Args:
        tokenizer: whose ids.
        template: "chat" or "none", of the examples.
    """
    stop_ids = [tokenizer.eos_id]
    if template == "chat":
        stop_ids.append(tokenizer.end_of_turn_id)
    values = {
        "_from_model_config": True,
        "bos_token_id": tokenizer.bos_id,
        "cache_implementation": "hybrid",
        "eos_token_id": stop_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    return {"generation_config.json": json.dumps(values, indent=2) + "\n"}
