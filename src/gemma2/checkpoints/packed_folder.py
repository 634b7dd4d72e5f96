"""Folders of packed weights: config.json, the tokenizer and one packed file, which load in no time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from gemma2.checkpoints.checkpoint import Checkpoint
from gemma2.checkpoints.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    PACKED_SUFFIX,
    SINGLE_FILE,
    TOKENIZER_FILES,
    first_few,
)
from gemma2.checkpoints.packed_format import PackedFile, PackedWriter, open_packed_file, packed_file_name
from gemma2.checkpoints.packing import Progress, packed_pieces
from gemma2.checkpoints.staging import clear_errors, publish, require_room, staging_folder
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError
from gemma2.quantization.feedback import Calibration
from gemma2.quantization.packing import RoundingError, packed_sizes

_FURTHER_FILES: Final = ("generation_config.json", *TOKENIZER_FILES)


def is_packed(folder: str | Path) -> bool:
    """Whether a folder holds packed weights, and not a whole model beside them."""
    folder = Path(folder).expanduser()
    return bool(_packed_files(folder)) and not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists()


def unused_packed_files(folder: str | Path) -> list[Path]:
    """Returns the files of packed weights that lie beside a whole model, whose own weights are what is opened."""
    folder = Path(folder).expanduser()
    return [] if is_packed(folder) else _packed_files(folder)


def open_packed(folder: str | Path) -> PackedFile:
    """Opens a folder of packed weights; reads headers only.

    Raises:
        CheckpointError: it is none, or its files are not whole or do not belong together.
        ConfigError: config.json is missing or does not describe a Gemma 2.
    """
    folder = Path(folder).expanduser()
    files = _packed_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder}: holds no packed weights, which are called {packed_file_name('q4')} or the like"
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(files)} files of packed weights: {first_few(file.name for file in files)}; leave "
            "one, and move the others to folders of their own"
        )
    config = Gemma2Config.from_json_file(folder / CONFIG_FILE)
    packed = open_packed_file(files[0])
    if packed.config != config:
        raise CheckpointError(
            f"{files[0]}: was packed from a model of another architecture than {folder / CONFIG_FILE}"
        )
    return packed


def save_packed(
    folder: str | Path,
    checkpoint: Checkpoint,
    weight_format: str,
    *,
    num_threads: int,
    second_plane: bool | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> dict[str, RoundingError]:
    """Packs a model into a folder that `open_packed` reads.

    A tensor is packed range by range, so the memory in use stays a few hundred MB for any size. Files are written
    beside and moved when all are there; a write that is stopped begins again from the start, and clears up what the
    stopped one left.

    Args:
        folder: where to; made if missing. If it holds packed weights already, they are replaced.
        checkpoint: the model.
        weight_format: one of `PACKED_FORMATS`.
        num_threads: threads that round.
        second_plane: whether the head gets two planes of 4 bits, see `SECOND_PLANE`; None: in q4.
        calibration: what tells how errors make up for each other, for q8 and q4; left out, weights are rounded each on
            its own.
        progress: is told of the bytes of the checkpoint that are done, and all.

    Returns:
        What rounding did to each tensor, or with a calibration to its outputs; by the name of the second plane, what
        both planes do to the embedding.

    Raises:
        CheckpointError: the folder is not empty and not one of packed weights; a weight does not fit the format; the
            disk is full or refuses. What was written is then removed.
    """
    folder = Path(folder).expanduser()
    needed = sum(packed_sizes(checkpoint.config, weight_format, second_plane=second_plane).values())
    with staging_folder(folder, may_overwrite=is_packed) as staging, clear_errors(folder):
        require_room(folder, staging, needed)
        errors = write_packed_file(
            staging / packed_file_name(weight_format),
            checkpoint,
            weight_format,
            num_threads=num_threads,
            second_plane=second_plane,
            calibration=calibration,
            progress=progress,
        )
        for name in _FURTHER_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, staging / name)
        # As it was: it may say what is not architecture, such as the tokens that end an answer.
        shutil.copyfile(checkpoint.folder / CONFIG_FILE, staging / CONFIG_FILE)
        publish(staging, folder, weights=_packed_files)
    return errors


def write_packed_file(
    file: Path,
    checkpoint: Checkpoint,
    weight_format: str,
    *,
    num_threads: int,
    second_plane: bool | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> dict[str, RoundingError]:
    """Packs a model into one file; arguments and result as those of `save_packed`.

    Raises:
        CheckpointError: a weight does not fit the format, or a file of the model cannot be read.
        OSError: the packed file cannot be written.
    """
    errors: dict[str, RoundingError] = {}
    with PackedWriter(
        file, checkpoint.config, weight_format, second_plane=second_plane, calibrated=calibration is not None
    ) as writer:
        for piece in packed_pieces(
            checkpoint,
            weight_format,
            num_threads=num_threads,
            second_plane=second_plane,
            calibration=calibration,
            progress=progress,
        ):
            writer.write(piece.name, piece.data)
            errors[piece.name] = errors.get(piece.name, RoundingError()) + piece.error
        writer.finish()
    return errors


def _packed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{PACKED_SUFFIX}"))
