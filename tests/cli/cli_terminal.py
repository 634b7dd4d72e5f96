"""A terminal for tests: a program runs in it, the test types and reads."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

_ESCAPE = re.compile(rb"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_])")
_WHERE_IS_THE_CURSOR = b"\x1b[6n"
_ROWS_AND_COLUMNS = (30, 100)
_ROOT = Path(__file__).resolve().parents[2]


class Terminal:
    """Runs `gemma2` with a fake model.

    Args:
        arguments: the command line.
        fake_model: arguments of `FakeLLM`.
        folder: to run in, and to keep state in.
    """

    def __init__(self, *arguments: str, fake_model: Mapping[str, Any], folder: Path) -> None:
        self._descriptor, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", *_ROWS_AND_COLUMNS, 0, 0))
        environment = {
            **os.environ,
            "FAKE_MODEL": json.dumps(fake_model),
            "PYTHONPATH": str(_ROOT / "src"),
            "XDG_STATE_HOME": str(folder / "state"),
            "TERM": "xterm",
        }
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cli_fakes.py")), *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(inside)
        self.raw = b""
        """All that was shown, escape sequences included."""
        self._num_waited_for = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        os.close(self._descriptor)

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str, timeout_seconds: float = 60.0) -> str:
        """Reads until the text is shown; returns what was shown since the last one, and this."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            shown = _ESCAPE.sub(b"", self.raw).decode(errors="replace")
            end = shown.find(text, self._num_waited_for) + len(text)
            if end >= len(text):
                seen, self._num_waited_for = shown[self._num_waited_for : end], end
                return seen
            assert time.monotonic() < deadline, f"{text!r} was not shown, but {shown[self._num_waited_for :]!r}"
            self._read()

    def wait_for_end(self, timeout_seconds: float = 60.0) -> int:
        """Reads until the program ends; returns its exit status."""
        deadline = time.monotonic() + timeout_seconds
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"the program goes on; it showed {self.raw!r}"
            self._read()
        while self._read():
            pass
        return self._process.returncode

    def _read(self) -> bool:
        if not select.select([self._descriptor], [], [], 0.05)[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the program closed its end
            return False
        self.raw += data
        for _ in range(data.count(_WHERE_IS_THE_CURSOR)):
            os.write(self._descriptor, b"\x1b[1;1R")
        return bool(data)
