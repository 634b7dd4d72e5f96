"""Where this package keeps what it can make again: the root of its cache.

Whoever keeps something there has a folder of its own under the root, with a name that says what it is, and can do
without it: a cache may be missing, full, damaged or forbidden at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the folder that GEMMA2_CACHE names, or else `gemma2` in the user's cache folder; it need not exist.

    The user's cache folder is $XDG_CACHE_HOME, or ~/.cache (XDG Base Directory Specification 0.8).

    Raises:
        OSError: no variable names a folder and the user has no home.
    """
    named = os.environ.get("GEMMA2_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if named:
            return Path(named).expanduser()
        if os.path.isabs(base):  # the specification: others must be ignored
            return Path(base) / "gemma2"
        return Path.home() / ".cache" / "gemma2"
    except RuntimeError as error:
        raise OSError(f"there is no folder for a cache: {error}; GEMMA2_CACHE can name one") from None
