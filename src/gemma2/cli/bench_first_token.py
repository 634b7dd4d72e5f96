"""How long it takes from the start of a program to the first token: a new process, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gemma2.errors import Gemma2Error

PROMPT_TOKENS: Final = 32
_TEXT: Final = "The old house stood at the end of a lane, and nobody in the village could say who had built it. " * 8
_STARTS: Final = 5
_MOST_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Starts of `gemma2 generate --max-tokens 1`."""

    prompt_tokens: int
    seconds: tuple[float, ...]
    """Of each start; the one before them, which brings the files into memory, is left out."""


def measure_first_token(model: str, *, weights: str | None, num_threads: int, isa: str) -> FirstToken:
    """Starts the program several times.

    Args:
        model: a folder with a tokenizer, or a name on the Hub.
        weights: the format, or None for what `gemma2 generate` chooses.
        num_threads: of the CPU engine.
        isa: its instruction set.

    Raises:
        Gemma2Error: the model has no tokenizer that can be used, or the program failed.
    """
    command = [sys.executable, "-m", "gemma2", "generate", "--model", model, "--backend", "cpu", "--raw", "--json"]
    command += ["--quiet", "--temperature", "0", "--max-tokens", "1", "--ignore-eos"]
    if weights is not None:
        command += ["--weights", weights]
    command.append(_prompt(model))
    environment = {**os.environ, "GEMMA2_NUM_THREADS": str(num_threads), "GEMMA2_ISA": isa}
    _start(command, environment)
    begin = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < _STARTS and (not seconds or time.perf_counter() - begin < _MOST_SECONDS):
        taken, answer = _start(command, environment)
        seconds.append(taken)
    return FirstToken(prompt_tokens=answer["usage"]["prompt_tokens"], seconds=tuple(seconds))


def _prompt(model: str) -> str:
    """A text of `PROMPT_TOKENS` tokens, <bos> included; one fewer or more where a cut text is tokenized otherwise."""
    from gemma2.cli.source import find_folder
    from gemma2.text import Tokenizer

    tokenizer = Tokenizer.from_folder(find_folder(model))
    return tokenizer.decode(tokenizer.encode(_TEXT)[:PROMPT_TOKENS])


def _start(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, dict[str, Any]]:
    """Seconds from here to the process's first line, and what that says."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()
        errors = process.stderr.read().decode(errors="replace").strip()
    if process.returncode != 0 or not line:
        last = errors.splitlines()[-1] if errors else f"exit status {process.returncode}"
        raise Gemma2Error(f"`gemma2 generate` did not come to a first token: {last}")
    answer: dict[str, Any] = json.loads(line)
    return seconds, answer
