"""Where a chat is typed and shown: a terminal with an editor for what is typed, or plain pipes."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TextIO

from gemma2.cli.chat_commands import COMMANDS
from gemma2.cli.chat_session import WITHOUT
from gemma2.cli.sampling_options import SAMPLING_OPTIONS
from gemma2.cli.streaming import DIM, RED, TextWriter, paint
from gemma2.errors import Gemma2Error

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

_PROMPT: Final = "> "
_CONTINUED: Final = "  "
_HINT: Final = "Enter sends · Alt-Enter begins a new line · /help · Ctrl-D leaves"
_HINT_LEAVE: Final = "Ctrl-C again leaves"
_NARROWEST: Final = 20


class WrappingWriter(TextWriter):
    """Writes to a terminal, and breaks lines between words.

    A word is shown as soon as it begins. One that turns out not to fit is taken away again, and put on the next line.
    """

    def __init__(self, stream: TextIO) -> None:
        from prompt_toolkit.utils import get_cwidth

        super().__init__(stream)
        self._width_of = get_cwidth
        self._column = 0
        self._word = ""

    def _lay_out(self, text: str) -> str:
        # Not the last column: after it, terminals differ on where the cursor is.
        width = max(_NARROWEST, shutil.get_terminal_size().columns - 1)
        laid_out = []
        for character in text:
            if character == "\n":
                self._column, self._word = 0, ""
            elif character.isspace():
                character = " "
                self._word = ""
                if self._column >= width:
                    self._column, character = 0, "\n"
                else:
                    self._column += 1
            else:
                if self._column + self._width_of(character) > width:
                    word_width = self._width_of(self._word)
                    if word_width < self._column:
                        laid_out.append(f"\x1b[{word_width}D\x1b[K\n{self._word}" if self._word else "\n")
                        self._column = word_width
                    else:  # one word fills the line
                        laid_out.append("\n")
                        self._column, self._word = 0, ""
                self._word += character
                self._column += self._width_of(character)
            laid_out.append(character)
        return "".join(laid_out)


class PlainScreen:
    """Takes each line of standard input as a message; only answers go to standard output.

    Args:
        lines: standard input.
        quiet: whether to show no notices.
    """

    is_interactive = False

    def __init__(self, lines: BinaryIO, *, quiet: bool) -> None:
        self._lines = lines
        self._quiet = quiet
        self._line_number = 0

    def read(self) -> str | None:
        message = ""
        for data in self._lines:
            self._line_number += 1
            try:
                line = data.decode("utf-8-sig" if self._line_number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Gemma2Error(
                    f"standard input, line {self._line_number}: needs to be UTF-8, but byte {error.start} "
                    f"(0x{data[error.start]:02x}) is not; convert it, as with iconv"
                ) from None
            message += line.removesuffix("\n").removesuffix("\r")
            if not message.endswith("\\"):
                return message
            message = f"{message[:-1]}\n"
        return message.removesuffix("\n") or None

    def confirm(self, question: str) -> bool:
        return False

    def answer(self) -> TextWriter:
        return TextWriter(sys.stdout)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def notice(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr)

    def error(self, text: str) -> None:
        print(f"gemma2: error: {text}", file=sys.stderr)


class TerminalScreen:
    """Has an editor with history and completion for what is typed.

    Args:
        history_file: where to keep what was typed.
        quiet: whether to show no notices.
    """

    is_interactive = True

    def __init__(self, history_file: Path, *, quiet: bool) -> None:
        from prompt_toolkit import PromptSession

        self._quiet = quiet
        self._is_leaving = False
        self._session: PromptSession[str] = PromptSession(
            history=_open_history(history_file),
            multiline=True,
            prompt_continuation=_CONTINUED,
            key_bindings=self._make_key_bindings(),
            completer=_make_completer(),
            complete_while_typing=True,
            bottom_toolbar=lambda: [("noreverse fg:ansibrightblack", _HINT_LEAVE if self._is_leaving else _HINT)],
            enable_open_in_editor=True,
        )
        self._session.default_buffer.on_text_changed += lambda buffer: self._stay()

    def read(self) -> str | None:
        self._is_leaving = False
        try:
            message = self._session.prompt([("bold", _PROMPT)])
        except EOFError:
            return None
        try:
            message.encode()
        except UnicodeEncodeError as error:
            raise Gemma2Error(
                f"what was typed needs to be UTF-8, but character {error.start} is not; check the terminal's settings"
            ) from None
        return message

    def confirm(self, question: str) -> bool:
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            print()
            return False

    def answer(self) -> TextWriter:
        is_dumb = os.environ.get("TERM", "dumb") == "dumb"
        return TextWriter(sys.stdout) if is_dumb else WrappingWriter(sys.stdout)

    def say(self, text: str) -> None:
        print(_wrap(text))

    def notice(self, text: str) -> None:
        if not self._quiet:
            print(paint(_wrap(text), DIM, sys.stdout))

    def error(self, text: str) -> None:
        print(paint(_wrap(text), RED, sys.stdout))

    def _stay(self) -> None:
        self._is_leaving = False

    def _make_key_bindings(self) -> KeyBindings:
        from prompt_toolkit.filters import completion_is_selected, has_completions
        from prompt_toolkit.key_binding import KeyBindings

        bindings = KeyBindings()

        @bindings.add("enter", filter=~completion_is_selected)
        def send_or_break_line(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @bindings.add("enter", filter=has_completions & completion_is_selected)
        def take_completion(event: KeyPressEvent) -> None:
            event.current_buffer.complete_state = None

        @bindings.add("escape", "enter")
        def break_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-c")
        @bindings.add("<sigint>")
        def clear_or_leave(event: KeyPressEvent) -> None:
            if self._is_leaving:
                event.app.exit(exception=EOFError)
                return
            event.current_buffer.reset()
            self._is_leaving = True

        return bindings


def history_path() -> Path:
    """Returns the file in which the terminal's chat keeps what was typed (XDG Base Directory specification)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "gemma2" / "chat_history"


def _open_history(path: Path) -> History:
    """Opens the history, which only its owner can read; where it cannot be written, one that ends with the program."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class SafeHistory(FileHistory):
        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except (OSError, UnicodeError):  # a full disk is no reason to lose the message
                return

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return SafeHistory(path)


def _make_completer() -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        """Completes the names of commands, and after /set those of options."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            words = text.split(" ")
            names: Iterable[str] = ()
            if len(words) == 1 and text.startswith("/"):
                names = COMMANDS
            elif len(words) == 2 and words[0] == "/set":
                names = [name for name in SAMPLING_OPTIONS if name not in WITHOUT]
            for name in names:
                if name.startswith(words[-1]) and name != words[-1]:
                    yield Completion(name, start_position=-len(words[-1]))

    return CommandCompleter()


def _wrap(text: str) -> str:
    """Breaks long lines between words, indented as they were."""
    width = max(_NARROWEST, shutil.get_terminal_size().columns - 1)
    lines = []
    for line in text.split("\n"):
        if len(line) > width:
            line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        lines.append(line)
    return "\n".join(lines)
