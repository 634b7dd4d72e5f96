"""What compare_peers.py runs: one process each, and the figures that it printed."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NUM_THREADS: Final = 2
Figures = dict[str, float]

LLAMA_FIRST_TOKEN: Final = """
import sys
import llama_cpp as lib
import numpy as np
lib.llama_backend_init()
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
params.n_threads = params.n_threads_batch = 2
context = lib.llama_init_from_model(model, params)
ids = (lib.llama_token * 32)(*range(1000, 1032))
assert lib.llama_decode(context, lib.llama_batch_get_one(ids, 32)) == 0
rows = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
print(int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), shape=(rows,)).argmax()), flush=True)
"""
"""From process start to the first token of a 32-token prompt, as our own is measured."""


class RunFailedError(Exception):
    """A process that did not do what it should; the message is the last of what it said."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Something that is run once a round."""

    name: str
    side: str
    """ "ours", "llama.cpp" or "OpenVINO"."""
    action: Callable[[], Figures]
    missing: str = ""
    """Which option is needed for it and was not given."""


def run_process(command: Sequence[str]) -> str:
    """Returns what a process writes to standard output."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RunFailedError(lines[-1] if lines else f"exit status {result.returncode}")
    return result.stdout


def run_ours(*options: str) -> Figures:
    """Runs `gemma2 bench` and names its figures."""
    command = [sys.executable, "-m", "gemma2", "bench", "--threads", str(NUM_THREADS), "--json", "-", *options]
    report = json.loads(run_process(command))
    figures: Figures = {}
    for row in report["rows"]:
        figures[row["kind"]] = row["tokens_per_second"]
        figures[row["kind"] + " of read"] = row["fraction_of_read"]
        figures[row["kind"] + " of dot"] = row["fraction_of_dot"]
        figures["read GB/s"] = max(row["before"]["read"], row["after"]["read"]) / 1e9
        figures["dot Gop/s"] = max(row["before"]["dot"], row["after"]["dot"]) / 1e9
    if report["rows"]:
        figures["peak MB"] = report["peak_extra_bytes"] / 1e6
    if report.get("first_token") is not None:
        figures["first token"] = report["first_token"]["median_seconds"]
    return figures


def run_peer(command: Sequence[str]) -> Figures:
    """Runs a peer's script and reads the last line that has figures."""
    text = run_process(command)
    speeds = re.findall(r"prefill ([\d.]+) tok/s, decode ([\d.]+) tok/s", text)
    if speeds:
        prefill, decode = speeds[-1]
        return {"prefill": float(prefill), "decode": float(decode)}
    batches = re.findall(r"sequences, ([\d.]+) tok/s in all", text)
    if batches:
        return {"batch": float(batches[-1])}
    raise RunFailedError(f"no figures in {text.strip()[-200:]!r}")


def time_to_first_line(command: Sequence[str], starts: int = 6) -> Figures:
    """Seconds from the start of a process to its first line on standard output: median of all starts but the first."""
    seconds = []
    for _ in range(starts):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds.append(time.perf_counter() - start)
            process.stdout.read()
        if process.returncode != 0 or not line:
            raise RunFailedError(f"exit status {process.returncode} before the first token")
    return {"first token": statistics.median(seconds[1:])}


def make_runs(args: argparse.Namespace) -> dict[str, list[Run]]:
    """The groups of runs that take turns."""
    ours_q4 = ["--model", args.model_q4] if args.model_q4 else ["--size", "2b", "--weights", "q4"]
    ours_q8 = ["--model", args.model_q8] if args.model_q8 else ["--size", "2b", "--weights", "q8"]
    scripts = Path(args.peers_scripts or ".")

    def missing(**needed: str | None) -> str:
        absent = [f"--{name.replace('_', '-')}" for name, value in needed.items() if not value]
        return " and ".join(absent)

    def ours(name: str, weights: Sequence[str], **lists: str) -> Run:
        options = [*weights, "--decode-steps", lists.pop("steps", "24")]
        for option in ("prefill", "context", "batch"):
            options += [f"--{option}", lists.get(option, "none")]
        return Run(name=name, side="ours", action=lambda: run_ours(*options))

    def llama(name: str, script: str, file: str | None, option: str, *options: str) -> Run:
        command = [args.llama_python or "", str(scripts / script), file or "", *options]
        return Run(
            name=name,
            side="llama.cpp",
            action=lambda: run_peer(command),
            missing=missing(**{"llama_python": args.llama_python, "peers_scripts": args.peers_scripts, option: file}),
        )

    openvino = [args.openvino_python or "", str(scripts / "openvino_bench.py"), args.openvino_model or "", "512"]
    first_token = Run(
        name="first token",
        side="ours",
        action=lambda: run_ours(*ours_q4, "--first-token", "--prefill", "none", "--context", "none", "--batch", "none"),
        missing=missing(model_q4=args.model_q4),
    )
    llama_first_token = Run(
        name="llama.cpp first token",
        side="llama.cpp",
        action=lambda: time_to_first_line([args.llama_python, "-c", LLAMA_FIRST_TOKEN, args.gguf_q4]),
        missing=missing(llama_python=args.llama_python, gguf_q4=args.gguf_q4),
    )
    return {
        "512": [
            ours("q4 512", ours_q4, prefill="512", context="512"),
            Run(
                name="OpenVINO int4 512",
                side="OpenVINO",
                action=lambda: run_peer(openvino),
                missing=missing(
                    openvino_python=args.openvino_python,
                    openvino_model=args.openvino_model,
                    peers_scripts=args.peers_scripts,
                ),
            ),
            llama("llama.cpp Q4_0 512", "llama_cpp_bench.py", args.gguf_q4, "gguf_q4", "512", "24"),
        ],
        "7900": [
            ours("q4 7900", ours_q4, prefill="7900", context="7900", steps="16"),
            llama("llama.cpp Q4_0 7900", "llama_cpp_bench.py", args.gguf_q4, "gguf_q4", "7900", "16"),
        ],
        "q8": [
            ours("q8 512", ours_q8, context="512"),
            llama("llama.cpp Q8_0 512", "llama_cpp_bench.py", args.gguf_q8, "gguf_q8", "512", "24"),
        ],
        "batch": [
            ours("16 sequences", ours_q4, batch="16", steps="20"),
            llama("llama.cpp 16 sequences", "llama_cpp_batch_bench.py", args.gguf_q4, "gguf_q4", "16"),
        ],
        "first-token": [first_token, llama_first_token],
    }
