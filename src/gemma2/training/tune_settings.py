"""The settings file of `gemma2 tune`. Fields of `adapter` are those of PEFT's LoraConfig."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, field_validator

from gemma2.data import Format, OnError, Template, TooLong, TrainOn
from gemma2.errors import nearest_name
from gemma2.memory.weights import ADAPTABLE_MODULES
from gemma2.training.settings import Beta, LoopSettings, OptimizerSettings, ParallelSettings
from gemma2.training.settings_file import Section, read_settings

ALL_LINEAR: Final = "all-linear"
ENGINE_FORMATS: Final = ("q8", "q4")
"""Quantizations whose products run on the CPU engine."""


class BaseModelSettings(Section):
    """The model to start from."""

    name: str = "bundled"
    """A folder, a name on the Hugging Face Hub that was pulled, or "bundled"."""
    quantization: Literal["none", "nf4", "int8", "q8", "q4"] = "none"
    """Of the frozen matrices below an adapter. nf4 (QLoRA) and int8 are bitsandbytes', on CPU and GPU. q8 and q4 are
    the CPU engine's: its 8-bit kernels compute forward and backward, on the numbers that it runs in this format."""


class AdapterSettings(Section):
    """LoRA and its variants: W x + s · B A x, where A and B are trained and W is frozen."""

    r: int = Field(default=16, ge=1)
    """Width of the adapters."""
    lora_alpha: float = Field(default=32, gt=0)
    """s is lora_alpha / r; with use_rslora lora_alpha / √r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = ALL_LINEAR
    """Which linear maps of a layer get one."""
    layers_to_transform: list[int] | None = None
    """Which layers get one, counted from 0; left out, all."""
    use_rslora: bool = False
    use_dora: bool = False
    """Whether the length of each row of W + s · B A is trained apart from its direction."""
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] = True
    """True: A random, B zero. pissa and olora start from a decomposition of W."""

    @field_validator("target_modules")
    @classmethod
    def _known_modules(cls, names: str | list[str]) -> str | list[str]:
        if isinstance(names, str):
            return names
        if not names:
            raise ValueError(f"names no linear map; they are {', '.join(ADAPTABLE_MODULES)}")
        for name in names:
            if name in ("lm_head", "embed_tokens"):
                raise ValueError(
                    f"{name} cannot have an adapter: embedding and head are one matrix in Gemma 2, and an adapter "
                    "would change one of the two uses only"
                )
            if name not in ADAPTABLE_MODULES:
                raise ValueError(
                    f"there is no linear map {name!r} in a layer; they are {', '.join(ADAPTABLE_MODULES)}."
                    + nearest_name(name, ADAPTABLE_MODULES)
                )
        return names

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            yield f"init_lora_weights orthogonal needs an even r, but it is {self.r}"

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear maps that get an adapter."""
        return ADAPTABLE_MODULES if isinstance(self.target_modules, str) else tuple(self.target_modules)


class ExampleDataSettings(Section):
    """Examples to learn from: JSON lines (plain, .xz, .gz, .zst), JSON, Parquet, or datasets of the Hub (hf:name)."""

    train: list[str] = Field(min_length=1)
    validation: list[str] = Field(default_factory=list)
    format: Format = "auto"
    """The form of the examples; auto tells it from their columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column of a record holds what the format calls so: {prompt: question}."""
    template: Template = "chat"
    """How a prompt and its completion are put together: as turns of Gemma's chat format, or one after the other."""
    train_on: TrainOn = "answers"
    too_long: TooLong = "skip"
    on_error: OnError = "raise"
    packing: bool = True
    """Whether several examples share a row, without seeing each other."""
    max_train_examples: int | None = Field(default=None, ge=1)
    max_validation_examples: int | None = Field(default=500, ge=1)


class TuneObjectiveSettings(Section):
    """What is minimized: the loss of the next token, or a loss over pairs of a preferred and a rejected answer."""

    kind: Literal["next_token", "dpo"] = "next_token"
    beta: float = Field(default=0.1, gt=0)
    """dpo: how dear it is to leave the model that tuning began with."""
    loss_type: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: share of pairs that are thought to be the wrong way round."""


class TuneOptimizerSettings(OptimizerSettings):
    """As for pretraining, with what suits tuning where it is left out."""

    learning_rate: float = Field(default=2e-4, gt=0)
    final_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=10, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)


class TuneRunSettings(LoopSettings):
    """A run of so many epochs, or of so many steps."""

    batch_size: int = Field(default=8, ge=1)
    num_epochs: int | None = Field(default=None, ge=1)
    num_steps: int | None = Field(default=None, ge=1)
    sequence_length: int | None = Field(default=None, ge=2)
    """Tokens of a row, and of the longest example; left out, the model's context, but no more than 1024."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    validate_first: bool = True

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        yield from super().misfits()
        if self.num_epochs is not None and self.num_steps is not None:
            yield "num_epochs and num_steps both say how long the run is; give one of them"


class TuneSettings(Section):
    """All of a tuning run."""

    output: Path
    """Folder of the run: checkpoints, log.jsonl, loss.png and, at the end, adapter/ or model/."""
    model: BaseModelSettings = BaseModelSettings()
    adapter: AdapterSettings | None = None
    """Left out, every weight is trained."""
    data: ExampleDataSettings
    objective: TuneObjectiveSettings = TuneObjectiveSettings()
    optimizer: TuneOptimizerSettings = TuneOptimizerSettings()
    run: TuneRunSettings = TuneRunSettings()
    parallel: ParallelSettings = ParallelSettings()

    @field_validator("output")
    @classmethod
    def _home_of_output(cls, path: Path) -> Path:
        return path.expanduser()

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        quantization, adapter, is_dpo = self.model.quantization, self.adapter, self.objective.kind == "dpo"
        if quantization != "none" and adapter is None:
            yield (
                f"model.quantization: weights in {quantization} cannot be trained themselves; add an adapter, or take "
                "quantization away"
            )
        init = None if adapter is None else adapter.init_lora_weights
        if init in ("pissa", "olora") and quantization != "none":
            yield (
                f"adapter.init_lora_weights: {init} changes the frozen weights, which {quantization} would round once "
                "more; leave model.quantization out"
            )
        if init in ("pissa", "olora") and is_dpo:
            yield (
                f"adapter.init_lora_weights: {init} changes the frozen weights, but the reference of dpo is the model "
                "as it was; leave init_lora_weights out"
            )
        if init == "orthogonal" and quantization in ("nf4", "int8"):
            yield (
                f"adapter.init_lora_weights: orthogonal is for matrices of numbers, which {quantization} does not "
                "keep; leave one of the two out"
            )
        if adapter is not None and adapter.use_dora and quantization in ENGINE_FORMATS:
            yield (
                f"adapter.use_dora reads the frozen matrices, which {quantization} keeps for products only; set "
                "model.quantization to nf4 or none, or leave use_dora out"
            )
        yield from self.run.misfits_with(self.data.validation, "data.validation")
        if self.data.format not in ("auto", "preference") and is_dpo:
            yield f"objective.kind dpo needs pairs, but data.format is {self.data.format}"
        if self.data.format == "preference" and not is_dpo:
            yield "data.format is preference, which objective.kind dpo learns from; set that"
        smooth = self.objective.label_smoothing
        if smooth and (not is_dpo or self.objective.loss_type not in ("sigmoid", "robust")):
            yield "objective.label_smoothing is of dpo with loss_type sigmoid or robust only; leave it out"
        for name in ("beta", "loss_type"):
            if name in self.objective.model_fields_set and not is_dpo:
                yield f"objective.{name} is of dpo only; set objective.kind to dpo, or leave it out"
        if self.run.compile and is_dpo:
            yield "run.compile is of objective.kind next_token only; leave it out"


def load_tune_settings(path: str | Path, overrides: list[str] | None = None) -> TuneSettings:
    """Reads the settings file of `gemma2 tune`; see `read_settings`."""
    return read_settings(TuneSettings, path, overrides or [])
