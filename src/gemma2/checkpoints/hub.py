"""Fetches a model from the Hugging Face hub.

Only what running needs is fetched: config.json, the safetensors of the index, the tokenizer. Files come one after the
other: one is enough to fill the line with the hub's own protocol (xet), and Ctrl-C then stops at once instead of after
the gigabytes that are under way. A connection that breaks is resumed within the file. After a stop, finished files are
kept and the unfinished one begins again, which is how huggingface_hub has it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma2.checkpoints.hub_errors import HubRequest, explain_hub_error
from gemma2.checkpoints.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TOKENIZER_FILES,
    explain_no_weights,
    readable_size,
)
from gemma2.checkpoints.resolve import PUBLISHED, SHORT_NAMES, cached_folder, repo_id_of
from gemma2.checkpoints.safetensors_format import parse_json_object
from gemma2.checkpoints.safetensors_reader import open_checkpoint, parse_index
from gemma2.config import Gemma2Config
from gemma2.errors import DownloadError, Gemma2Error, nearest_name

_FURTHER_FILES: Final = ("generation_config.json", *TOKENIZER_FILES, "README.md", "LICENSE", "NOTICE")
_TRUE: Final = ("1", "ON", "YES", "TRUE")


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Downloads a Gemma 2 from the Hugging Face hub and checks that it came whole.

    config.json is fetched and judged first, so that another kind of model is refused before its gigabytes come.
    What is there already is not fetched again. `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT` and
    `HF_HUB_OFFLINE` mean what they mean to huggingface_hub; offline, a whole copy in the cache is returned.

    Args:
        repo_id: "owner/name", or the plain name of one of Google's, such as "gemma-2-2b-it".
        revision: branch, tag or commit; None for "main".
        token: access token; None for `HF_TOKEN` or that of `hf auth login`.
        local_dir: a folder to put the files in; None for Hugging Face's cache, where other programs find them too.
        cache_dir: the cache, if not the usual one.
        progress: whether a terminal shows a bar for each file.

    Returns:
        The folder, ready for `open_checkpoint`.

    Raises:
        DownloadError: says what stands in the way and what to do.
        KeyboardInterrupt: Ctrl-C; the message says how to go on. It stays this exception, so that a caller who tries
            again on every error can still be stopped.
    """
    from huggingface_hub import get_token

    full_id = repo_id_of(repo_id.strip())
    if full_id is None:
        raise DownloadError(
            f"{repo_id!r} is no repository; those are called owner/name, like google/gemma-2-2b-it."
            + nearest_name(repo_id, (*SHORT_NAMES, *PUBLISHED))
        )
    token = (token or "").strip() or None
    request = HubRequest(
        repo_id=full_id,
        revision=revision or "main",
        endpoint=(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"),
        has_token=bool(token or get_token()),
    )
    if _is_offline():
        return _from_cache_only(request, local_dir, cache_dir)
    download = _Download(
        request=request,
        token=token,
        local_dir=None if local_dir is None else Path(local_dir).expanduser(),
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
    )
    try:
        with _progress_bars(progress):
            return download.run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped while fetching {full_id}; finished files are kept, run the same again to go on"
        ) from None
    except Gemma2Error:
        raise
    # The hub library, its HTTP client, xet and the disk each have exceptions of their own, which change by version.
    except Exception as error:
        raise explain_hub_error(error, request) from error


@dataclass(frozen=True, kw_only=True)
class _Download:
    request: HubRequest
    token: str | None
    local_dir: Path | None
    cache_dir: Path | None

    def run(self) -> Path:
        from huggingface_hub import HfApi

        repo_id, revision = self.request.repo_id, self.request.revision
        info = HfApi(endpoint=self.request.endpoint, token=self.token).model_info(
            repo_id, revision=revision, files_metadata=True
        )
        commit = info.sha
        if not commit:
            raise DownloadError(f"{repo_id}: {self.request.endpoint} does not say which commit {revision} is")
        sizes = {file.rfilename: file.lfs.size if file.lfs else file.size for file in info.siblings or ()}

        with tempfile.TemporaryDirectory(prefix="gemma2-pull-") as scratch:
            # Not yet to the user's folder, which stays untouched if the repository is refused.
            wanted = choose_files(
                repo_id, list(sizes), lambda name: self._fetch(name, commit, local_dir=Path(scratch)).read_bytes()
            )
        wanted_sizes = {name: sizes[name] for name in wanted}
        self._check_room(commit, wanted_sizes)
        for name, size in wanted_sizes.items():
            present = self._find(name, commit)
            # The library trusts a file that lies in place. One of another size was cut off by a crash.
            damaged = present is not None and size is not None and present.stat().st_size != size
            self._fetch(name, commit, local_dir=self.local_dir, again=damaged)
        if self.local_dir is None:
            # The cache notes which commit a branch is when a file is asked for by the branch. That comes last, so that
            # nothing finds the copy by its name before it is whole.
            self._fetch(CONFIG_FILE, revision, local_dir=None)
        return self._check_whole(commit, wanted_sizes)

    def _fetch(self, name: str, revision: str, *, local_dir: Path | None, again: bool = False) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self.request.repo_id,
                name,
                revision=revision,
                token=self.token,
                endpoint=self.request.endpoint,
                local_dir=local_dir,
                cache_dir=self.cache_dir,
                force_download=again,
            )
        )

    def _find(self, name: str, commit: str) -> Path | None:
        """Returns the file, if it is there from an earlier call."""
        from huggingface_hub import try_to_load_from_cache

        if self.local_dir is not None:
            path = self.local_dir / name
            return path if path.is_file() else None
        cached = try_to_load_from_cache(self.request.repo_id, name, cache_dir=self.cache_dir, revision=commit)
        return Path(cached) if isinstance(cached, str) else None

    def _check_room(self, commit: str, sizes: Mapping[str, int | None]) -> None:
        from huggingface_hub import constants

        needed = sum(size or 0 for name, size in sizes.items() if self._find(name, commit) is None)
        target = (self.local_dir or self.cache_dir or Path(constants.HF_HUB_CACHE)).absolute()
        folder = target
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DownloadError(
                f"{self.request.repo_id}: needs {readable_size(needed)} more, but {target} has {readable_size(free)} "
                "free; make room, or name a folder on another disk"
            )

    def _check_whole(self, commit: str, sizes: Mapping[str, int | None]) -> Path:
        repo_id = self.request.repo_id
        for name, size in sizes.items():
            path = self._find(name, commit)
            if path is None or size not in (None, path.stat().st_size):
                raise DownloadError(f"{repo_id}: {path or name} did not come whole; run the same again")
        config = self._find(CONFIG_FILE, commit)
        assert config is not None, "checked above"
        try:
            open_checkpoint(config.parent)
        except Gemma2Error as error:
            raise DownloadError(f"{repo_id}: came as the hub has it, but cannot be opened: {error}") from error
        return config.parent


def choose_files(repo_id: str, names: list[str], read: Callable[[str], bytes]) -> list[str]:
    """Chooses the files of a repository that make its model, and refuses a repository that is not a Gemma 2.

    Args:
        repo_id: what to call the repository in errors.
        names: all its files, with their folders. What lies in a folder is left: other formats and old runs.
        read: gives the contents of a small file; asked for config.json and the index only.

    Returns:
        The small files, then the weights.

    Raises:
        DownloadError: there are no weights that can be read, or config.json is not that of a Gemma 2.
    """
    if SINGLE_FILE not in names and INDEX_FILE not in names:
        raise DownloadError(f"{repo_id}: {explain_no_weights(names)}")
    if CONFIG_FILE not in names:
        raise DownloadError(f"{repo_id}: has no {CONFIG_FILE}, so nothing says which model its weights are")
    chosen = [CONFIG_FILE, *(name for name in _FURTHER_FILES if name in names)]
    try:
        Gemma2Config.from_dict(parse_json_object(read(CONFIG_FILE)), source=CONFIG_FILE)
        if INDEX_FILE not in names:
            return [*chosen, SINGLE_FILE]
        shards = list(dict.fromkeys(parse_index(read(INDEX_FILE), INDEX_FILE).values()))
    except ValueError as error:  # ours, which are ValueErrors too, and JSON's
        raise DownloadError(f"{repo_id}: is not a Gemma 2 that can be read: {error}") from error
    if absent := [name for name in shards if name not in names]:
        raise DownloadError(f"{repo_id}: {INDEX_FILE} names {absent[0]}, which the repository does not have")
    return [*chosen, INDEX_FILE, *shards]


def _from_cache_only(request: HubRequest, local_dir: str | Path | None, cache_dir: str | Path | None) -> Path:
    if local_dir is None:
        folder = cached_folder(request.repo_id, revision=request.revision, cache_dir=cache_dir)
        if folder is not None:
            try:
                open_checkpoint(folder)
            except Gemma2Error as error:
                raise DownloadError(
                    f"{request.repo_id}: the copy on this machine is not whole ({error}), and HF_HUB_OFFLINE is set; "
                    "unset it to fetch the rest"
                ) from error
            return folder
    raise DownloadError(
        f"{request.repo_id}: cannot be fetched, as HF_HUB_OFFLINE is set; unset it, or copy the model's folder from "
        "another machine and give its path"
    )


def _is_offline() -> bool:
    # At each call, and not only when huggingface_hub was imported: notebooks set the variable later.
    from huggingface_hub import constants

    variables = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in _TRUE for value in variables) or bool(constants.HF_HUB_OFFLINE)


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
