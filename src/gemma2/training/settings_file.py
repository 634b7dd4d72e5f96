"""Reading a settings file: YAML with sections, checked as a whole, every mistake reported at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gemma2.errors import ConfigError, nearest_name


class MisfitError(ValueError):
    """Values that are right each by itself and wrong together; one sentence for each such mistake."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(" | ".join(sentences))
        self.sentences = sentences


class Section(BaseModel):
    """A section of a settings file: no unknown keys, nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def misfits(self) -> Iterator[str]:
        """Gives a sentence for each set of values that do not go together."""
        return iter(())

    @model_validator(mode="after")
    def _fitting(self) -> Section:
        if sentences := list(self.misfits()):
            raise MisfitError(sentences)
        return self


Settings = TypeVar("Settings", bound=Section)


def read_settings(kind: type[Settings], path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads a settings file.

    Args:
        kind: what the file must hold.
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
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_all_problems(kind, values, error)))
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError(f"{path}: {count}: " + " | ".join(problems)) from None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says which settings differ, as "section.key: then, now" each; both as `model_dump` gives them."""
    found = []
    for name in sorted({*before, *now}):
        then, here = before.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(here, dict):
            found += [f"{name}.{line}" for line in differences(then, here)]
        elif then != here:
            found.append(f"{name}: {then!r} then, {here!r} now")
    return found


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set needs section.key=value, but came {override!r}")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        below = target.setdefault(section, {})
        if below is None:  # "adapter:" alone in YAML
            below = target[section] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {section!r} is a value and has no keys")
        target = below
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _all_problems(kind: type[BaseModel], values: dict[str, Any], error: ValidationError) -> Iterator[str]:
    """Describes what is wrong, and what of the rest does not go together: that is looked at without what is wrong."""
    wrong = [problem for problem in error.errors() if problem["type"] != "value_error" or _is_at_a_key(problem)]
    for problem in error.errors():
        yield from _describe(kind, problem)
    if not wrong:
        return
    rest = copy.deepcopy(values)
    for problem in wrong:
        _remove(rest, problem["loc"])
    try:
        kind.model_validate(rest)
    except ValidationError as further:
        for problem in further.errors():
            if problem["type"] == "value_error":
                yield from _describe(kind, problem)


def _is_at_a_key(problem: Any) -> bool:
    """Whether a mistake is one key's, and not of a section as a whole."""
    return not isinstance(problem["ctx"]["error"], MisfitError)


def _remove(values: Any, location: tuple[int | str, ...]) -> None:
    *sections, last = location
    for part in sections:
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(last, None)


def _describe(kind: type[BaseModel], problem: Any) -> Iterator[str]:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = _section_at(kind, problem["loc"][:-1])
        hint = nearest_name(str(problem["loc"][-1]), section.model_fields) if section else ""
        yield f"{location}: there is no such setting.{hint}"
    elif problem["type"] == "missing":
        yield f"{location}: is needed, but is not there"
    elif problem["type"] == "value_error":
        error = problem["ctx"]["error"]
        sentences = error.sentences if isinstance(error, MisfitError) else [str(error)]
        yield from (f"{location}: {sentence}" if location else sentence for sentence in sentences)
    else:
        yield f"{location}: {problem['msg']}, but is {problem['input']!r}"


def _section_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The class of the section that a key lies in; sections may be optional."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:
            return None
        options = (field.annotation, *get_args(field.annotation))
        sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not sections:
            return None
        kind = sections[0]
    return kind
