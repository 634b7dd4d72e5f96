"""The folder of a training run: who is at work in it, with which settings, and where a resumed run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml
from filelock import FileLock, Timeout

from gemma2.distributed import ONE_PROCESS, Ranks
from gemma2.errors import ConfigError
from gemma2.training.run_state import list_run_states, load_run_state
from gemma2.training.settings_file import Section, differences

FREE_TO_CHANGE: Final[Mapping[str, tuple[str, ...] | None]] = {
    "output": None,
    "parallel": None,
    "run": (
        "log_every",
        "validate_every",
        "validate_first",
        "checkpoint_every",
        "checkpoints_to_keep",
        "early_stopping_patience",
        "keep_best",
        "tensorboard",
        "save_dtype",
        "num_threads",
        "device",
        "micro_batch_size",
        "gradient_checkpointing",
    ),
    "data": ("on_error",),
    "text": ("on_error",),
    "examples": ("on_error",),
}
"""Settings that a resumed run need not share. Another device, number of threads or processes, or micro batch
changes how sums are rounded, so the weights are then not the very same ones."""


class RunFolder:
    """A run's folder.

    Args:
        path: the folder; it need not exist.
        settings: of the run that is to begin or go on.
        ranks: the processes, all of which see this folder; the first one writes to it.
    """

    def __init__(self, path: Path, settings: Section, ranks: Ranks = ONE_PROCESS) -> None:
        self.path = path
        self.ranks = ranks
        self.checkpoints = path / "checkpoints"
        self._settings = settings

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        return _what_must_stay(self._settings.model_dump(mode="json"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it.

        Raises:
            ConfigError: another run is at work in it.
        """
        lock = FileLock(self.path / ".lock")

        def acquire() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ConfigError(
                    f"{self.path} is in use by another run; wait for it, or give another output folder"
                ) from None

        self.ranks.first_does(acquire)
        try:
            yield
        finally:
            lock.release()

    def last_state(self) -> tuple[str, dict[str, Any]] | None:
        """Returns name and contents of the newest checkpoint, or None if there is none; see `load_run_state`.

        Raises:
            ConfigError: it is of a run with other settings.
            CheckpointError: it cannot be read.
        """
        newest = self._newest()
        if newest is None:
            return None
        state = load_run_state(newest, ranks=self.ranks)
        self._check(state)
        return newest.name, state

    def check(self) -> None:
        """Refuses what `last_state` refuses, without reading tensors.

        Raises:
            ConfigError: it is of a run with other settings.
            CheckpointError: it cannot be read.
        """
        newest = self._newest()
        if newest is not None:
            self._check(load_run_state(newest, ranks=self.ranks, mapped=True))

    def _newest(self) -> Path | None:
        return self.ranks.first_does(lambda: next(reversed(list_run_states(self.checkpoints)), None))

    def _check(self, state: dict[str, Any]) -> None:
        if changed := differences(_what_must_stay(state["fingerprint"]), self.fingerprint):
            raise ConfigError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}); "
                f"put them back to resume it, or give another output folder"
            )

    def write_settings(self) -> None:
        """Writes all settings, defaults too, to settings.yaml."""
        if not self.ranks.is_first:
            return
        path = self.path / "settings.yaml"
        beside = path.with_name(path.name + ".partial")
        beside.write_text(yaml.safe_dump(self._settings.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        beside.replace(path)


def _what_must_stay(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those of `FREE_TO_CHANGE`; what an older version wrote down may hold more of them."""
    kept = {section: values for section, values in settings.items() if FREE_TO_CHANGE.get(section, ()) is not None}
    for section, names in FREE_TO_CHANGE.items():
        if names is not None and kept.get(section):
            kept[section] = {name: value for name, value in kept[section].items() if name not in names}
    return kept
