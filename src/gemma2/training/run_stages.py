"""What every run does alike, whatever it trains: it looks at the machine, and goes on from where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from typing import Any

import torch

from gemma2.config import Gemma2Config
from gemma2.distributed import Ranks
from gemma2.errors import ConfigError
from gemma2.model.device import choose_device
from gemma2.text import Tokenizer
from gemma2.training.activation_checkpointing import num_checkpointed
from gemma2.training.adapters import check_adapter
from gemma2.training.loop import Trainer, ValidationResult
from gemma2.training.optimizer import check_optimizer
from gemma2.training.run_log import check_tensorboard
from gemma2.training.settings import LoopSettings, OptimizerSettings
from gemma2.training.tune_settings import AdapterSettings


def check_machine(run: LoopSettings, optimizer: OptimizerSettings, ranks: Ranks) -> torch.device:
    """Returns the device of a run.

    Raises:
        ConfigError: it is not there, the batch cannot be shared out, or the optimizer or a compiler cannot be had.
        MissingDependencyError: TensorBoard is wanted and not installed.
    """
    device = ranks.device or choose_device(run.device, setting="run.device")
    if run.compile and device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError(
            "run.compile needs a C++ compiler, and none is found; install g++, or set run.compile to false"
        )
    ranks.check_batch(run.batch_size, run.micro_batch_size)
    check_optimizer(optimizer, ranks.world_size)
    if run.tensorboard:
        check_tensorboard()
    return device


def check_layers(config: Gemma2Config, run: LoopSettings, adapter: AdapterSettings | None = None) -> None:
    """Checks settings that name layers against the model that has them.

    Args:
        config: of the model that is trained.
        run: which layers keep only their input.
        adapter: to train.

    Raises:
        ConfigError: the model has not so many layers, or they are too narrow for the adapter.
        MissingDependencyError: PEFT is needed and not installed.
    """
    num_checkpointed(run.gradient_checkpointing, config.num_hidden_layers)
    if adapter is not None:
        check_adapter(config, adapter)


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
        state: what `RunFolder.last_state` found. It is emptied, so that its tensors take no memory in the run.
        say: is told of the checkpoint.
        should_stop: asked after each step.
    """
    if state is not None:
        name, values = state
        trainer.load_state_dict(values)
        values.clear()
        say(f"resumed from {name}: step {trainer.step}, {trainer.tokens_seen:,} tokens seen")
    return trainer.train(should_stop=should_stop)


def say_stopped_early(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Says so, if a run ended before its last step because validations were no better."""
    if trainer.stopped_early:
        say(f"stopped early at step {trainer.step}: the validation loss was lowest, {trainer.best_loss:.4f}, before")


def generation_config(tokenizer: Tokenizer, *, is_chat: bool, before: Collection[int] = ()) -> dict[str, str]:
    """generation_config.json of a model that has learned: answers end with <end_of_turn> if it learned so, or knew so.

    Args:
        tokenizer: whose ids.
        is_chat: whether it learned from examples in Gemma's chat format.
        before: what ended answers of the model that it was.
    """
    ids = {tokenizer.eos_id, *before}
    if is_chat:
        ids.add(tokenizer.end_of_turn_id)
    values = {
        "_from_model_config": True,
        "bos_token_id": tokenizer.bos_id,
        "cache_implementation": "hybrid",
        "eos_token_id": sorted(ids),
        "pad_token_id": tokenizer.pad_id,
    }
    return {"generation_config.json": json.dumps(values, indent=2) + "\n"}
