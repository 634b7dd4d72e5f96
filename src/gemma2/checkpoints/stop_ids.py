"""Which tokens end an answer, as a model's folder says."""

from __future__ import annotations

import json
from pathlib import Path

from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError


def generation_stop_ids(folder: Path, config: Gemma2Config) -> frozenset[int]:
    """What ends an answer by a folder's generation_config.json, or else its config.json; empty if neither says.

    Args:
        folder: of a model or an adapter.
        config: the model's architecture.

    Raises:
        CheckpointError: a file is damaged, or names a token that there is not.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        if not path.is_file():
            continue
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read as a JSON object: {error}") from None
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < config.vocab_size:
                raise CheckpointError(
                    f"{path}: eos_token_id must hold token ids from 0 to {config.vocab_size - 1}, but holds "
                    f"{token_id!r}"
                )
        return frozenset(ids)
    return frozenset()
