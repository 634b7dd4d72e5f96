"""What all training has for settings, and the settings file of `gemma2 pretrain`.

Fields of `model` are those of `Gemma2Config`. Numbers of tokens count labels, the tokens that are learned from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gemma2.config import Gemma2Config
from gemma2.errors import ConfigError, nearest_name
from gemma2.training.settings_file import Section, read_settings


class TokenizerSettings(Section):
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


class DataSettings(Section):
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
    num_streams: int = Field(default=1, ge=1)
    """Into how many streams documents are dealt out, each with its share of every batch. What is trained on depends on
    this, never on how many processes there are; each process reads the streams of its rows only."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Section):
    """AdamW or Muon with linear warm-up and cosine decay; weight decay on matrices only."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: matrices of layers move by orthogonal steps (see `training.optimizer`), all else by AdamW."""
    learning_rate: float = Field(gt=0)
    final_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_steps: int = Field(default=100, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """muon: of the matrices of layers; `betas` and `eps` are AdamW's."""
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)


class LoopSettings(Section):
    """How the loop goes: how much at a time, in what, and what is written when."""

    batch_size: int = Field(ge=1)
    """Rows of one optimizer step, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward pass of one process; gradients are summed up. Left out: all of a process's rows at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products. Weights that are trained and the optimizer are float32 in any case."""
    gradient_checkpointing: bool | Annotated[int, Field(ge=0)] = False
    """Whether layers keep only their input and are computed again in the backward pass: less memory, more time. A
    number says how many layers."""
    compile: bool = False
    """Whether torch.compile fuses the loss over the vocabulary; needs a C++ compiler on the CPU."""
    device: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    num_threads: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=250, ge=1)
    validate_first: bool = False
    """Whether validation also runs before the first step: what the model was like before."""
    checkpoint_every: int = Field(default=250, ge=1)
    checkpoints_to_keep: int = Field(default=2, ge=1)
    keep_best: bool = False
    """Whether what is written at the end is the state with the lowest validation loss, not the last one."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stops after so many validations in a row without a new lowest loss."""
    tensorboard: bool = False
    """Whether the log is also written for TensorBoard, into the folder tensorboard."""
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the model folder that is written at the end."""

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            yield (
                f"batch_size must be a multiple of micro_batch_size, but they are "
                f"{self.batch_size} and {self.micro_batch_size}"
            )

    def misfits_with(self, validation: list[str], setting: str) -> Iterator[str]:
        """What needs a validation, where there is none; `setting` would name its files."""
        for name in ("keep_best", "early_stopping_patience"):
            if getattr(self, name) and not validation:
                yield f"run.{name} goes by the validation loss; name files under {setting}"


class ParallelSettings(Section):
    """How several processes, as `torchrun` starts them, share the work; one process needs none of it."""

    data: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Into how many parts a batch is cut, among which the weights are shared too (FSDP); auto takes all processes."""
    tensor: int = Field(default=1, ge=1)
    """How many processes share each matrix product."""


class RunSettings(LoopSettings):
    """A run of so many steps over rows of one length."""

    num_steps: int = Field(ge=1)
    sequence_length: int = Field(ge=2)


class PretrainSettings(Section):
    """All of a pretraining run."""

    output: Path
    """Folder of the run: tokenizer, checkpoints, log.jsonl, loss.png and, at the end, model/."""
    model: dict[str, Any]
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings
    parallel: ParallelSettings = ParallelSettings()

    def misfits(self) -> Iterator[str]:
        """See `Section`."""
        yield from self.run.misfits_with(self.data.validation, "data.validation")

    @field_validator("output")
    @classmethod
    def _home_of_output(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("model")
    @classmethod
    def _known_model_fields(cls, values: dict[str, Any]) -> dict[str, Any]:
        return checked_model_fields(values)

    def gemma2_config(self, vocab_size: int) -> Gemma2Config:
        """The architecture, with the vocabulary of the tokenizer."""
        return Gemma2Config.from_dict({**self.model, "vocab_size": vocab_size}, source="model")


def load_pretrain_settings(path: str | Path, overrides: list[str] | None = None) -> PretrainSettings:
    """Reads the settings file of `gemma2 pretrain`; see `read_settings`."""
    return read_settings(PretrainSettings, path, overrides or [])


def checked_model_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Checks the fields of an architecture, without its vocabulary, and makes numbers of what YAML left as text.

    Raises:
        ValueError: a field is unknown, missing or out of range.
    """
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


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-6 for a text, since it has no point; everyone means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
