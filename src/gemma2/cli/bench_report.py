"""What `gemma2 bench` tells: a table for people, one object for programs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2 import __version__
from gemma2.cli.bench_first_token import FirstToken
from gemma2.cli.bench_machine import DOT_KINDS, processor_name
from gemma2.cli.bench_measure import Row
from gemma2.cli.terminal import format_bytes, make_table
from gemma2.cpu import CpuBackend
from gemma2.quantization import PackedModel

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured."""

    name: str
    packed: PackedModel
    backend: CpuBackend
    weight_bytes: int
    """Read for every token."""
    second_plane_bytes: int
    """Of which few rows are read."""
    make_seconds: float
    """Until the weights lay in memory or were mapped."""
    load_seconds: float
    """From there until the backend could run."""


# -- for programs ---------------------------------------------------------------------------------------------------


def describe(subject: Subject, rows: Sequence[Row], first_token: FirstToken | None) -> dict[str, Any]:
    """Returns what `--json` writes: bytes, seconds, and rates per second."""
    backend = subject.backend
    return {
        "version": __version__,
        "model": subject.name,
        "weights": backend.weights,
        "kv_cache": backend.kv_cache,
        "num_threads": backend.num_threads,
        "isa": backend.isa,
        "processor": processor_name(),
        "dot_kind": DOT_KINDS[backend.weights],
        "weight_bytes": subject.weight_bytes,
        "second_plane_bytes": subject.second_plane_bytes,
        "make_seconds": subject.make_seconds,
        "load_seconds": subject.load_seconds,
        "first_token": None
        if first_token is None
        else {**dataclasses.asdict(first_token), "median_seconds": statistics.median(first_token.seconds)},
        "peak_extra_bytes": max((row.peak_extra_bytes for row in rows), default=0),
        "rows": [
            {
                **dataclasses.asdict(row),
                "median_seconds": statistics.median(row.seconds),
                "tokens_per_second": row.tokens_per_second,
                "bytes_per_second": row.bytes_per_second,
                "operations_per_second": row.operations_per_second,
                "fraction_of_read": row.fraction_of_read,
                "fraction_of_dot": row.fraction_of_dot,
            }
            for row in rows
        ],
    }


# -- for people -----------------------------------------------------------------------------------------------------


def print_report(console: Console, subject: Subject, rows: Sequence[Row], first_token: FirstToken | None) -> None:
    """Prints the table and what it stands on."""
    backend = subject.backend
    plane = f" and {format_bytes(subject.second_plane_bytes)} of the head's second plane"
    plane = plane if subject.second_plane_bytes else ""
    console.print(f"{subject.name}: {backend.weights}, {format_bytes(subject.weight_bytes)}{plane}", style="bold")
    threads = "1 thread" if backend.num_threads == 1 else f"{backend.num_threads} threads"
    console.print(f"{processor_name()}, {threads}, {backend.isa}; keys and values in {backend.kv_cache}")
    console.print(f"weights there in {subject.make_seconds:.2f} s, engine made in {subject.load_seconds:.2f} s")
    if first_token is not None:
        console.print(
            f"from the start of `gemma2 generate` to the first token, {first_token.prompt_tokens} tokens read: "
            f"{statistics.median(first_token.seconds):.2f} s (median of {len(first_token.seconds)} starts)"
        )
    if not rows:
        return
    console.print()
    kind = DOT_KINDS[backend.weights]
    columns = ("tok/s", "ms", "reads GB/s", "of ceiling", f"{kind} Gop/s", "of peak", "memory beside")
    table = make_table(console, "", *columns)
    for row in rows:
        reads = row.bytes_read > 0
        milliseconds = 1000 * row.num_tokens / row.tokens_per_second
        table.add_row(
            title(row),
            f"{row.tokens_per_second:,.1f}",
            f"{milliseconds:,.1f}" if milliseconds < 1000 else f"{milliseconds:,.0f}",
            f"{row.bytes_per_second / 1e9:.1f}" if reads else "",
            f"{row.fraction_of_read:.0%}" if reads else "",
            f"{row.operations_per_second / 1e9:,.0f}",
            f"{row.fraction_of_dot:.0%}",
            format_bytes(row.peak_extra_bytes) if row.peak_extra_bytes else "",
        )
    console.print(table)
    ceilings = [ceiling for row in rows for ceiling in (row.before, row.after)]
    reads_gb = [ceiling.read / 1e9 for ceiling in ceilings]
    dots = [ceiling.dot / 1e9 for ceiling in ceilings]
    console.print(
        f"Ceilings, measured beside each row: memory reads {min(reads_gb):.1f} to {max(reads_gb):.1f} GB/s (best pass "
        f"{max(ceiling.read_best for ceiling in ceilings) / 1e9:.1f}), {kind} products {min(dots):,.0f} to "
        f"{max(dots):,.0f} Gop/s (best {max(ceiling.dot_best for ceiling in ceilings) / 1e9:,.0f}).",
        style="dim",
    )
    console.print(
        "A row's fraction is of the higher ceiling before and after it; medians are held against medians. Memory "
        "beside: the process's peak without weights, keys and values.",
        style="dim",
    )


def title(row: Row) -> str:
    """What a row measures, in words."""
    if row.kind == "prefill":
        return f"prefill {row.context:,}"
    if row.kind == "decode":
        return f"decode at {row.context:,}"
    return "1 sequence" if row.num_tokens == 1 else f"{row.num_tokens:,} sequences"
