"""The one training loop: batches through an objective into an optimizer, with logs, validation and checkpoints.

It knows neither what is minimized (an `Objective`) nor what was done to the model before (adapters and the like are
applied outside). A run that is killed at any moment and started again from its last checkpoint ends with the same
weights, bit for bit, on the same machine and number of threads: parameters, optimizer and the loader's position are
restored, and nothing else has a state.

With several processes each runs this loop over its own rows of each batch. Whatever decides something (losses, norms,
requests to stop) is agreed on by all, so that all go the same way; the first one writes the log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemma2.data import PackedBatch, ValidationSet
from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.distributed.gradients import clip_gradients, sum_whole_gradients
from gemma2.errors import DataError
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.memory_use import peak_memory_bytes
from gemma2.training.objectives import Batch, CountUnits, MetricSums, Objective, count_labels
from gemma2.training.optimizer import begin_moments, learning_rate_at, make_optimizer
from gemma2.training.run_log import NoLog, RunLog
from gemma2.training.run_state import best_loss, fill_tensors, load_best, save_best, save_run_state
from gemma2.training.settings import LoopSettings, OptimizerSettings


class Loader(Protocol):
    """Batches with a position that can be saved: `PackedLoader` or `Prefetcher`."""

    def __iter__(self) -> Iterator[PackedBatch]: ...
    def __next__(self) -> PackedBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known after some steps."""

    step: int
    num_steps: int
    loss: float
    """Mean since the last report."""
    tokens_per_second: float
    memory_bytes: int
    """The most that the process, or its accelerator, has taken so far."""


class Progress(Protocol):
    """Who shows a person how far the run is."""

    def on_step(self, report: StepReport) -> None: ...
    def on_validation(self, step: int, loss: float, bits_per_byte: float | None) -> None: ...
    def on_checkpoint(self, path: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """Loss on a fixed set of text."""

    loss: float
    """Mean, in nats per token, or whatever the objective sums up, per unit that is counted."""
    bits_per_byte: float
    """Of text alone."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer; infinite if it does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def validate(
    model: Gemma2ForCausalLM,
    objective: Objective,
    validation: ValidationSet,
    *,
    device: torch.device,
    count_units: CountUnits = count_labels,
    ranks: Ranks = ONE_PROCESS,
) -> ValidationResult:
    """Measures the model on a fixed set of batches; with several processes, each on batches of its own."""
    model.eval()
    total, number = 0.0, 0.0
    for packed in validation.batches:
        total += float(objective(model, Batch.on_device(packed, device)))
        number += count_units(packed)
    total, number = ranks.total(total, number)
    model.train()
    return ValidationResult(loss=total / number, bits_per_byte=total / math.log(2) / max(1, validation.num_bytes))


class Trainer:
    """One run of the loop.

    Args:
        model: to be trained, in place; float32 on its device. Only parameters that require gradients are trained.
        objective: what is minimized.
        loader: batches of `run.batch_size` rows.
        validation: what to validate on, or None.
        run: what goes through at once, and what is written when.
        num_steps: how long the run is.
        optimizer: which optimizer, and its learning rate.
        folder: where log.jsonl, loss.png and checkpoints/ go.
        progress: is told of each step.
        fingerprint: settings that a resumed run must share, kept in each checkpoint.
        validation_objective: what validation measures; left out, `objective`.
        minimized: name of what training minimizes, for the plot, if it is not what validation measures.
        count_units: what the summed loss of a batch is divided by; left out, its labels.
        measures_text: whether validation is in nats per token, so that it has a perplexity and bits per byte.
        metrics: what the objective reports beside its loss, for the log.
        ranks: the processes; the loader and the validation then give this one's rows.
    """

    def __init__(
        self,
        *,
        model: Gemma2ForCausalLM,
        objective: Objective,
        loader: Loader,
        validation: ValidationSet | None,
        run: LoopSettings,
        num_steps: int,
        optimizer: OptimizerSettings,
        folder: Path,
        progress: Progress,
        fingerprint: dict[str, Any],
        validation_objective: Objective | None = None,
        minimized: str | None = None,
        count_units: CountUnits = count_labels,
        measures_text: bool = True,
        metrics: MetricSums | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.model = model
        self.objective = objective
        self.validation_objective = validation_objective or objective
        self.loader = loader
        self.validation = validation
        self.run_settings = run
        self.num_steps = num_steps
        self.optimizer_settings = optimizer
        self.optimizer = make_optimizer(model, optimizer)
        self.folder = folder
        self.progress = progress
        self.fingerprint = fingerprint
        self.count_units = count_units
        self.measures_text = measures_text
        self.minimized = minimized
        self.metrics = metrics
        self.ranks = ranks
        self.device = next(model.parameters()).device
        self.step = 0
        self.tokens_seen = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.validations_since_best = 0
        self._losses: list[float] = []  # since the last line of the log
        self._is_resumed = False
        self._last_checkpoint: int | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether validation has not become better for as long as the settings wait."""
        patience = self.run_settings.early_stopping_patience
        return patience is not None and self.validations_since_best >= patience

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.num_steps or self.stopped_early

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors, numbers, strings and lists only."""
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "validations_since_best": self.validations_since_best,
            "losses": list(self._losses),
            "model": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "loader": _to_tensors(self.loader.state_dict()),
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken, in any number of processes."""
        if self.ranks.world_size == 1:
            self._restore(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            assert isinstance(self.optimizer, torch.optim.AdamW)  # see check_optimizer
            begin_moments(self.optimizer, state["optimizer"])
            fill_tensors({"model": self._trained(), "optimizer": self.optimizer.state_dict()}, state)
        self.loader.load_state_dict(_from_tensors(state["loader"]))
        self.step, self.tokens_seen, self.seconds = state["step"], state["tokens_seen"], state["seconds"]
        self.best_loss, self.validations_since_best = state["best_loss"], state["validations_since_best"]
        self._losses = list(state.get("losses", []))
        self._is_resumed, self._last_checkpoint = True, self.step

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _restore(self, values: dict[str, Tensor]) -> None:
        trained = self._trained()
        assert trained.keys() == values.keys()
        for name, value in values.items():
            trained[name].copy_(value)

    def train(self, *, should_stop: Callable[[], bool] = lambda: False) -> ValidationResult | None:
        """Runs until `num_steps`, or until validation becomes no better, and returns the last validation.

        With `keep_best` the model then holds the weights of the best validation.

        Args:
            should_stop: asked after each step; if it says so, a checkpoint is written and the run ends early.

        Raises:
            DataError: the loss is no longer a finite number, the data ends early, or cannot be read; before the last,
                one process writes a checkpoint.
        """
        run, checkpoints = self.run_settings, self.folder / "checkpoints"
        if run.keep_best and best_loss(checkpoints, ranks=self.ranks) != self.best_loss:
            self.best_loss = math.inf  # it was not kept when it was found: the next validation is the best
        log: RunLog | NoLog = NoLog()
        if self.ranks.is_first:
            log = RunLog(
                self.folder / "log.jsonl",
                last_step=self.step if self._is_resumed else -1,
                tensorboard=self.folder / "tensorboard" if run.tensorboard else None,
            )
        self.model.train()
        result: ValidationResult | None = None
        self._began, self._seconds_before = time.monotonic(), self.seconds
        if self.step == 0 and run.validate_first and self.validation is not None:
            result = self._validate(self.validation, log)
        since_log_tokens, since_log_time = 0, time.monotonic()
        while not self.is_done:
            try:
                packed = next(self.loader)
            except StopIteration:
                raise DataError(
                    f"the data ended at step {self.step} of {self.num_steps}; give more data or fewer steps"
                ) from None
            except DataError:
                if self.ranks.world_size == 1 and self._last_checkpoint != self.step > 0:
                    self._save(log)  # so that it goes on from here when the data is mended, or bad data is skipped
                raise
            loss, num_tokens, grad_norm, rate = self._one_step(packed)
            self._losses.append(loss)
            since_log_tokens += num_tokens
            is_last = self.step == self.num_steps
            stopping = self.ranks.any(should_stop())
            if self.step % run.log_every == 0 or is_last or stopping:
                elapsed = time.monotonic() - since_log_time
                report = StepReport(
                    step=self.step,
                    num_steps=self.num_steps,
                    loss=sum(self._losses) / len(self._losses),
                    tokens_per_second=since_log_tokens / max(elapsed, 1e-9),
                    memory_bytes=peak_memory_bytes(self.device),
                )
                log.write(
                    event="step",
                    step=self.step,
                    tokens=self.tokens_seen,
                    loss=round(report.loss, 5),
                    learning_rate=rate,
                    grad_norm=round(grad_norm, 4),
                    tokens_per_second=round(report.tokens_per_second, 1),
                    memory_bytes=report.memory_bytes,
                    seconds=round(self._total_seconds(), 1),
                    **self._taken_metrics(),
                )
                self.progress.on_step(report)
                self._losses, since_log_tokens, since_log_time = [], 0, time.monotonic()
            if self.validation is not None and (self.step % run.validate_every == 0 or is_last):
                result = self._validate(self.validation, log)
                since_log_time = time.monotonic()
            if self.step % run.checkpoint_every == 0 or is_last or stopping or self.stopped_early:
                self._save(log)
            if stopping:
                break
        self.seconds = self._total_seconds()
        log.close()
        if run.keep_best and self.is_done and self.best_loss < math.inf:
            best = load_best(checkpoints, ranks=self.ranks)
            if self.ranks.world_size == 1:
                self._restore(best["model"])
            else:
                fill_tensors({"model": self._trained()}, best)
        return result

    def _save(self, log: RunLog | NoLog) -> None:
        """Writes a checkpoint and draws the curve."""
        self.seconds = self._total_seconds()
        path = save_run_state(
            self.folder / "checkpoints",
            self.step,
            self.state_dict(),
            to_keep=self.run_settings.checkpoints_to_keep,
            ranks=self.ranks,
        )
        self._last_checkpoint = self.step
        title = f"{self.folder.name}: step {self.step}"
        log.plot(self.folder / "loss.png", title=title, is_text=self.measures_text, minimized=self.minimized)
        self.progress.on_checkpoint(path)

    def _validate(self, validation: ValidationSet, log: RunLog | NoLog) -> ValidationResult:
        """Measures, and keeps the weights if they are the best so far and that is wanted."""
        self._taken_metrics()  # of training steps since the last line of the log
        result = validate(
            self.model,
            self.validation_objective,
            validation,
            device=self.device,
            count_units=self.count_units,
            ranks=self.ranks,
        )
        of_text = {"perplexity": round(result.perplexity, 3), "bits_per_byte": round(result.bits_per_byte, 5)}
        log.write(
            event="validation",
            step=self.step,
            tokens=self.tokens_seen,
            loss=round(result.loss, 5),
            **(of_text if self.measures_text else {}),
            **self._taken_metrics(),
        )
        self.progress.on_validation(self.step, result.loss, result.bits_per_byte if self.measures_text else None)
        self.validations_since_best += 1
        if result.loss < self.best_loss:
            self.best_loss, self.validations_since_best = result.loss, 0
            if self.run_settings.keep_best:
                state = {"step": self.step, "loss": result.loss, "model": self._trained()}
                save_best(self.folder / "checkpoints", state, ranks=self.ranks)
        return result

    def _taken_metrics(self) -> dict[str, float]:
        if self.metrics is None:
            return {}
        return {name: round(value, 5) for name, value in self.metrics.take(self.ranks).items()}

    def _total_seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def _one_step(self, packed: PackedBatch) -> tuple[float, int, float, float]:
        """One optimizer step; returns its mean loss, its number of labels, the gradient's norm and the rate.

        All four are of the whole batch, over all processes.
        """
        batch = Batch.on_device(packed, self.device)
        num_tokens, num_units = map(int, self.ranks.total(packed.num_tokens, self.count_units(packed)))
        divisor = max(1, num_units)
        num_rows = batch.input_ids.shape[0]
        micro = self.run_settings.micro_batch_size or num_rows
        total = torch.zeros((), device=self.device)
        # Of dropout: a resumed run draws the same, and processes with other rows draw others.
        torch.manual_seed(_step_seed(self.run_settings.seed, self.step) + self.ranks.data_rank)
        for first in range(0, num_rows, micro):
            loss_sum = self.objective(self.model, batch.rows(first, first + micro))
            (loss_sum / divisor).backward()  # type: ignore[no-untyped-call]
            total += loss_sum.detach()
        loss = self.ranks.total(float(total))[0] / divisor
        if not math.isfinite(loss):
            raise DataError(
                f"the loss became {loss} at step {self.step}: lower learning_rate, or look at the data; "
                f"the last checkpoint is in {self.folder / 'checkpoints'}"
            )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        sum_whole_gradients(trained, self.ranks)
        grad_norm = clip_gradients(trained, self.optimizer_settings.max_grad_norm, self.ranks)
        if not math.isfinite(float(grad_norm)):
            raise DataError(
                f"the gradient's norm became {float(grad_norm)} at step {self.step}: lower learning_rate, or "
                f"look at the data; the last checkpoint is in {self.folder / 'checkpoints'}"
            )
        rate = learning_rate_at(self.step, self.num_steps, self.optimizer_settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_seen += num_tokens
        return loss, num_tokens, float(grad_norm), rate


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _to_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Arrays to tensors, since a checkpoint is read without running any code of numpy's unpickling."""
    import numpy as np

    return {key: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for key, v in state.items()}


def _from_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {key: v.numpy() if isinstance(v, Tensor) else v for key, v in state.items()}
