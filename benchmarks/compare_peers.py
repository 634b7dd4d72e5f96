"""Our CPU engine beside llama.cpp and OpenVINO, in one sitting, as a table for docs/performance.md.

    python benchmarks/compare_peers.py --list
    python benchmarks/compare_peers.py --peers-scripts DIR --llama-python PYTHON --gguf-q4 FILE --gguf-q8 FILE \\
        --openvino-python PYTHON --openvino-model DIR --model-q4 FOLDER --markdown table.md --json table.json

The programs take turns (A B A B …), each in a process of its own, and medians of the rounds are compared, since the
speed of a machine with neighbours changes within minutes. The machine's ceilings are measured between any two runs.
Two threads each, 2B shape, random weights, which cost what trained ones cost.

The peers' scripts, environments and files are the user's: `llama_cpp_bench.py`, `llama_cpp_batch_bench.py` and
`openvino_bench.py` in DIR print one line with "prefill X tok/s, decode Y tok/s" or "N sequences, X tok/s in all". What
is not given is left out, and its rows say so. `--only ROW` runs what one row needs; rows that share runs share them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np
from peer_runs import NUM_THREADS, Figures, Run, RunFailedError, make_runs

from gemma2 import _kernels as kernels
from gemma2.cli.bench_machine import ThisMachine, processor_name


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the table: a figure of ours against a peer's, or against a bound."""

    row: str
    group: str
    title: str
    ours: str
    """The figure's name in our run."""
    theirs: str = ""
    """The run that it is compared with; empty: the figure itself is what is asked for."""
    asked: Callable[[Figures], float] = field(default=lambda figures: 0.0)
    """The least (or most) ratio or figure, given ours."""
    at_most: bool = False
    unit: str = "tok/s"


def _by_memory(figures: Figures) -> float:
    """1.4 with memory at 41 GB/s, 2 at 80: where reading is quick, their arithmetic is what bounds them."""
    share = (figures["read GB/s"] - 41) / (80 - 41)
    return 1.4 + 0.6 * min(1.0, max(0.0, share))


COMPARISONS: Final = (
    Comparison(
        row="prefill-512",
        group="512",
        title="prefill, 512 tokens, q4, against OpenVINO int4, warm",
        ours="prefill",
        theirs="OpenVINO int4 512",
        asked=lambda _: 1.35,
    ),
    Comparison(
        row="prefill-512",
        group="512",
        title="prefill, 512 tokens, q4, against llama.cpp Q4_0",
        ours="prefill",
        theirs="llama.cpp Q4_0 512",
        asked=lambda _: 3.2,
    ),
    Comparison(
        row="prefill-512",
        group="512",
        title="prefill, 512 tokens, q4, of the int8 dot-product ceiling",
        ours="prefill of dot",
        asked=lambda _: 0.72,
        unit="",
    ),
    Comparison(
        row="prefill-7900",
        group="7900",
        title="prefill, 7900 tokens, q4, against llama.cpp Q4_0",
        ours="prefill",
        theirs="llama.cpp Q4_0 7900",
        asked=lambda _: 4.0,
    ),
    Comparison(
        row="decode-512",
        group="512",
        title="decode, context 512, q4, of the memory-read ceiling",
        ours="decode of read",
        asked=lambda _: 0.85,
        unit="",
    ),
    Comparison(
        row="decode-512",
        group="512",
        title="decode, context 512, q4, against llama.cpp Q4_0",
        ours="decode",
        theirs="llama.cpp Q4_0 512",
        asked=_by_memory,
    ),
    Comparison(
        row="decode-512",
        group="512",
        title="decode, context 512, q4, against OpenVINO int4",
        ours="decode",
        theirs="OpenVINO int4 512",
    ),
    Comparison(
        row="decode-7900",
        group="7900",
        title="decode, context 7900, q4, against llama.cpp Q4_0",
        ours="decode",
        theirs="llama.cpp Q4_0 7900",
        asked=lambda _: 2.5,
    ),
    Comparison(
        row="decode-7900",
        group="7900",
        title="decode, context 7900, q4, of the memory-read ceiling",
        ours="decode of read",
        unit="",
    ),
    Comparison(
        row="decode-q8",
        group="q8",
        title="decode, context 512, q8, against llama.cpp Q8_0",
        ours="decode",
        theirs="llama.cpp Q8_0 512",
        asked=lambda _: 1.05,
    ),
    Comparison(
        row="batch-16",
        group="batch",
        title="16 sequences decoding, q4, all together, against llama.cpp Q4_0",
        ours="batch",
        theirs="llama.cpp 16 sequences",
        asked=lambda _: 3.0,
    ),
    Comparison(
        row="first-token",
        group="first-token",
        title="process start to first token, 32-token prompt, q4, against llama.cpp Q4_0",
        ours="first token",
        theirs="llama.cpp first token",
        asked=lambda _: 0.5,
        at_most=True,
        unit="s",
    ),
    Comparison(
        row="peak-memory",
        group="7900",
        title="peak memory beside weights, keys and values, q4, 7900 tokens",
        ours="peak MB",
        asked=lambda _: 300.0,
        at_most=True,
        unit="MB",
    ),
)
ROWS: Final = tuple(dict.fromkeys(comparison.row for comparison in COMPARISONS))


@dataclass
class Sitting:
    """All that was measured."""

    started: str
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    """Of each run, by round."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why a run has no figures."""
    ceilings: list[dict[str, float]] = field(default_factory=list)

    def median(self, run: str, figure: str) -> float | None:
        """The median over the rounds."""
        values = [figures[figure] for figures in self.figures.get(run, []) if figure in figures]
        return statistics.median(values) if values else None

    def medians(self, run: str) -> Figures:
        """All medians of a run."""
        names = {name for figures in self.figures.get(run, []) for name in figures}
        return {name: value for name in names if (value := self.median(run, name)) is not None}


def measure(groups: Mapping[str, list[Run]], rounds: int, machine: ThisMachine) -> Sitting:
    """Lets the runs of each group take turns."""
    sitting = Sitting(started=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    total = rounds * sum(len([run for run in runs if not run.missing]) for runs in groups.values())
    done = 0

    def note_ceilings() -> None:
        ceilings = machine.ceilings()
        sitting.ceilings.append({"seconds": time.monotonic(), **vars(ceilings)})
        print(f"  memory {ceilings.read / 1e9:.1f} GB/s, int8 {ceilings.dot / 1e9:,.0f} Gop/s", file=sys.stderr)

    for runs in groups.values():
        for run in runs:
            if run.missing:
                sitting.problems[run.name] = f"needs {run.missing}"
        for index in range(rounds):
            for run in runs if index % 2 == 0 else runs[::-1]:
                if run.name in sitting.problems:
                    continue
                note_ceilings()
                done += 1
                print(f"{done} of {total}: {run.name}, round {index + 1} …", file=sys.stderr, flush=True)
                try:
                    figures = run.action()
                except RunFailedError as error:
                    sitting.problems[run.name] = str(error)
                    print(f"  failed: {error}", file=sys.stderr)
                    continue
                sitting.figures.setdefault(run.name, []).append(figures)
                print("  " + ", ".join(f"{name} {value:,.2f}" for name, value in figures.items()), file=sys.stderr)
    note_ceilings()
    return sitting


# -- the table --------------------------------------------------------------------------------------------------------


def compare(comparison: Comparison, ours_run: str, sitting: Sitting) -> dict[str, Any]:
    """One line's figures."""
    ours, figures = sitting.median(ours_run, comparison.ours), sitting.medians(ours_run)
    line: dict[str, Any] = {"row": comparison.row, "title": comparison.title, "unit": comparison.unit, "ours": ours}
    if ours is None:
        return {**line, "problem": sitting.problems.get(ours_run, "not run")}
    reached = ours
    if comparison.theirs:
        theirs = sitting.median(comparison.theirs, comparison.ours)
        line["theirs"] = theirs
        if theirs is None:
            return {**line, "problem": sitting.problems.get(comparison.theirs, "not run")}
        reached = line["ratio"] = ours / theirs
    asked = comparison.asked(figures)
    if asked:
        line.update(asked=asked, at_most=comparison.at_most)
        line["is_reached"] = reached <= asked if comparison.at_most else reached >= asked
    return line


def markdown(lines: Sequence[Mapping[str, Any]], sitting: Sitting, rounds: int) -> str:
    """The table, and what it stands on."""
    reads = [ceiling["read"] / 1e9 for ceiling in sitting.ceilings]
    dots = [ceiling["dot"] / 1e9 for ceiling in sitting.ceilings]
    text = [
        f"{processor_name()}, {NUM_THREADS} threads, 2B shape, {sitting.started[:10]}, medians of {rounds} rounds by "
        f"turns. Between the runs memory gave {min(reads):.1f} to {max(reads):.1f} GB/s (median "
        f"{statistics.median(reads):.1f}), int8 products {min(dots):,.0f} to {max(dots):,.0f} Gop/s (median "
        f"{statistics.median(dots):,.0f}).",
        "",
        "| figure | ours | theirs | ratio | asked | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        is_fraction = line["unit"] == ""
        cells = [line["title"], _number(line["ours"], line["unit"]), _number(line.get("theirs"), line["unit"])]
        cells.append(f"{line['ratio']:.2f} ×" if "ratio" in line else "")
        if "problem" in line:
            cells += ["", line["problem"].replace("|", "/")]
        elif "asked" in line:
            words = "at most" if line["at_most"] else "at least"
            bound = f"{line['asked']:.2f}" if is_fraction else f"{line['asked']:.3g} ×"
            cells.append(f"{words} {bound if 'ratio' in line or is_fraction else _number(line['asked'], line['unit'])}")
            cells.append("yes" if line["is_reached"] else "**no**")
        else:
            cells += ["", ""]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "":
        return f"{value:.2f}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the rows, and end")
    parser.add_argument("--only", action="append", choices=ROWS, metavar="ROW", help="may be given several times")
    parser.add_argument("--rounds", type=int, default=3, help="how often each has its turn (default: %(default)s)")
    parser.add_argument("--model-q4", metavar="FOLDER", help="our weights and tokenizer (default: random weights)")
    parser.add_argument("--model-q8", metavar="FOLDER", help="the same in q8")
    parser.add_argument("--peers-scripts", metavar="DIR", help="where the peers' scripts are")
    parser.add_argument("--llama-python", metavar="PYTHON", help="an environment with llama-cpp-python")
    parser.add_argument("--gguf-q4", metavar="FILE", help="Q4_0 weights of the 2B shape")
    parser.add_argument("--gguf-q8", metavar="FILE", help="Q8_0 weights of the 2B shape")
    parser.add_argument("--openvino-python", metavar="PYTHON", help="an environment with openvino-genai")
    parser.add_argument("--openvino-model", metavar="DIR", help="an int4 export of the 2B shape")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too")
    parser.add_argument("--json", metavar="FILE", help="write all figures of all rounds there")
    args = parser.parse_args()
    if args.list:
        for row in ROWS:
            print(row)
        return 0
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {args.rounds}")
    chosen = [comparison for comparison in COMPARISONS if not args.only or comparison.row in args.only]
    all_groups = make_runs(args)
    # Of a group, what the chosen lines need: our run and those that it is compared with.
    groups: dict[str, list[Run]] = {}
    for name, runs in all_groups.items():
        needed = {comparison.theirs for comparison in chosen if comparison.group == name}
        if needed:
            groups[name] = [run for run in runs if run.side == "ours" or run.name in needed]
    machine = ThisMachine(
        num_threads=NUM_THREADS, isa="auto", weight_format="q4", tensors={"": np.zeros(64, dtype=np.uint8)}
    )
    sitting = measure(groups, args.rounds, machine)
    lines = [compare(comparison, all_groups[comparison.group][0].name, sitting) for comparison in chosen]
    table = markdown(lines, sitting, args.rounds)
    print(table)
    if args.markdown:
        Path(args.markdown).write_text(table, encoding="utf-8")
    if args.json:
        report = {
            "processor": processor_name(),
            "system": platform.platform(),
            "num_threads": NUM_THREADS,
            "isas": kernels.available_isas(),
            "started": sitting.started,
            "rounds": args.rounds,
            "lines": lines,
            "figures": sitting.figures,
            "problems": sitting.problems,
            "ceilings": sitting.ceilings,
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
