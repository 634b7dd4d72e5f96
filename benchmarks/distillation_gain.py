"""What distillation gains: students with the same text, steps and seeds, from scratch and from a teacher.

    gemma2 pretrain examples/pretrain-books-teacher.yaml
    python benchmarks/distillation_gain.py runs/teacher/model runs/gain --train books-train.jsonl.xz \\
        --valid books-valid.jsonl.xz --seeds 1 2

The students' settings are those of examples/distill-books.yaml, with this call's number of steps; a student from
scratch has the same ones as a pretraining, with the teacher's tokenizer. A seed decides first weights and the order of
the texts, so that both students of a seed begin alike and see the same batches. At the end every model is
scored on all of the held-out text (bits per byte, a window that slides by half), and the table and the curves are
written beside the runs: gain.json, gain.png. Called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

SETTINGS = Path(__file__).parent.parent / "examples" / "distill-books.yaml"
WAYS = {"from scratch": "pretrain", "distilled": "distill"}
COLORS = {"from scratch": "#c0392b", "distilled": "#2c6fbb"}


def main() -> None:
    """Trains what is missing, scores all, writes table and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a model's folder")
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--train", nargs="+", required=True, help="JSON lines with a text each")
    parser.add_argument("--valid", nargs="+", required=True, help="held-out ones")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    runs = [(way, seed) for seed in args.seeds for way in WAYS]
    for way, seed in runs:
        folder = _folder(args.output, way, seed)
        if not (folder / "model").is_dir():
            file = folder.with_suffix(".yaml")
            file.write_text(yaml.safe_dump(_settings(args, way, seed, folder), sort_keys=False), encoding="utf-8")
            subprocess.run([sys.executable, "-m", "gemma2", WAYS[way], str(file)], check=True)
    folders = {"teacher": args.teacher}
    folders |= {f"{way}, seed {seed}": _folder(args.output, way, seed) / "model" for way, seed in runs}
    models = [word for folder in folders.values() for word in ("--model", str(folder))]
    command = [sys.executable, "-m", "gemma2", "eval", *args.valid, *models, "--json"]
    scores = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    (args.output / "gain.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    figures = {name: float(model["bits_per_byte"]) for name, model in zip(folders, scores["models"], strict=True)}
    logs = {(way, seed): _validations(_folder(args.output, way, seed)) for way, seed in runs}
    _print_table(figures, args.seeds)
    _plot(args.output / "gain.png", logs, args)


def _folder(output: Path, way: str, seed: int) -> Path:
    return output / f"{way.replace(' ', '-')}-{seed}"


def _settings(args: argparse.Namespace, way: str, seed: int, folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    values["output"] = str(folder)
    values["text"] |= {"train": args.train, "validation": args.valid}
    values["run"] |= {"num_steps": args.steps, "seed": seed, "validate_every": max(args.steps // 8, 1)}
    if way == "distilled":
        values["teacher"]["name"] = str(args.teacher)
        return values
    return {
        "output": values["output"],
        "model": values["student"]["model"],
        "tokenizer": {"folder": str(args.teacher)},
        "data": values["text"],
        "optimizer": values["optimizer"],
        "run": values["run"],
    }


def _validations(folder: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["event"] == "validation"]


def _print_table(figures: dict[str, float], seeds: list[int]) -> None:
    print("| | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |")
    print("| --- |" + " --- |" * (len(seeds) + 1))
    for way in WAYS:
        row = [figures[f"{way}, seed {seed}"] for seed in seeds]
        print(f"| {way} | " + " | ".join(f"{value:.4f}" for value in [*row, statistics.mean(row)]) + " |")
    print(f"\nteacher: {figures['teacher']:.4f} bits per byte")


def _plot(path: Path, logs: dict[tuple[str, int], list[dict[str, Any]]], args: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (way, seed), entries in logs.items():
        axes.plot(
            [entry["tokens"] / 1e6 for entry in entries],
            [entry["bits_per_byte"] for entry in entries],
            color=COLORS[way],
            linestyle="-" if seed == args.seeds[0] else "--",
            marker="o",
            markersize=3,
            label=f"{way}, seed {seed} (last: {entries[-1]['bits_per_byte']:.3f})",
        )
    axes.set_xlabel("million tokens of text")
    axes.set_ylabel("bits per byte of held-out books")
    axes.set_title("A student of 9 million parameters, with and without a teacher")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
