"""From what a user calls a model to its folder on this machine: a path, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from gemma2.checkpoints.layout import CONFIG_FILE
from gemma2.checkpoints.packed_folder import is_packed, open_packed
from gemma2.checkpoints.safetensors_reader import open_checkpoint
from gemma2.errors import CheckpointError, Gemma2Error, nearest_name

PUBLISHED: Final = (
    "google/gemma-2-2b",
    "google/gemma-2-2b-it",
    "google/gemma-2-2b-jpn-it",
    "google/gemma-2-9b",
    "google/gemma-2-9b-it",
    "google/gemma-2-27b",
    "google/gemma-2-27b-it",
)
"""Google's Gemma 2 repositories on the hub."""

SHORT_NAMES: Final[Mapping[str, str]] = MappingProxyType({name.removeprefix("google/"): name for name in PUBLISHED})
"""The part after the slash names one of Google's by itself: "gemma-2-2b-it"."""

_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve_model(
    name_or_path: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Finds the folder of a model that is on this machine; never uses the network.

    Args:
        name_or_path: a path, which is returned as it is if it exists; else a repository on the hub ("owner/name", or
            the plain name of one of Google's), which is looked up in Hugging Face's cache.
        revision: branch, tag or commit of the repository; None for "main".
        cache_dir: the cache, if not the usual one (`HF_HUB_CACHE`, `HF_HOME`).

    Returns:
        The folder, or the file that was named.

    Raises:
        CheckpointError: there is neither, or the cached copy is not whole; says which command fetches it.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name and path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{path}: is on this machine and has no revision {revision!r}; leave the revision out"
            )
        return path
    repo_id = repo_id_of(name)
    if repo_id is None:
        raise CheckpointError(
            f"{name or 'an empty name'}: there is no such folder, and models on the hub are called owner/name, like "
            f"google/gemma-2-2b-it.{nearest_name(name, (*SHORT_NAMES, *PUBLISHED))}"
        )
    command = f"gemma2 pull {repo_id}" + (f" --revision {revision}" if revision else "")
    folder = cached_folder(repo_id, revision=revision, cache_dir=cache_dir)
    if folder is None:
        hint = "" if repo_id in PUBLISHED else nearest_name(repo_id, PUBLISHED)
        raise CheckpointError(
            f"{name}: there is no such folder, and no copy of the hub's {repo_id} on this machine; fetch it with "
            f"`{command}`.{hint}"
        )
    try:
        open_packed(folder) if is_packed(folder) else open_checkpoint(folder)
    except Gemma2Error as error:
        raise CheckpointError(f"{repo_id}: the copy on this machine is not whole: {error}. Try `{command}`") from error
    return folder


def repo_id_of(name: str) -> str | None:
    """Returns the hub's "owner/name" for it or for one of `SHORT_NAMES`; None if it is neither."""
    repo_id = SHORT_NAMES.get(name, name)
    return repo_id if _REPO_ID.fullmatch(repo_id) else None


def cached_folder(repo_id: str, *, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Returns the folder of a repository in Hugging Face's cache, whole or not; None if it has none."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, CONFIG_FILE, cache_dir=cache_dir, revision=revision)
    return Path(config).parent if isinstance(config, str) else None
