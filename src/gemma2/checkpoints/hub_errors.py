"""What went wrong at the Hugging Face hub, in words that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gemma2.checkpoints.resolve import PUBLISHED
from gemma2.errors import DownloadError, nearest_name

_TOKENS_PAGE: Final = "https://huggingface.co/settings/tokens"
_GIVE_TOKEN: Final = f"make one at {_TOKENS_PAGE} and give it by `hf auth login`, HF_TOKEN or --token"


@dataclass(frozen=True, kw_only=True)
class HubRequest:
    """What was asked of the hub."""

    repo_id: str
    revision: str
    endpoint: str
    """The hub's address, without a slash at the end."""
    has_token: bool
    """Whether a token was sent. The token itself is kept out of here, as it must not reach an error message."""


def explain_hub_error(error: Exception, request: HubRequest) -> DownloadError:
    """Turns an error of huggingface_hub, of what it stands on, or of the disk into ours.

    Args:
        error: what was raised.
        request: what was asked for.

    Returns:
        The error to raise; its message names the repository, the reason and the remedy.
    """
    chain = list(_chain(error))
    reason = _disk(chain) or _access(chain, request) or _status(chain, request) or _connection(chain, request)
    if reason is None:
        text = " ".join(str(error).split())
        reason = f"the download failed: {type(error).__name__}{f': {text}' if text else ''}"
    return DownloadError(f"{request.repo_id}: {reason}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _disk(chain: list[BaseException]) -> str | None:
    for error in chain:
        number = error.errno if isinstance(error, OSError) else None
        # xet is written in Rust and passes the system's words on, not its number.
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return "the disk is full; make room, or name a folder on another disk, then run the same again"
        if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)):
            return f"cannot write to {getattr(error, 'filename', None) or 'the target folder'}: {_strerror(error)}"
    return None


def _strerror(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _access(chain: list[BaseException], request: HubRequest) -> str | None:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{request.endpoint}/{request.repo_id}"
    for error in chain:
        if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is a kind
            if not request.has_token:
                return (
                    f"is only for those who accepted its terms, and no token was sent. Open {page}, log in, accept "
                    f"the terms; then a token says who you are: {_GIVE_TOKEN}"
                )
            return (
                f"the account of this token has not been given access. Open {page} with that account and accept the "
                "terms; a fine-grained token also needs the right to read public gated repositories "
                f"({_TOKENS_PAGE})"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"has no revision {request.revision!r}; see {page}/commits for its branches, tags and commits"
        if isinstance(error, RepositoryNotFoundError):
            return _no_repository(request)
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return "a file went away while the repository was being fetched; run the same again"
    return None


def _no_repository(request: HubRequest) -> str:
    token = "this token may not see it" if request.has_token else f"it needs a token: {_GIVE_TOKEN}"
    return (
        f"there is no such repository at {request.endpoint}, or it is private and {token}."
        f"{nearest_name(request.repo_id, [name for name in PUBLISHED if name != request.repo_id])}"
    )


def _status(chain: list[BaseException], request: HubRequest) -> str | None:
    from huggingface_hub.errors import HfHubHTTPError

    for error in chain:
        if not isinstance(error, HfHubHTTPError) or error.response is None:
            continue
        status = error.response.status_code
        if status == 401 and not request.has_token:  # the hub tells strangers no more than this
            return _no_repository(request)
        if status == 401:
            return f"the hub does not know the token that was sent: it is mistyped, expired or revoked; {_GIVE_TOKEN}"
        if status == 403:
            return f"the token that was sent may not read it; see {_TOKENS_PAGE} for what the token is allowed"
        if status == 429:
            return "the hub asks to slow down (429, too many requests); wait some minutes, and log in if you have not"
        if status >= 500:
            return f"{request.endpoint} has trouble ({status}); run the same again later"
        return f"{request.endpoint} refuses with status {status}: {' '.join(str(error).split())}"
    return None


def _connection(chain: list[BaseException], request: HubRequest) -> str | None:
    """Known by name: which HTTP library raises them depends on the version of huggingface_hub."""
    for error in chain:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "ProxyError" in kinds:
            return f"the proxy between here and {request.endpoint} failed: {error}; see HTTPS_PROXY"
        if kinds & {
            "ConnectError",
            "ConnectTimeout",
            "ConnectionError",
            "SSLError",
            "NetworkError",
            "TimeoutException",
        }:
            return (
                f"cannot reach {request.endpoint} ({error or type(error).__name__}); see to the network and run the "
                "same again, finished files are kept"
            )
        if kinds & {"RemoteProtocolError", "ProtocolError", "ChunkedEncodingError", "ReadTimeout"}:
            return "the connection broke again and again; run the same again, finished files are kept"
        if "Consistency check failed" in str(error):
            return "a file arrived cut short; run the same again, finished files are kept"
    return None
