"""The record of a run: `log.jsonl`, one JSON object a line, and `loss.png`, drawn from it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from gemma2.errors import MissingDependencyError


class RunLog:
    """Appends to a JSONL file. Each line is written whole and at once.

    Args:
        path: the file.
        last_step: a resumed run gives the step it resumes from; later lines of the killed run are dropped, since
            those steps are done again.
        tensorboard: a folder to write the same numbers to, for TensorBoard; None for none.

    Raises:
        MissingDependencyError: TensorBoard is wanted and not installed.
    """

    def __init__(self, path: Path, *, last_step: int, tensorboard: Path | None = None) -> None:
        self.path = path
        self._tensorboard = None if tensorboard is None else _tensorboard_writer(tensorboard, last_step + 1)
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed while it wrote
                if isinstance(entry, dict) and entry.get("step", 0) <= last_step:
                    self.entries.append(entry)
        beside = path.with_name(path.name + ".partial")
        beside.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        beside.replace(path)

    def write(self, **values: Any) -> None:
        """Adds one line."""
        self.entries.append(values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            for name, value in values.items():
                if name not in ("event", "step") and isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{values['event']}/{name}", value, values["step"])

    def plot(self, path: Path, *, title: str, is_text: bool, minimized: str | None) -> None:
        """Draws what was written so far; see `plot_losses`."""
        plot_losses(self.entries, path, title=title, is_text=is_text, minimized=minimized)

    def close(self) -> None:
        """Writes out what TensorBoard has not been given yet."""
        if self._tensorboard is not None:
            self._tensorboard.close()


class NoLog:
    """The record of a process that is not the first: it writes nothing."""

    def write(self, **values: Any) -> None:
        """Does nothing."""

    def plot(self, path: Path, *, title: str, is_text: bool, minimized: str | None) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def check_tensorboard() -> None:
    """Raises MissingDependencyError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingDependencyError(
            "run.tensorboard needs tensorboard, which is not installed; install it with: pip install tensorboard"
        )


def _tensorboard_writer(folder: Path, first_step: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


def plot_losses(
    entries: list[dict[str, Any]], path: Path, *, title: str, is_text: bool = True, minimized: str | None = None
) -> None:
    """Draws training and validation loss over tokens, and the learning rate below, as PNG.

    Args:
        entries: of a log.
        path: the file.
        title: above the picture.
        is_text: whether losses are in nats per token, and validations have bits per byte.
        minimized: what training minimizes, if it is not what validation measures: each then has its own scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry for entry in entries if entry.get("event") == "step"]
    validations = [entry for entry in entries if entry.get("event") == "validation"]
    if not steps:
        return
    is_apart = minimized is not None and bool(validations)
    figure = Figure(figsize=(8, 8 if is_apart else 6), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3, 3, 1] if is_apart else [3, 1]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    loss_axes, valid_axes, rate_axes = panels[0], panels[-2], panels[-1]
    tokens = [entry["tokens"] / 1e6 for entry in steps]
    loss_axes.plot(tokens, [entry["loss"] for entry in steps], color="#9db8d9", linewidth=0.8, label="training")
    if validations:
        of_text = is_text and "bits_per_byte" in validations[-1]
        last = f"{validations[-1]['bits_per_byte']:.3f} bits per byte" if of_text else f"{validations[-1]['loss']:.4f}"
        valid_axes.plot(
            [entry["tokens"] / 1e6 for entry in validations],
            [entry["loss"] for entry in validations],
            color="#c0392b",
            marker="o",
            markersize=3,
            label=f"validation (last: {last})",
        )
    unit = "nats per token" if is_text else ""
    for axes, name in ((valid_axes, "loss"), (loss_axes, minimized or "loss")):  # one and the same, if not apart
        axes.set_ylabel(f"{name}, {unit}" if unit else name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    if is_apart:
        loss_axes.set_ylim(bottom=0)
    else:
        lowest = min(entry["loss"] for entry in steps + validations)
        loss_axes.set_ylim(lowest - 0.2, min(lowest + 4, max(entry["loss"] for entry in steps) + 0.2))
    loss_axes.set_title(title)
    rate_axes.plot(tokens, [entry["learning_rate"] for entry in steps], color="#555555", linewidth=1)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("million tokens")
    rate_axes.grid(alpha=0.3)
    beside = path.with_name("." + path.name)
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)
