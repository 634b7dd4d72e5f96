"""The command line as a whole: verbs, exit statuses, one-line errors, and that help comes at once."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gemma2
from gemma2.cli.main import VERBS, main
from gemma2.errors import CheckpointError

PRESENT = [verb for verb in VERBS if importlib.util.find_spec(f"gemma2.cli.{verb.replace('-', '_')}") is not None]
HEAVY = ["torch", "numpy", "rich", "tokenizers", "sentencepiece", "safetensors", "huggingface_hub", "pydantic", "yaml"]

PYTHON = {**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parents[1])}


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """Starts the command line as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "gemma2", *arguments]
    return subprocess.Popen(command, env=environment, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def failing_verb(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Makes `gemma2 generate` raise what the test puts into the list."""
    errors: list[BaseException] = []
    module = ModuleType("gemma2.cli.generate")

    def run(args: argparse.Namespace) -> int:
        raise errors[0]

    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemma2.cli.generate", module)
    monkeypatch.delenv("GEMMA2_DEBUG", raising=False)
    return errors


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    without_arguments = capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == without_arguments
    for verb, line in VERBS.items():
        assert f"{verb} " in without_arguments and line in without_arguments


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"gemma2 {gemma2.__version__}\n"


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    # One process for all verbs: what none of them has imported, none of them needs for its help.
    program = f"""
import contextlib, io, json, sys
from gemma2.cli.main import main
for verb in {PRESENT!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert out.getvalue().startswith("usage: gemma2 " + verb), verb
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (result.stderr, result.returncode) == ("", 0)
    assert json.loads(result.stdout) == []


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspekt", "2b"]) == 2
    assert capsys.readouterr().err == "gemma2: error: there is no verb 'inspekt'. Did you mean 'inspect'?\n"
    assert main(["frobnicate"]) == 2
    assert capsys.readouterr().err.startswith("gemma2: error: there is no verb 'frobnicate'. The verbs are generate, ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verison"], "gemma2: error: there is no option --verison. Did you mean '--version'? (see gemma2 --help)\n"),
        (
            ["plan", "2b", "--contxt=9"],
            "gemma2 plan: error: there is no option --contxt. Did you mean '--context'? (see gemma2 plan --help)\n",
        ),
        (["plan", "2b", "--cont", "9"], "there is no option --cont."),  # no guessing from a beginning
        (["plan", "2b", "more"], "one argument too many: 'more'; a text with spaces needs quotes around it"),
        (["plan", "2b", "--context", "long"], "argument --context: invalid int value: 'long'"),
        (["plan", "2b", "--train", "half"], "argument --train: invalid choice: 'half'"),
        (["generate", "x", "--weights", "bf16"], "invalid choice: 'bf16' (choose from "),
        (["generate", "x", "--weights", "bf16"], "Did you mean 'bfloat16'? (see gemma2 generate --help)"),
        (["bench", "--weights", "bfloat"], "Did you mean 'bfloat16'?"),
        (["generate", "x", "--threads", "0"], "argument --threads: must be a whole number from 1 to 1024, but is '0'"),
        (["chat", "--threads", "1025"], "argument --threads: must be a whole number from 1 to 1024, but is '1025'"),
        (["bench", "--threads", "two"], "argument --threads: must be a whole number from 1 to 1024, but is 'two'"),
        (
            ["generate", "x", "--max-tokens", "0"],
            "whole number of at least 1, or none to go on to the context's end, but",
        ),
        (["pull"], "the following arguments are required: REPO"),
        (
            ["quantize", "--calibrate", "text.txt", "source", "new"],
            "the following arguments are required: SRC, DST; they go before --calibrate, which takes all that follows",
        ),
        (["quantize", "source"], "the following arguments are required: DST (see gemma2 quantize --help)"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("x.safetensors: is cut off;\n  fetch it again"), "x.safetensors: is cut off; fetch it again"),
        (PermissionError(errno.EACCES, "Permission denied", "/models/a"), "/models/a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "this needs torch, which is not installed: "
         "pip install 'gemma2[torch]'"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "this needs yaml, which is not installed: "
         "pip install 'gemma2[train]'"),
        (ModuleNotFoundError("…", name="gemma2.api"), "gemma2.api is missing; install gemma2 anew"),
        (MemoryError(), "the memory does not suffice; `gemma2 plan` says what a model, a context and a batch need"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
         "the memory does not suffice; `gemma2 plan` says what a model, a context and a batch need"),
        (KeyError("layer"), "KeyError: 'layer'. This is a defect of gemma2; --debug shows where, to report it"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_exit_1(
    failing_verb: list[BaseException], error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_verb.append(error)
    assert main(["generate"]) == 1
    assert capsys.readouterr().err == f"gemma2: error: {line}\n"


@pytest.mark.parametrize("arguments", [["--debug", "generate"], ["generate", "--debug"]])
def test_debug_shows_the_traceback(
    failing_verb: list[BaseException], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_verb.append(CheckpointError("is cut off"))
    assert main(arguments) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_debug_can_be_set_for_all_commands(
    failing_verb: list[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_verb.append(CheckpointError("is cut off"))
    monkeypatch.setenv("GEMMA2_DEBUG", "1")
    assert main(["generate"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_is_quiet(failing_verb: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    failing_verb.append(KeyboardInterrupt())
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == ""


def test_an_interrupt_passes_on_what_the_work_says(
    failing_verb: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_verb.append(KeyboardInterrupt("stopped; run the same again to go on"))
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "gemma2: stopped; run the same again to go on\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_work_and_lets_it_clear_up(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, types
from gemma2.cli.main import main
def run(args):
    try:
        os.kill(os.getpid(), {number:d})
        return 0
    finally:
        os.kill(os.getpid(), {number:d})  # the second one does not disturb
        open({str(tmp_path / "cleared")!r}, "w").close()
        raise OSError("the terminal is gone")
module = types.ModuleType("gemma2.cli.generate")
module.add_arguments, module.run = (lambda parser: None), run
sys.modules["gemma2.cli.generate"] = module
signal.signal({number:d}, signal.SIG_DFL)
print("before")
sys.exit(main(["generate"]))
"""
    result = subprocess.run([sys.executable, "-c", program], env=PYTHON, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (128 + number, "before\n")
    assert "Traceback" not in result.stderr
    assert (tmp_path / "cleared").exists()


def test_signals_that_are_ignored_or_taken_are_left_alone() -> None:
    program = """
import os, signal, sys, types
from gemma2.cli.main import main
def run(args):
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    return 0
module = types.ModuleType("gemma2.cli.generate")
module.add_arguments, module.run = (lambda parser: None), run
sys.modules["gemma2.cli.generate"] = module
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
signal.signal(signal.SIGTERM, lambda number, frame: print("taken"))
assert main(["generate"]) == 0
assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
"""
    result = subprocess.run([sys.executable, "-c", program], env=PYTHON, capture_output=True, text=True)
    assert (result.stderr, result.stdout, result.returncode) == ("", "taken\n", 0)


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        (["--json"], [141]),  # more text than a pipe holds
        ([], [0, 1, 141]),  # what a pipe may hold; rich, which writes it, leaves with 1
    ],
)
def test_a_reader_that_leaves_is_no_error(options: list[str], statuses: list[int]) -> None:
    process = start("inspect", "27b", "--tensors", *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() in statuses


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = start("plan", "2b", "--json", stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate()
    assert (errors, process.returncode) == ("gemma2: error: No space left on device\n", 1)


def test_characters_that_a_terminal_lacks_become_question_marks() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-m", "gemma2", "inspect", "2b"], env=environment, capture_output=True, text=True
    )
    assert (result.stderr, result.returncode) == ("", 0)
    assert "1 / ?256" in result.stdout


def test_the_package_offers_load_without_importing_it() -> None:
    program = "import sys, gemma2; print('load' in dir(gemma2), [m for m in ('numpy', 'torch') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(gemma2.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "True []\n"
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        gemma2.lod  # noqa: B018
