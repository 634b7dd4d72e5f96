"""The settings file of `gemma2 pretrain`: one YAML file, every mistake reported at once.

Fields of `model` are those of `Gemma2Config`. Numbers of tokens count labels, the tokens that are learned from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError, nearest_name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSettings(_Section):
    """A tokenizer to train, or the folder of one that exists."""

    folder: Path | None = None
    """Holds tokenizer.json or tokenizer.model; left out, one is trained on the data."""
    vocab_size: int = Field(default=8192, ge=512)

    @field_validator("folder")
    @classmethod
    def _home_of_folder(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    sample_bytes: int = Field(default=30_000_000, ge=1000)
    """How much text the tokenizer is trained on, drawn from all of the data."""


class DataSettings(_Section):
    """What is read: text or JSONL files, plain or .xz, .gz, .zst; names, globs or folders."""

    train: list[str] = Field(min_length=1)
    validation: list[str] = Field(default_factory=list)
    text_key: str = "text"
    newlines: Literal["keep", "lf", "both"] = "keep"
    """keep; lf turns CRLF into LF; both does so for every second document."""
    shuffle_buffer: int = Field(default=16384, ge=1)
    """Pieces of `sequence_length` tokens that are mixed at a time."""
    on_error: Literal["raise", "skip"] = "raise"
    validation_max_tokens: int | None = Field(default=200_000, ge=1)


class OptimizerSettings(_Section):
    """AdamW with linear warm-up and cosine decay; weight decay on matrices only."""

    learning_rate: float = Field(gt=0)
    final_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=100, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)


class RunSettings(_Section):
    """How long, how much at a time, and what is written when."""

    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Rows of one optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward pass; gradients of `batch_size` rows are summed up. Left out: all at once."""
    sequence_length: int = Field(ge=2)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products. Weights, optimizer and the residual stream are float32 in any case."""
    compile: bool = False
    """Whether torch.compile fuses the loss over the vocabulary; needs a C++ compiler on the CPU."""
    device: str = "auto"
    seed: int = 0
    num_threads: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=250, ge=1)
    checkpoint_every: int = Field(default=250, ge=1)
    checkpoints_to_keep: int = Field(default=2, ge=1)
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the model folder that is written at the end."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> RunSettings:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size must be a multiple of micro_batch_size, but they are "
                f"{self.batch_size} and {self.micro_batch_size}"
            )
        return self


class PretrainSettings(_Section):
    """All of a pretraining run."""

    output: Path
    """Folder of the run: tokenizer, checkpoints, log.jsonl, loss.png and, at the end, model/."""
    model: dict[str, Any]
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings

    @field_validator("output")
    @classmethod
    def _home_of_output(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("model")
    @classmethod
    def _known_model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = {name: _number(value) for name, value in values.items()}
        known = [name for name in Gemma2Config.__dataclass_fields__ if name != "vocab_size"]
        problems = [
            f"there is no field {name!r}.{nearest_name(name, known)}"
            if name != "vocab_size"
            else "vocab_size is the tokenizer's; set it under tokenizer"
            for name in values
            if name not in known
        ]
        if problems:
            raise ValueError("; ".join(problems))
        try:
            Gemma2Config.from_dict(values, source="model")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return values

    def gemma2_config(self, vocab_size: int) -> Gemma2Config:
        """The architecture, with the vocabulary of the tokenizer."""
        return Gemma2Config.from_dict({**self.model, "vocab_size": vocab_size}, source="model")


def load_pretrain_settings(path: str | Path, overrides: list[str] | None = None) -> PretrainSettings:
    """Reads a settings file.

    Args:
        path: the YAML file. Paths in it are relative to the folder that the program runs in.
        overrides: "section.key=value" each, as on the command line; values are read as YAML.

    Raises:
        ConfigError: the file is missing or is not YAML, or settings are unknown, missing or out of range; all of
            them are listed.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold settings (key: value), but holds {type(values).__name__}")
    for override in overrides or []:
        _apply_override(values, override)
    try:
        return PretrainSettings.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError(f"{path}: {count}: " + " | ".join(problems)) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set needs section.key=value, but came {override!r}")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {section!r} is a value and has no keys")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-6 for a text, since it has no point; everyone means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _describe(problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = PretrainSettings
        for part in problem["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
            section = annotation
        return f"{location}: there is no such setting.{nearest_name(str(problem['loc'][-1]), section.model_fields)}"
    if problem["type"] == "missing":
        return f"{location}: is needed, but is not there"
    if problem["type"] == "value_error":
        return f"{location}: {problem['ctx']['error']}"
    return f"{location}: {problem['msg']}, but is {problem['input']!r}"
