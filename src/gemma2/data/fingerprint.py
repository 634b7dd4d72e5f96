"""What a loader's state must share with the loader that goes on from it."""

from __future__ import annotations

import json
from itertools import chain, zip_longest
from typing import Any, Final

from gemma2.errors import DataError

TOKENIZER_PROBE: Final = "The quick brown fox\r\njumps over 42 lazy dogs;\n\n\tça va, Οδυσσεύς? 漢字 🦊"
"""A text whose ids tell tokenizers apart."""

_SPEAKS_FOR_ITSELF: Final = ("tokenizer", "contents")
"""Ids of a sample text, and hashes, would tell a reader nothing."""


def check_same_fingerprint(saved: str, own: str) -> None:
    """Checks that a state was saved with the same settings, files and tokenizer.

    Args:
        saved: the state's fingerprint, a JSON object.
        own: the loader's; "files" in it is a list of lists of files, "tokenizer" the ids of `TOKENIZER_PROBE`.

    Raises:
        DataError: they differ; says where first.
        ValueError: `saved` is not JSON.
    """
    then, now = json.loads(saved), json.loads(own)
    for name, value in now.items():
        if then.get(name) != value:
            raise DataError(
                f"the loader cannot go on: {name} changed{_was_and_is(name, then.get(name), value)}. Resume with"
                " the settings, files and tokenizer that the state was saved with, or begin anew without it"
            )


def _was_and_is(name: str, was: Any, now: Any) -> str:
    if name in _SPEAKS_FOR_ITSELF:
        return ""
    if name == "files" and was is not None:
        lists = zip_longest(chain(*was), chain(*now))
        was, now = next(((before, after) for before, after in lists if before != after), (len(was), len(now)))
    return f": it was {was!r} and is {now!r}"
