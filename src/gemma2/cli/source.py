"""Which model a command line means."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from gemma2.config import PRESETS, Gemma2Config
from gemma2.errors import CheckpointError

BUNDLED: Final = "bundled"


def find_folder(name: str | None) -> Path:
    """Returns the folder of a model that is on this machine.

    Args:
        name: a folder, or a name on the Hugging Face Hub that was pulled before; None, or "bundled", for the bundled
            model.

    Raises:
        CheckpointError: there is no such model.
    """
    from gemma2.api import BUNDLED_FOLDER
    from gemma2.checkpoints import resolve_model

    if name is None or name == BUNDLED:
        if not (BUNDLED_FOLDER / "config.json").is_file():
            raise CheckpointError(
                f"this installation came without the bundled model; name one of {', '.join(PRESETS)}, or a folder"
            )
        return BUNDLED_FOLDER
    if name in PRESETS:
        raise CheckpointError(f"{name} is a size, which has no weights; name a folder, or google/gemma-2-{name}")
    if name.lower() in PRESETS:
        size = name.lower()
        raise CheckpointError(
            f"there is no model {name!r}; the published size is written {size!r}, and with weights "
            f"google/gemma-2-{size}"
        )
    return resolve_model(name)


def model_options(folder: Path, *, base: str | None) -> str:
    """The options that name what a training run wrote.

    Args:
        folder: what it wrote.
        base: the name of the model that an adapter belongs to; None if the folder is a model.
    """
    if base is None:
        return f"--model {folder}"
    return f"--adapter {folder}" if base == BUNDLED else f"--model {base} --adapter {folder}"


def find_config(name: str | None) -> tuple[str, Gemma2Config]:
    """Returns what to call a model, and its architecture; its weights need not be there.

    Args:
        name: a preset, or what `find_folder` takes.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: it has no config.json, or that is not a Gemma 2's.
    """
    if name is not None and name in PRESETS:
        return f"Gemma 2 {name.upper()}", PRESETS[name]
    folder = find_folder(name)
    return str(folder), Gemma2Config.from_json_file(folder)
