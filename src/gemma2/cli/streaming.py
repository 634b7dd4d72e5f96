"""What `gemma2 generate` and `gemma2 chat` show while a model writes, and how Ctrl-C stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from gemma2.api import LLM
    from gemma2.generation import FinishReason
    from gemma2.sampling import SampledToken, SamplingParams

BOLD: Final = "1"
DIM: Final = "2"
RED: Final = "31"

# Other control characters can move the cursor or recolour the screen, and a model may write any byte. A carriage
# return before a line feed shows nothing in a terminal.
_TERMINAL_SAFE: Final = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], None)
for _kept in "\n\t":
    del _TERMINAL_SAFE[ord(_kept)]


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at the stream, or types into it."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def paint(text: str, style: str, stream: TextIO) -> str:
    """Returns the text in a style (BOLD, DIM, RED), if the stream is a terminal that may show one (no-color.org)."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb"):
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


class TextWriter:
    """Writes a model's text as it comes, each part at once. A terminal gets no control characters.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = is_terminal(stream)
        self._last = "\n"

    def write(self, text: str, style: str = "") -> None:
        """Writes some more of the text."""
        if self._is_terminal:
            text = text.translate(_TERMINAL_SAFE)
        if text:
            self._last = text[-1]
            text = self._lay_out(text)
            self._stream.write(paint(text, style, self._stream) if style else text)
            self._stream.flush()

    def end(self) -> None:
        """Ends the last line, if it has not ended."""
        if self._last != "\n":
            self.write("\n")

    def _lay_out(self, text: str) -> str:
        """Says where lines break."""
        return text


class StopOnInterrupt:
    """While entered, Ctrl-C raises `KeyboardInterrupt` as usual until `can_wait` is set; then a first one only sets
    `is_requested`, and a second one raises.

    So a prompt, which may take minutes to read, is left at once, and an answer is stopped between two tokens.
    """

    def __init__(self) -> None:
        self.can_wait = False
        """Whether someone asks for `is_requested` soon."""
        self.is_requested = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        if self.is_requested or not self.can_wait:
            raise KeyboardInterrupt
        self.is_requested = True


@contextlib.contextmanager
def hidden_keys() -> Iterator[None]:
    """Keeps the keys that are pressed meanwhile from being shown amid a model's text; the next prompt reads them."""
    if not is_terminal(sys.stdin) or sys.platform == "win32":
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    after = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, after)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote, and how long it took."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_prompt_tokens: int
    prompt_seconds: float | None
    """From the start to the first token; None if none came."""
    decode_seconds: float
    """From the first token to the last."""

    @property
    def is_interrupted(self) -> bool:
        """Whether it was stopped from outside."""
        return self.finish_reason == "abort"

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """How fast the prompt was read; None if it never was to its end."""
        return self.num_prompt_tokens / self.prompt_seconds if self.prompt_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """How fast tokens followed the first one; None if none did."""
        num_following = len(self.token_ids) - 1
        return num_following / self.decode_seconds if num_following > 0 and self.decode_seconds else None

    def describe_speed(self) -> str:
        """Says in a few words how much was read and written, and how fast."""
        parts = [_rate(self.num_prompt_tokens, "prompt token", self.prompt_tokens_per_second)]
        parts.append(_rate(len(self.token_ids), "token", self.decode_tokens_per_second))
        return " · ".join(parts)


def _rate(number: int, unit: str, per_second: float | None) -> str:
    text = f"{number:,} {unit}{'s' * (number != 1)}"
    return text if per_second is None else f"{text} at {per_second:,.{0 if per_second >= 100 else 1}f}/s"


def stream_answer(
    llm: LLM, prompt_token_ids: Sequence[int], params: SamplingParams, write: Callable[[str], None]
) -> Answer:
    """Lets a model go on from a prompt, and hands on its text as it comes. Ctrl-C ends that, not the program.

    Args:
        llm: the model.
        prompt_token_ids: the prompt.
        params: how to draw.
        write: takes each part of the text.

    Returns:
        The whole; if it was stopped, what there was.

    Raises:
        Gemma2Error: what the engine refuses.
    """
    start = first = last = time.perf_counter()
    texts: list[str] = []
    token_ids: list[int] = []
    logprobs: list[SampledToken] = []
    completion = None
    with StopOnInterrupt() as interrupt, hidden_keys():
        deltas = llm.engine.stream(prompt_token_ids, llm.sampling_params(params))
        try:
            for delta in deltas:
                last = time.perf_counter()
                interrupt.can_wait = True
                if not token_ids:
                    first = last
                token_ids += delta.token_ids
                logprobs += delta.logprobs or ()
                texts.append(delta.text)
                completion = delta.completion
                write(delta.text)
                if interrupt.is_requested:
                    break
        except KeyboardInterrupt:
            completion = None
        finally:
            deltas.close()
    return Answer(
        text="".join(texts),
        token_ids=tuple(token_ids),
        logprobs=None if params.logprobs is None else tuple(logprobs),
        finish_reason="abort" if completion is None else completion.finish_reason,
        stop_reason=None if completion is None else completion.stop_reason,
        num_prompt_tokens=len(prompt_token_ids),
        prompt_seconds=first - start if token_ids else None,
        decode_seconds=last - first,
    )
