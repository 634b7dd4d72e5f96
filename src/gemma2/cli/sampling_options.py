"""The options that say how tokens are drawn, for every verb that generates.

Each has one reader, from what a user types to a checked value: for the command line and for the chat's /set.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gemma2.errors import SamplingError, nearest_name

DEFAULTS: Final[Mapping[str, Any]] = {"temperature": 0.8, "top_p": 0.95}
"""What differs here from `SamplingParams`: small models wander at temperature 1."""
DEFAULT_MAX_TOKENS: Final = 200
"""For the continuation of a text, which has no end of its own. An answer of a chat-tuned model has one."""

_NONE: Final = ("none", "off")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_ESCAPE: Final = re.compile(r"\\(?:([ntr\\])|u([0-9a-fA-F]{4}))")
_UNSET: Final = object()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How the values of an option are written."""

    metavar: str
    expected: str
    """For errors: "temperature must be …"."""
    read: Callable[[str], Any]
    """Raises `ValueError` if the text is no such value."""


@dataclass(frozen=True)
class SamplingOption:
    """One field of `SamplingParams`, as users meet it."""

    kind: Kind
    help: str


def read_escapes(text: str) -> str:
    """Replaces \\n, \\t, \\r, \\\\ and \\uXXXX; any other backslash stays one."""
    return _ESCAPE.sub(lambda match: _ESCAPES[match[1]] if match[1] else chr(int(match[2], 16)), text)


def _read_whole_number(text: str) -> int | None:
    return None if text.lower() in _NONE else int(text)


def _read_switch(text: str) -> bool:
    if text.lower() not in ("on", "off"):
        raise ValueError
    return text.lower() == "on"


def _read_stop(text: str) -> tuple[Any, ...]:
    if text.lower() in _NONE:
        return ()
    return tuple(json.loads(text)) if text.startswith("[") else (read_escapes(text),)


def _read_token_ids(text: str) -> tuple[int, ...]:
    return () if text.lower() in _NONE else tuple(int(part) for part in text.split(","))


_NUMBER: Final = Kind(metavar="X", expected="a number", read=float)
_WHOLE: Final = Kind(metavar="N", expected="a whole number, or none", read=_read_whole_number)
_SWITCH: Final = Kind(metavar="on|off", expected="on or off", read=_read_switch)
_STOP: Final = Kind(metavar="TEXT", expected='a text, a list like ["one", "two"], or none', read=_read_stop)
_IDS: Final = Kind(metavar="IDS", expected="token ids with commas between, or none", read=_read_token_ids)

SAMPLING_OPTIONS: Final[Mapping[str, SamplingOption]] = {
    "temperature": SamplingOption(
        _NUMBER, f"0 always takes the likeliest token (default: {DEFAULTS['temperature']:g})"
    ),
    "top_k": SamplingOption(_WHOLE, "draw from the N likeliest tokens only (default: none)"),
    "top_p": SamplingOption(
        _NUMBER, f"draw from the likeliest tokens that together reach this (default: {DEFAULTS['top_p']:g})"
    ),
    "min_p": SamplingOption(_NUMBER, "draw only tokens this fraction as likely as the likeliest (default: 0, off)"),
    "repetition_penalty": SamplingOption(_NUMBER, "above 1, tokens come again less likely (default: 1, off)"),
    "seed": SamplingOption(_WHOLE, "the same seed gives the same text (default: none, a random one)"),
    "max_tokens": SamplingOption(_WHOLE, "the most tokens; none: up to the context's end"),
    "stop": SamplingOption(_STOP, "end before this text; \\n, \\t, \\r, \\\\ and \\uXXXX are understood"),
    "stop_token_ids": SamplingOption(_IDS, "end at one of these tokens, like 109,110"),
    "ignore_eos": SamplingOption(_SWITCH, "go on after the model's own end of the text"),
    "logprobs": SamplingOption(_WHOLE, "report log-probabilities: of each token, and of the N likeliest, 0 to 20"),
}
"""Every field of `SamplingParams`, in the order in which they are listed."""


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, default_max_tokens: str, without: Collection[str] = ()
) -> None:
    """Declares the sampling options; `given_sampling` collects what they were given.

    Args:
        parser: the verb's.
        default_max_tokens: what --help says of it.
        without: options that the verb does not have.
    """
    group = parser.add_argument_group("sampling")
    for name, option in SAMPLING_OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        if name in without:
            continue
        if name == "ignore_eos":
            group.add_argument(flag, action="store_const", const=True, default=_UNSET, help=option.help)
        elif name == "stop":
            group.add_argument(
                flag,
                metavar=option.kind.metavar,
                action="append",
                type=_argument_type(name),
                help=f"{option.help}; may be given several times",
            )
        else:
            default = f" (default: {default_max_tokens})" if name == "max_tokens" else ""
            group.add_argument(
                flag,
                metavar=option.kind.metavar,
                type=_argument_type(name),
                default=_UNSET,
                help=option.help + default,
            )


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the sampling options that the command line gives, by their names in `SamplingParams`."""
    given = {name: getattr(args, name) for name in SAMPLING_OPTIONS if getattr(args, name, _UNSET) is not _UNSET}
    given["stop"] = tuple(text for texts in given["stop"] or () for text in texts)
    return given


def find_option(name: str, *, without: Collection[str] = ()) -> str:
    """Returns the field of `SamplingParams` that a user means.

    Args:
        name: with - or _ between its words.
        without: options that there are not.

    Raises:
        SamplingError: there is no such option; the nearest is offered.
    """
    field = name.lstrip("-").replace("-", "_").lower()
    known = [option for option in SAMPLING_OPTIONS if option not in without]
    if field not in known:
        hint = nearest_name(field, known) or f" They are {', '.join(known)}."
        raise SamplingError(f"there is no sampling option {name!r}.{hint}")
    return field


def parse_setting(field: str, text: str) -> Any:
    """Reads and checks the value of a sampling option, as a user writes it.

    Raises:
        SamplingError: it is no such value, or out of range.
    """
    from gemma2.sampling import SamplingParams

    kind = SAMPLING_OPTIONS[field].kind
    try:
        value = kind.read(text)
    except ValueError:
        raise SamplingError(f"{field} must be {kind.expected}, but is {text!r}") from None
    return getattr(SamplingParams(**{field: value}), field)


def format_setting(value: object) -> str:
    """Writes a value as `parse_setting` reads it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        strings = all(isinstance(item, str) for item in value)
        return json.dumps(value, ensure_ascii=False) if strings else ",".join(map(str, value))
    return str(value)


def _argument_type(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            # A list of stop texts is written as several options, so that "[" and "none" are texts like any other.
            return parse_setting(name, json.dumps([read_escapes(text)]) if name == "stop" else text)
        except SamplingError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse
