"""What is said when a run of several processes fails: once, by one of them, and by the one that knows why."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from gemma2.errors import Gemma2Error


class OtherProcessError(Gemma2Error):
    """This process ended because of another one, which says why; or says the same as another one has said."""


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets processes that fail alike speak once, and those whose neighbours are gone keep silent about it.

    Raises:
        OtherProcessError: in place of an error that another process reports; its message is empty where nothing is to
            be added.
    """
    try:
        yield
    except Gemma2Error as error:
        if _was_said(str(error)):
            raise OtherProcessError("") from error
        raise
    except RuntimeError as error:
        if is_lost_connection(error):
            message = "another process of this run ended; its message says why, unless it was killed"
            raise OtherProcessError("" if _was_said(message) else message) from error
        raise


def is_lost_connection(error: Exception) -> bool:
    """Whether gloo or NCCL says, in many words, that a connection was closed or that a neighbour did not answer."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _was_said(message: str) -> bool:
    """Whether another process has said this; notes that this one does. The store outlives any process of the run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return os.environ.get("RANK", "0") != "0"
    with suppress(Exception):
        store = torch.distributed.distributed_c10d._get_default_store()
        return int(store.add("gemma2/said/" + hashlib.sha256(message.encode()).hexdigest(), 1)) > 1
    return False
