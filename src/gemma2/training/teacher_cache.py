"""A teacher's words on disk: written once by `gemma2 distill cache`, read by as many runs as one likes.

For each token that is trained, in the order in which a run's loader gives them, the K most probable words, their
log-probabilities, and the probability of all others together (see `TeacherTopK`). A cache is a folder:

    cache.json                 what it is of: settings of the data, the teacher, K, temperature, words, steps
    steps-00000000.safetensors steps 0 … 15, and so on: arrays, and hashes of the batches that they belong to

A file is written beside and renamed, every two minutes while it grows, and the numbers in it carry a checksum. So a
cache that was cut short goes on with the next step, one that belongs to other batches is refused, and what was damaged
is written anew.

A token takes K · (2 or 4 bytes for the word, 2 for its log-probability) + 4 bytes: 4 bytes a word up to 65,536 words.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemma2.data import IGNORED_LABEL, PackedBatch
from gemma2.errors import CheckpointError, ConfigError
from gemma2.training.distillation import TeacherLogits, TeacherTopK, most_probable
from gemma2.training.loop import Loader
from gemma2.training.objectives import Batch
from gemma2.training.settings_file import differences

STEPS_PER_FILE: Final = 16
_SECONDS_BETWEEN_WRITES: Final = 120.0
_VERSION: Final = 2
_NUM_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_INFO_FILE: Final = "cache.json"


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What a cache is of."""

    identity: dict[str, Any]
    """Teacher (see `teacher_fingerprint`) and data, as settings have them; whoever reads it must have the same."""
    vocab_size: int
    top_k: int
    temperature: float
    num_steps: int

    @property
    def bytes_per_token(self) -> int:
        """Size of what is kept of a token, in bytes."""
        return self.top_k * (_id_dtype(self.vocab_size).itemsize + 2) + 4

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "version": _VERSION,
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "num_steps": self.num_steps,
        }


_Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Ids (T, K) int64, log-probabilities (T, K) and the others' probability (T,) at the T trained tokens of a step."""


def teacher_fingerprint(files: Sequence[Path]) -> str:
    """Tells one teacher's weights from another's, wherever they lie: a hash of sizes and of samples of what they hold.

    A teacher that was trained on has other numbers in every tensor, so 64 pieces of 4 KB of each file tell as much as
    all of its gigabytes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    hashed = xxhash.xxh3_128()
    try:
        for path in sorted(files, key=lambda path: path.name):
            size = path.stat().st_size
            hashed.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                for part in range(_NUM_SAMPLES):
                    file.seek(part * max(size - _SAMPLE_BYTES, 0) // (_NUM_SAMPLES - 1))
                    hashed.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hashed.hexdigest()


def write_teacher_cache(
    folder: Path,
    info: CacheInfo,
    loader: Loader,
    teacher: Callable[[Batch], TeacherLogits],
    *,
    device: torch.device,
    on_step: Callable[[int, int], None] = lambda step, num_tokens: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Writes a cache, or goes on where an earlier call ended; what is there is checked, and a damaged file made anew.

    Args:
        folder: of the cache.
        info: what it is of. A cache of fewer steps is made longer.
        loader: the batches of the run that will read it, from the first.
        teacher: whose words.
        device: where the teacher runs.
        on_step: is told of each step that is done: how many so far, and how many tokens it had (0 if it was there).
        should_stop: asked after each step.

    Returns:
        Whether it is whole.

    Raises:
        ConfigError: the folder holds a cache of something else, or another process is writing it.
        CheckpointError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _describe(folder, info)
            for first in range(0, info.num_steps, STEPS_PER_FILE):
                last = min(first + STEPS_PER_FILE, info.num_steps)
                if not _write_steps(folder, info, range(first, last), loader, teacher, device, on_step, should_stop):
                    return False
    except OSError as error:
        raise CheckpointError(f"{folder}: the cache cannot be written: {error.strerror or error}") from error
    return True


def _write_steps(
    folder: Path,
    info: CacheInfo,
    steps: range,
    loader: Loader,
    teacher: Callable[[Batch], TeacherLogits],
    device: torch.device,
    on_step: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Writes one file, or what it lacks; returns whether all of its steps are there."""
    file = _file(folder, steps.start)
    parts = _kept_words(file, info)
    num_kept = 0 if parts is None else len(parts[0])
    hashes, words = ([], []) if parts is None else parts
    written = time.monotonic()
    for index, step in enumerate(steps):
        packed = next(loader)
        if index < num_kept:
            if hashes[index] != _hash(packed):
                raise _other_batch(file, step)
            on_step(step + 1, 0)
        else:
            hashes.append(_hash(packed))
            words.append(_words_of(packed, teacher, info, device))
            on_step(step + 1, packed.num_tokens)
        is_last, must_stop = step == steps[-1], should_stop()
        is_due = time.monotonic() > written + _SECONDS_BETWEEN_WRITES
        if index >= num_kept and (is_last or must_stop or is_due):
            _write(file, _pack(hashes, words))
            written = time.monotonic()
        if must_stop and not (is_last and step + 1 == info.num_steps):
            return False
    return True


def _kept_words(file: Path, info: CacheInfo) -> tuple[list[int], list[_Words]] | None:
    """Hashes and words of the steps that a file holds; None if it is not there, or damaged."""
    if not file.exists():
        return None
    try:
        arrays = _unpack(file, info)
    except CheckpointError:
        return None
    starts = arrays["starts"]
    columns = (torch.from_numpy(arrays[name]) for name in ("ids", "log_probs", "rest"))
    ids, log_probs, rest = (torch.split(column, np.diff(starts).tolist()) for column in columns)
    words = [(i.long(), p.float(), r) for i, p, r in zip(ids, log_probs, rest, strict=True)]
    return [int(value) for value in arrays["hashes"]], words


class TeacherCache:
    """A cache that is read in the order in which it was written.

    Args:
        folder: that `write_teacher_cache` wrote.
        identity: teacher and data of the run that reads.
        vocab_size: the student's, and so the teacher's.
        temperature: that the run's divergence has.
        num_steps: how many steps the run takes.

    Raises:
        ConfigError: it is of other data, another teacher or temperature, or ends too early.
        CheckpointError: it is not there, cut short or not whole. Checksums are looked at when a file is read.
    """

    def __init__(
        self, folder: Path, *, identity: dict[str, Any], vocab_size: int, temperature: float, num_steps: int
    ) -> None:
        self.info = _read_info(folder)
        asked = {"identity": identity, "vocab_size": vocab_size, "temperature": temperature}
        _check_same(folder, self.info, asked)
        if num_steps > self.info.num_steps:
            raise ConfigError(
                f"{folder}: holds {self.info.num_steps} steps, but the run takes {num_steps}; `gemma2 distill cache` "
                "with this run's settings makes it longer"
            )
        firsts = range(0, num_steps, STEPS_PER_FILE)
        short = [
            first for first in firsts if _num_steps_in(_file(folder, first)) < min(STEPS_PER_FILE, num_steps - first)
        ]
        if short:
            raise CheckpointError(
                f"{folder}: is not whole, from step {short[0]} on; `gemma2 distill cache` goes on writing it"
            )
        self._folder = folder
        self._held: tuple[int, dict[str, npt.NDArray[Any]]] | None = None

    def words(self, step: int, packed: PackedBatch) -> TeacherTopK:
        """What the teacher says at the trained tokens of a step's batch, spread over all its places.

        Args:
            step: from 0.
            packed: the batch that the run's loader gave.

        Raises:
            CheckpointError: the cache is damaged, or the batch is another one than it was written for.
        """
        first = step - step % STEPS_PER_FILE
        if self._held is None or self._held[0] != first:
            self._held = (first, _unpack(_file(self._folder, first), self.info))
        arrays = self._held[1]
        index = step - first
        if int(arrays["hashes"][index]) != _hash(packed):
            raise _other_batch(_file(self._folder, first), step)
        rows = slice(int(arrays["starts"][index]), int(arrays["starts"][index + 1]))
        trained = torch.from_numpy((packed.labels != IGNORED_LABEL).reshape(-1))
        num_places, top_k = trained.numel(), self.info.top_k
        ids = torch.zeros((num_places, top_k), dtype=torch.int64)
        log_probs = torch.zeros((num_places, top_k))
        rest = torch.zeros(num_places)
        ids[trained] = torch.from_numpy(arrays["ids"][rows].astype(np.int64))
        log_probs[trained] = torch.from_numpy(arrays["log_probs"][rows].astype(np.float32))
        rest[trained] = torch.from_numpy(arrays["rest"][rows])
        return TeacherTopK(ids_TK=ids, log_probs_TK=log_probs, rest_T=rest)


class CachedTeacher:
    """Batches of a loader, and for each of them what a cache says.

    The objective is asked once for each micro-batch of a step, in the order of the rows; so this both passes on the
    loader's batches and remembers which of their rows come next.

    Args:
        loader: that the cache was written with.
        cache: the cache.
        rank: this process among `world_size`; it takes its share of each batch's rows. The loader gives all of them.
        world_size: how many processes share each batch.
    """

    def __init__(self, loader: Loader, cache: TeacherCache, *, rank: int = 0, world_size: int = 1) -> None:
        self._loader = loader
        self._cache = cache
        self._rank, self._world_size = rank, world_size
        self._step = 0
        self._packed: PackedBatch | None = None
        self._words: TeacherTopK | None = None
        self._row = 0

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        packed = next(self._loader)
        self._words = self._cache.words(self._step, packed)
        num_rows = len(packed.input_ids) // self._world_size
        self._packed, self._row = packed, self._rank * num_rows
        self._step += 1
        return packed.rows(self._row, self._row + num_rows)

    def state_dict(self) -> dict[str, Any]:
        """The loader's state and the number of batches."""
        return {**self._loader.state_dict(), "cached_steps": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        self._step = int(state["cached_steps"])
        self._loader.load_state_dict({name: value for name, value in state.items() if name != "cached_steps"})

    def __call__(self, batch: Batch) -> TeacherTopK:
        """What the teacher says at each place of the next rows of the batch that was given last."""
        assert self._packed is not None and self._words is not None
        num_rows, length = batch.input_ids.shape
        rows = slice(self._row, self._row + num_rows)
        assert np.array_equal(batch.input_ids.cpu().numpy(), self._packed.input_ids[rows]), "rows come in order"
        self._row += num_rows
        places, device = slice(rows.start * length, rows.stop * length), batch.input_ids.device
        words = self._words
        return TeacherTopK(
            ids_TK=words.ids_TK[places].to(device),
            log_probs_TK=words.log_probs_TK[places].to(device),
            rest_T=words.rest_T[places].to(device),
        )


# -- files ----------------------------------------------------------------------------------------------------------


def _words_of(
    packed: PackedBatch, teacher: Callable[[Batch], TeacherLogits], info: CacheInfo, device: torch.device
) -> _Words:
    """Row by row, so that no more of the teacher than one row is in memory."""
    parts = []
    batch = Batch.on_device(packed, device)
    for row in range(len(packed.input_ids)):
        one = batch.rows(row, row + 1)
        places = (one.labels.flatten() != IGNORED_LABEL).nonzero()[:, 0]
        if len(places):
            parts.append(
                most_probable(
                    teacher(one), places, info.top_k, vocab_size=info.vocab_size, temperature=info.temperature
                )
            )
    if not parts:
        empty = torch.zeros((0, info.top_k))
        return empty.long(), empty, torch.zeros(0)
    ids, log_probs, rest = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return ids, log_probs, rest


def _pack(hashes: list[int], parts: list[_Words]) -> bytes:
    starts = np.cumsum([0, *(len(ids) for ids, _, _ in parts)], dtype=np.int64)
    ids = np.concatenate([ids.numpy() for ids, _, _ in parts])
    largest = int(ids.max(initial=0))
    arrays = {
        "hashes": np.array(hashes, dtype=np.uint64),
        "starts": starts,
        "ids": ids.astype(_id_dtype(largest + 1)),
        "log_probs": np.concatenate([log_probs.numpy() for _, log_probs, _ in parts]).astype(np.float16),
        "rest": np.concatenate([rest.numpy() for _, _, rest in parts]).astype(np.float32),
    }
    return save(arrays, metadata={"checksum": _checksum(arrays)})


def _unpack(file: Path, info: CacheInfo) -> dict[str, npt.NDArray[Any]]:
    try:
        with safe_open(str(file), framework="numpy") as held:
            arrays = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
            checksum = (held.metadata() or {}).get("checksum")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); `gemma2 distill cache` writes it anew") from error
    if checksum != _checksum(arrays):
        raise CheckpointError(f"{file}: is damaged: its checksum is another one; `gemma2 distill cache` writes it anew")
    if arrays["ids"].shape[1] != info.top_k:
        raise CheckpointError(
            f"{file}: holds {arrays['ids'].shape[1]} words a token, but {_INFO_FILE} says {info.top_k}; write the "
            "cache into another folder"
        )
    return arrays


def _num_steps_in(file: Path) -> int:
    """How many steps a file holds, by its header; 0 if there is none, or it was cut short."""
    try:
        with safe_open(str(file), framework="numpy") as held:
            return int(held.get_slice("hashes").get_shape()[0])
    except (OSError, SafetensorError):
        return 0


def _other_batch(file: Path, step: int) -> CheckpointError:
    return CheckpointError(
        f"{file}: step {step} was written for another batch; were files, tokenizer or settings of the data changed? "
        "Write the cache into another folder"
    )


def _checksum(arrays: dict[str, npt.NDArray[Any]]) -> str:
    hashed = xxhash.xxh3_128()
    for name in sorted(arrays):
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return hashed.hexdigest()


def _hash(packed: PackedBatch) -> int:
    hashed = xxhash.xxh3_64()
    for array in (packed.input_ids, packed.labels, packed.segment_ids):
        hashed.update(np.ascontiguousarray(array).data.cast("B"))
    return hashed.intdigest()


def _id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _file(folder: Path, first_step: int) -> Path:
    return folder / f"steps-{first_step:08d}.safetensors"


def _write(path: Path, contents: bytes) -> None:
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder}: another process is writing this cache; wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _describe(folder: Path, info: CacheInfo) -> None:
    """Writes what the cache is of, if it is new or becomes longer."""
    path = folder / _INFO_FILE
    if path.exists():
        written = _read_info(folder)
        asked = {name: value for name, value in info.to_dict().items() if name not in ("version", "num_steps")}
        _check_same(folder, written, asked)
        if info.num_steps <= written.num_steps:
            return
    _write(path, (json.dumps(info.to_dict(), indent=2) + "\n").encode())


def _read_info(folder: Path) -> CacheInfo:
    path = folder / _INFO_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != _VERSION:
            raise CheckpointError(
                f"{path}: has version {values['version']}, but only {_VERSION} can be read; write the cache into "
                "another folder"
            )
        counts = [values[name] for name in ("vocab_size", "top_k", "num_steps")]
        if not isinstance(values["identity"], dict) or not all(type(n) is int and n > 0 for n in counts):
            raise ValueError("vocab_size, top_k and num_steps must be numbers from 1")
        return CacheInfo(
            identity=values["identity"],
            vocab_size=values["vocab_size"],
            top_k=values["top_k"],
            temperature=float(values["temperature"]),
            num_steps=values["num_steps"],
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: holds no {_INFO_FILE}; write a cache with `gemma2 distill cache SETTINGS.yaml`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as the description of a cache: {error!r}") from None


def _check_same(folder: Path, written: CacheInfo, asked: dict[str, Any]) -> None:
    before = {name: value for name, value in written.to_dict().items() if name in asked}
    if changed := differences(before, json.loads(json.dumps(asked))):
        raise ConfigError(
            f"{folder}: is a cache of something else ({'; '.join(changed)}); "
            "put the settings back, or write another cache"
        )
