"""The settings file of `gemma2 distill`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from gemma2.config import Gemma2Config
from gemma2.training.settings import (
    DataSettings,
    LoopSettings,
    OptimizerSettings,
    ParallelSettings,
    checked_model_fields,
)
from gemma2.training.settings_file import Section, read_settings
from gemma2.training.tune_settings import AdapterSettings, ExampleDataSettings


class TeacherSettings(Section):
    """The model that is learned from."""

    name: str = "bundled"
    """A folder, a name on the Hugging Face Hub that was pulled, or "bundled"."""
    backend: Literal["torch", "cpu"] = "torch"
    """What runs it: PyTorch, or the CPU engine."""
    weights: Literal["auto", "float32", "bfloat16", "nf4", "q8", "q4"] = "auto"
    """nf4 in torch, q8 and q4 in the CPU engine; auto: run.dtype in torch, q8 in the CPU engine."""
    cache: Path | None = None
    """A folder that `gemma2 distill cache` wrote: the teacher then does not run at all."""
    cache_top_k: int = Field(default=64, ge=1)
    """How many words of each token `gemma2 distill cache` keeps, and of the others their probability together."""

    @field_validator("cache")
    @classmethod
    def _home_of_cache(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()


class StudentSettings(Section):
    """The model that learns: one that exists, or a new one with the teacher's tokenizer."""

    name: str | None = None
    """A folder, a name on the Hub that was pulled, or "bundled"."""
    model: dict[str, Any] | None = None
    """Fields of `Gemma2Config` of a new model."""

    @field_validator("model")
    @classmethod
    def _known_model_fields(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if values is None else checked_model_fields(values)

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        if (self.name is None) == (self.model is None):
            yield "needs either name, of a model that exists, or model, the fields of a new one"

    def new_config(self, vocab_size: int) -> Gemma2Config:
        """The architecture of a new student."""
        assert self.model is not None
        return Gemma2Config.from_dict({**self.model, "vocab_size": vocab_size}, source="student.model")


class DivergenceSettings(Section):
    """What is minimized between teacher and student, see `gemma2.training.distillation`."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """forward_kl is the report's."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Of jsd."""
    temperature: float = Field(default=1.0, gt=0)
    hard_label_weight: float = Field(default=0.0, ge=0, le=1)
    """From 0, the teacher alone, to 1, the text alone."""

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        if "beta" in self.model_fields_set and self.kind != "jsd":
            yield f"beta is of jsd only, but kind is {self.kind}; leave it out"


class OnPolicySettings(Section):
    """Learning on what the student says itself: the trained tokens of a batch are replaced by its own samples."""

    fraction: float = Field(default=1.0, gt=0, le=1)
    """Of the batches, the share that is sampled."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Of a text, how many tokens the student continues; of an example, it is the prompt."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class DistillOptimizerSettings(OptimizerSettings):
    """As for pretraining."""


class DistillRunSettings(LoopSettings):
    """A run of so many steps, or, on examples, of so many epochs."""

    num_steps: int | None = Field(default=None, ge=1)
    num_epochs: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(ge=2)


class DistillSettings(Section):
    """All of a distillation."""

    output: Path
    """Folder of the run: checkpoints, log.jsonl, loss.png and, at the end, model/ or adapter/."""
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings
    adapter: AdapterSettings | None = None
    """Left out, every weight of the student is trained."""
    text: DataSettings | None = None
    """Documents, as `gemma2 pretrain` reads them; or else"""
    examples: ExampleDataSettings | None = None
    """examples, as `gemma2 tune` reads them."""
    objective: DivergenceSettings = DivergenceSettings()
    on_policy: OnPolicySettings | None = None
    optimizer: DistillOptimizerSettings
    run: DistillRunSettings
    parallel: ParallelSettings = ParallelSettings()

    @field_validator("output")
    @classmethod
    def _home_of_output(cls, path: Path) -> Path:
        return path.expanduser()

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        run, teacher = self.run, self.teacher
        data = self.text or self.examples
        if data is None or (self.text is not None and self.examples is not None):
            yield "data is needed: either text, documents as for pretrain, or examples, as for tune"
        else:
            yield from run.misfits_with(data.validation, f"{'text' if self.text else 'examples'}.validation")
        if self.examples is not None and self.examples.format == "preference":
            yield "examples.format: a teacher's words are learned from single examples, not from pairs"
        if run.num_steps is not None and run.num_epochs is not None:
            yield "run: num_epochs and num_steps both say how long the run is; give one of them"
        if self.text is not None and run.num_steps is None:
            yield "run.num_steps is needed with text, which has no epochs"
        if run.compile:
            yield "run.compile is of pretraining and tuning; the loss of distillation has no such form; leave it out"
        if self.adapter is not None and self.student.name is None:
            yield "adapter: a new student is random, and cannot be learned by an adapter alone"
        allowed = {"torch": ("auto", "float32", "bfloat16", "nf4"), "cpu": ("auto", "float32", "bfloat16", "q8", "q4")}
        if teacher.weights not in allowed[teacher.backend]:
            names = ", ".join(allowed[teacher.backend])
            yield f"teacher.weights: {teacher.backend} runs {names}, not {teacher.weights}"
        if self.on_policy is None:
            return
        if teacher.cache is not None:
            yield "on_policy: what the student will say cannot be in teacher.cache; leave one of them out"
        if self.objective.hard_label_weight:
            yield (
                "objective.hard_label_weight: with on_policy the words that follow are the student's own, which it "
                "must not take for the truth; leave one of them out"
            )
        if self.text is not None and self.on_policy.prompt_tokens >= run.sequence_length:
            yield (
                f"on_policy.prompt_tokens ({self.on_policy.prompt_tokens}) must be below run.sequence_length "
                f"({run.sequence_length}), so that something is left to say"
            )


def load_distill_settings(path: str | Path, overrides: list[str] | None = None) -> DistillSettings:
    """Reads the settings file of `gemma2 distill`; see `read_settings`."""
    return read_settings(DistillSettings, path, overrides or [])
