"""Which device PyTorch runs on."""

from __future__ import annotations

import torch

from gemma2.errors import ConfigError


def choose_device(name: str, *, setting: str) -> torch.device:
    """Returns the device of this name.

    Args:
        name: "cpu", "cuda", "cuda:1", …; "auto" for a CUDA device where there is one, else the CPU.
        setting: what to call it in errors.

    Raises:
        ConfigError: there is no such kind of device, or not so many of them here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{setting} must be auto, cpu, cuda or cuda:N, but is {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{setting} is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; leave it out to "
            f"take what there is"
        )
    return device
