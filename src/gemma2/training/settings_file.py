"""Reading a settings file: YAML with sections, checked as a whole, every mistake reported at once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gemma2.errors import ConfigError, nearest_name

_is_reading: ContextVar[bool] = ContextVar("_is_reading", default=False)
"""Whether a whole file is read, whose misfits are gathered afterwards."""


class Section(BaseModel):
    """A section of a settings file: no unknown keys, nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def misfits(self) -> Iterator[str]:
        """Gives a sentence for each set of values that do not go together."""
        return iter(())

    @model_validator(mode="after")
    def _fitting(self) -> Section:
        if not _is_reading.get() and (sentences := list(self.misfits())):
            raise ValueError(" | ".join(sentences))
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
    token = _is_reading.set(True)
    try:
        settings, problems = _validated(kind, values)
    finally:
        _is_reading.reset(token)
    if settings is not None and not problems:
        return settings
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    raise ConfigError(f"{path}: {count}: " + " | ".join(problems))


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


def _validated(kind: type[Settings], values: dict[str, Any]) -> tuple[Settings | None, list[str]]:
    """Makes settings of values, and describes what is wrong with them.

    What does not go together is looked for in what is left without the wrong values. What is said there of a value that
    was wrong, or that its section lacks it, is not passed on: it would tell the same mistake in other words.
    """
    settings: Settings | None = None
    wrong: list[Any] = []
    try:
        settings = kind.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()
        rest = copy.deepcopy(values)
        for problem in wrong:
            _remove(rest, problem["loc"])
        with contextlib.suppress(ValidationError):
            settings = kind.model_validate(rest)
    problems = [_describe(kind, problem) for problem in wrong]
    known = [problem["loc"] for problem in wrong if problem["type"] != "extra_forbidden"]
    for section, sentence in () if settings is None else _misfits(settings):
        names = [".".join(map(str, location)) for location in known]
        if not any(location[:-1] == section != () for location in known) and not any(n in sentence for n in names):
            problems.append(f"{'.'.join(section)}: {sentence}" if section else sentence)
    return settings, problems


def _misfits(section: Section, location: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where something does not go together, and what, in a section and all below it."""
    for name in type(section).model_fields:
        below = getattr(section, name)
        if isinstance(below, Section):
            yield from _misfits(below, (*location, name))
    yield from ((location, sentence) for sentence in section.misfits())


def _remove(values: Any, location: tuple[int | str, ...]) -> None:
    *sections, last = location
    for part in sections:
        values = values.get(part) if isinstance(values, dict) else None
    if isinstance(values, dict):
        values.pop(last, None)


def _describe(kind: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = _section_at(kind, problem["loc"][:-1])
        hint = nearest_name(str(problem["loc"][-1]), section.model_fields) if section else ""
        return f"{location}: there is no such setting.{hint}"
    if problem["type"] == "missing":
        return f"{location}: is needed, but is not there"
    if problem["type"] == "value_error":
        return f"{location}: {problem['ctx']['error']}" if location else str(problem["ctx"]["error"])
    return f"{location}: {problem['msg']}, but is {problem['input']!r}"


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
