"""The commands of `gemma2 chat`: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemma2.cli.chat_files import check_suffix, load_conversation, save_conversation
from gemma2.cli.chat_session import WITHOUT, ChatSession
from gemma2.cli.conversation import Conversation
from gemma2.cli.sampling_options import SAMPLING_OPTIONS, find_option, format_setting, parse_setting
from gemma2.errors import Gemma2Error, nearest_name


@dataclass(frozen=True)
class Command:
    """One command."""

    arguments: str
    help: str
    run: Callable[[ChatSession, str], None]
    """Takes what follows the command's name, without spaces around it."""
    needs_argument: bool = False


class Leave(Exception):
    """Ends the chat."""


def is_command(message: str) -> bool:
    """Whether a message is for the program and not for the model."""
    return message.startswith("/") and not message.startswith("//")


def run_command(session: ChatSession, message: str) -> None:
    """Runs one command.

    Args:
        session: what it works on.
        message: the whole line, slash included.

    Raises:
        Leave: the command was /exit.
        Gemma2Error: there is no such command (the nearest is named), or it cannot be done.
    """
    first, *rest = message.split(maxsplit=1)
    name, argument = first.lower(), "".join(rest).strip()
    command = COMMANDS.get(name)
    if command is None:
        hint = nearest_name(name, COMMANDS) or " /help lists them."
        raise Gemma2Error(f"there is no command {name}.{hint}")
    if command.needs_argument and not argument:
        raise Gemma2Error(f"{name} needs more: {name} {command.arguments}")
    if argument and not command.arguments:
        raise Gemma2Error(f"{name} stands alone, but {argument!r} follows it")
    command.run(session, argument)


def _help(session: ChatSession, argument: str) -> None:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.arguments}':<{width}}  {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "A message that begins with a slash is written with two: //etc is a folder."]
    if session.screen.is_interactive:
        lines += ["Enter sends; Alt-Enter, or a backslash at the end of the line, begins a new line."]
        lines += ["Ctrl-C stops an answer, clears the line, and twice leaves; so does Ctrl-D."]
    session.screen.say("\n".join(lines))


def _reset(session: ChatSession, argument: str) -> None:
    session.replace_conversation(Conversation(system=session.conversation.system))
    session.screen.notice("a new conversation" + ("; the system text stays" if session.conversation.system else ""))


def _system(session: ChatSession, argument: str) -> None:
    if not argument:
        session.screen.say(session.conversation.system or "there is no system text; /system TEXT sets one")
        return
    session.conversation.system = "" if argument == "-" else argument
    session.screen.notice("the system text is removed" if argument == "-" else "the system text is set")


def _set(session: ChatSession, argument: str) -> None:
    names = [name for name in SAMPLING_OPTIONS if name not in WITHOUT]
    if argument:
        name, *text = argument.split(maxsplit=1)
        field = find_option(name, without=WITHOUT)
        if text:
            session.params = session.params.replace(**{field: parse_setting(field, text[0])})
        names = [field]
    width = max(map(len, names))
    session.screen.say("\n".join(f"{name:<{width}}  {format_setting(getattr(session.params, name))}" for name in names))


def _undo(session: ChatSession, argument: str) -> None:
    dropped = session.undo()
    left = len(session.conversation.exchanges)
    session.screen.notice(
        f"dropped {_shortened(dropped.user)} and its answer; {left} exchange{'s' * (left != 1)} left"
        if dropped.user
        else "dropped what was added last"
    )


def _save(session: ChatSession, argument: str) -> None:
    path = _path(argument)
    check_suffix(path)
    conversation = session.conversation
    if not conversation.exchanges and not conversation.system:
        raise Gemma2Error("there is nothing to save yet")
    if path.is_file() and not session.screen.confirm(f"{path} is there already; write over it?"):
        raise Gemma2Error(f"{path} is there already and was left as it is; choose another name")
    save_conversation(
        path,
        conversation,
        model=session.model_name,
        is_chat_tuned=session.llm.is_chat_tuned,
        sampling={name: getattr(session.params, name) for name in SAMPLING_OPTIONS if name not in WITHOUT},
    )
    session.screen.notice(f"saved {_count(conversation)} to {path}")


def _load(session: ChatSession, argument: str) -> None:
    path = _path(argument)
    session.replace_conversation(load_conversation(path))
    session.screen.notice(f"loaded {_count(session.conversation)} from {path}; the settings stay as they are")


def _more(session: ChatSession, argument: str) -> None:
    session.go_on()


def _retry(session: ChatSession, argument: str) -> None:
    session.retry()


def _exit(session: ChatSession, argument: str) -> None:
    raise Leave


def _path(argument: str) -> Path:
    try:
        return Path(argument).expanduser()
    except RuntimeError:  # ~somebody
        raise Gemma2Error(f"{argument}: there is no such user") from None


def _count(conversation: Conversation) -> str:
    number = len(conversation.exchanges)
    return f"{number} exchange{'s' * (number != 1)}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line}”" if len(line) <= 40 else f"“{line[:39]}…”"


COMMANDS: Final[dict[str, Command]] = {
    "/help": Command("", "list the commands", _help),
    "/retry": Command("", "drop the last answer and ask for another", _retry),
    "/more": Command("", "let the model go on where it stopped", _more),
    "/undo": Command("", "drop the last exchange", _undo),
    "/reset": Command("", "begin a new conversation", _reset),
    "/system": Command("[TEXT]", "set or show the system text; - removes it", _system),
    "/set": Command("[NAME VALUE]", "change or show sampling options, as in /set temperature 0.5", _set),
    "/save": Command("FILE", "write the conversation to a .json or .md file", _save, needs_argument=True),
    "/load": Command("FILE.json", "go on with a saved conversation", _load, needs_argument=True),
    "/exit": Command("", "leave", _exit),
    "/quit": Command("", "leave", _exit),
}
