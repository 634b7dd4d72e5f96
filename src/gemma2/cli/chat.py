"""`gemma2 chat`: talk with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gemma2.cli.model_options import add_model_arguments, load_model
from gemma2.cli.sampling_options import DEFAULT_MAX_TOKENS, add_sampling_arguments, given_sampling
from gemma2.cli.streaming import is_terminal
from gemma2.errors import Gemma2Error

if TYPE_CHECKING:
    from gemma2.cli.chat_session import ChatSession, Screen

_NOT_TUNED = (
    "This model was never tuned for chat: it does not answer, it continues a text. What you type is added to the text, "
    "the model goes on from there, then you again. /more lets it go on alone; /system TEXT puts a text at the very "
    "beginning; /reset begins anew."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Talks with a model. /help lists the commands. In a pipe each line of standard input is a message or command,\n"
        "and only answers go to standard output."
    )
    parser.add_argument("--system", metavar="TEXT", default="", help="instructions for the model; /system changes them")
    parser.add_argument("-q", "--quiet", action="store_true", help="show answers and errors only: no speed, no notices")
    add_model_arguments(parser)
    add_sampling_arguments(
        parser,
        default_max_tokens=f"none; {DEFAULT_MAX_TOKENS} for a model that was never tuned for chat",
        without=("logprobs",),
    )


def run(args: argparse.Namespace) -> int:
    """Chats until the user leaves."""
    from gemma2.cli.chat_screens import PlainScreen, TerminalScreen, history_path
    from gemma2.cli.chat_session import ChatSession

    settings = given_sampling(args)
    llm = load_model(args, quiet=args.quiet)
    screen: Screen
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        screen = TerminalScreen(history_path(), quiet=args.quiet)
    elif sys.stdin is None:
        raise Gemma2Error("a chat needs standard input, but it is closed")
    else:
        screen = PlainScreen(sys.stdin.buffer, quiet=args.quiet)
    model_name = args.model or "the bundled model"
    session = ChatSession(llm, model_name=model_name, screen=screen, settings=settings, system=args.system)
    if screen.is_interactive:
        screen.notice(f"{model_name}, context {session.context:,} tokens. /help lists the commands.")
    if not llm.is_chat_tuned:
        screen.notice(_NOT_TUNED)
    return _talk(session)


def _talk(session: ChatSession) -> int:
    """Reads and handles messages; returns 1 if one failed and nobody was there to see it, 130 after Ctrl-C."""
    from gemma2.cli.chat_commands import Leave

    screen = session.screen
    has_failed = False
    while True:
        try:
            message = screen.read()
            if message is None:
                break
            session.was_interrupted = False
            _handle(session, message)
        except Leave:
            break
        except KeyboardInterrupt:
            session.was_interrupted = True
        except Gemma2Error as error:
            screen.error(" ".join(str(error).split()))
            has_failed = True
        if session.was_interrupted and not screen.is_interactive:
            return 130
    return int(has_failed and not screen.is_interactive)


def _handle(session: ChatSession, message: str) -> None:
    from gemma2.cli.chat_commands import is_command, run_command

    if is_command(message):
        run_command(session, message)
    elif message.strip() or ("\n" in message and not session.llm.is_chat_tuned):
        session.send(message.removeprefix("/") if message.startswith("//") else message)
    elif session.screen.is_interactive and not session.llm.is_chat_tuned:
        session.go_on()  # Enter alone; in a pipe an empty line is only that
