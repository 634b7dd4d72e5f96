"""The exceptions that a user of gemma2 can meet. Every one is a mistake that the user can mend.

An error says what was needed, what came, and what to do. The command line prints it as one line and exits
with a non-zero status; a library caller catches `Gemma2Error`. Our own broken invariants are `assert`s, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Gemma2Error(ValueError):
    """Base of all errors that a caller can mend. A `ValueError`, as the message is about a value that came in."""


class ConfigError(Gemma2Error):
    """An architecture or a settings file that does not make sense."""


class CheckpointError(Gemma2Error):
    """A model folder or file that is missing, incomplete, damaged or does not fit the architecture."""


class TokenizerError(Gemma2Error):
    """A tokenizer file that cannot be read, or that does not fit the model."""


class ChatFormatError(Gemma2Error):
    """Messages that the chat format cannot express: wrong roles, wrong order, system text in strict mode."""


class ContextLengthError(Gemma2Error):
    """A prompt, or a prompt and the tokens asked for, that is longer than the model's context."""


class KVCacheFullError(Gemma2Error):
    """A step that needs more memory for keys and values than the cache may take."""


class SamplingError(Gemma2Error):
    """Sampling parameters out of range."""


class DataError(Gemma2Error):
    """Training data that cannot be read: names the file and, where there is one, the line."""


class DownloadError(Gemma2Error):
    """A download that cannot go on: no network, no access, no such repository."""


class MissingDependencyError(Gemma2Error):
    """A library that this feature needs is not installed; the message names the command that installs it."""


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest of `known` to `name`, or an empty string if none is near.

    Args:
        name: what was given.
        known: what there is.
        cutoff: how much alike they must be, from 0 to 1; more than usual where `known` was not made to be like `name`.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""
