"""`gemma2 chat`, with a model that answers what each test tells it to."""

from __future__ import annotations

import errno
import io
import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import FakeLLM
from cli_terminal import Terminal
from prompt_toolkit.utils import get_cwidth

import gemma2.api
from gemma2.cli import chat_screens
from gemma2.cli.chat_screens import WrappingWriter, history_path
from gemma2.cli.main import main

Talk = Callable[..., tuple[int, str, str]]
"""Sends lines to a model: (exit status, standard output, standard error)."""

_TURN = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
_ANSWERED = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>\n"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def send(llm: FakeLLM, *lines: str | bytes, options: str = "") -> tuple[int, str, str]:
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(gemma2.api, "load", lambda *arguments, **options: llm)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status = main(["chat", *options.split()])
        return status, *capsys.readouterr()

    return send


# -- a model that was tuned for chat --------------------------------------------------------------------------------


def test_a_conversation_goes_on(talk: Talk) -> None:
    llm = FakeLLM(["One.", "Two."], is_chat_tuned=True)
    status, out, err = talk(llm, "First?", "", "Second?")
    assert (status, out) == (0, "One.\nTwo.\n")
    assert llm.prompts[0] == "<bos>" + _TURN.format("First?")
    assert llm.prompts[1] == "<bos>" + _ANSWERED.format("First?", "One.") + _TURN.format("Second?")
    assert "never tuned" not in err
    assert err.count("prompt tokens at") == err.count("of 400") == 2


def test_quiet_shows_answers_and_errors_only(talk: Talk) -> None:
    assert talk(FakeLLM(["a"]), "x", options="-q") == (0, "a\n", "")
    assert talk(FakeLLM(["a"]), "/nothing", options="-q")[2].startswith("gemma2: error: there is no command /nothing")


def test_answers_of_a_tuned_model_end_by_themselves(talk: Talk) -> None:
    llm = FakeLLM(["a" * 300], is_chat_tuned=True)
    assert talk(llm, "x")[1] == "a" * 300 + "\n"
    assert talk(FakeLLM(["a" * 300]), "x")[1] == "a" * 200 + "\n"
    assert talk(llm, "x", options="--max-tokens 7")[1] == "a" * 7 + "\n"


def test_more_goes_on_with_an_answer_that_was_cut(talk: Talk) -> None:
    llm = FakeLLM(["One, two", ", three."], is_chat_tuned=True)
    status, out, err = talk(llm, "Count", "/set max_tokens 8", "/more", "/more")
    assert (status, out) == (0, "One, two\n, three.\nOne, two\n")
    assert "cut off; /more goes on" in err
    assert llm.prompts[1:] == ["<bos>" + _TURN.format("Count") + text for text in ("One, two", "One, two, three.")]


def test_the_system_text_stands_before_the_first_turn(talk: Talk) -> None:
    llm = FakeLLM(["a"], is_chat_tuned=True)
    talk(llm, "x", "/system Be brief.", "y", "/system", "/system -", "z", "/system", options="--system Hm")
    assert [prompt.split("<end_of_turn>")[0] for prompt in llm.prompts] == [
        f"<bos><start_of_turn>user\n{text}" for text in ("Hm\n\nx", "Be brief.\n\nx", "x")
    ]


def test_the_oldest_exchanges_make_room(talk: Talk) -> None:
    # A turn of 60 characters with its answer has 60 + 20 + 24 tokens; an answer gets a quarter of the context.
    llm = FakeLLM(["a" * 20], is_chat_tuned=True, context=400)
    messages = [str(number) * 60 for number in range(6)]
    status, out, err = talk(llm, *messages, options="--system Short")
    assert (status, out) == (0, ("a" * 20 + "\n") * 6)
    shown = [[n for n in range(6) if messages[n] in prompt] for prompt in llm.prompts]
    assert shown == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert all(prompt.startswith("<bos><start_of_turn>user\nShort\n\n") for prompt in llm.prompts)
    assert all(len(ids) <= 300 for ids in llm.fake_backend.prompts)
    assert "the context of 400 tokens is full: the model no longer sees the oldest exchange; the system text" in err
    assert "no longer sees the 3 oldest exchanges" in err
    assert err.count("is full") == 3


def test_a_message_longer_than_the_context_is_refused_and_forgotten(talk: Talk) -> None:
    llm = FakeLLM(["ok"], is_chat_tuned=True)
    status, out, err = talk(llm, "a", "b" * 400, "c")
    assert (status, out) == (1, "ok\nok\n")
    assert "the message has 416 tokens, but the context holds 400" in err
    assert llm.prompts[1] == "<bos>" + _ANSWERED.format("a", "ok") + _TURN.format("c")
    # One that leaves hardly any room is answered as far as it goes.
    for options in ("", "--max-tokens 50"):
        llm = FakeLLM(["abcdef"], is_chat_tuned=True)
        assert talk(llm, "hello", "b" * 381, options=options)[1] == "abcdef\nabc\n"


def test_a_failure_leaves_the_conversation_as_it_was(talk: Talk) -> None:
    llm = FakeLLM(["one", "two", "three"], is_chat_tuned=True, fail_at=1)
    status, out, err = talk(llm, "a", "b", "/retry")
    assert (status, out) == (1, "one\nthree\n")
    assert "logits are NaN" in err
    assert llm.prompts[2] == "<bos>" + _TURN.format("a")


# -- a model that was not -------------------------------------------------------------------------------------------


def test_an_untuned_model_continues_one_text(talk: Talk) -> None:
    llm = FakeLLM([" a king", " old.", "\nHe died.", ""])
    status, out, err = talk(llm, "There was  ", "was", ", very", "/more", "End")
    assert (status, out) == (0, " a king\n old.\n\nHe died.\n a king\n")
    assert "never tuned for chat: it does not answer, it continues a text" in err
    assert "ended here without a word" in err
    assert llm.prompts == [
        "<bos>There was",
        "<bos>There was a king was",
        "<bos>There was a king was old., very",
        "<bos>There was a king was old., very\nHe died.",
        "<bos>There was a king was old., very\nHe died. End",
    ]


def test_the_system_text_begins_the_text(talk: Talk) -> None:
    llm = FakeLLM([" a."])
    talk(llm, "/system Chapter 1", "/more", "B")
    assert llm.prompts == ["<bos>Chapter 1\n\n", "<bos>Chapter 1\n\n a. B"]


def test_the_beginning_of_a_long_text_makes_room(talk: Talk) -> None:
    llm = FakeLLM(["a" * 150], context=400)
    lines = ["b" * 40, "c" * 40, "d" * 40, "e" * 40]
    status, _, err = talk(llm, "/system Book", *lines)
    assert status == 0
    assert [len(ids) for ids in llm.fake_backend.prompts] == [47, 200, 200, 200]
    assert all(prompt.startswith("<bos>Book\n\n") for prompt in llm.prompts)
    assert llm.prompts[3].endswith("a" * 100 + " " + "e" * 40)
    assert err.count("no longer sees the beginning of the text; the system text stays") == 1


def test_a_system_text_that_leaves_no_room_is_refused(talk: Talk) -> None:
    status, out, err = talk(FakeLLM(["a"], context=400), f"/system {'x' * 300}", "y", "/system -", "y")
    assert (status, out) == (1, "a\n")
    assert "the system text has 303 tokens, but 100 are the most" in err


# -- commands -------------------------------------------------------------------------------------------------------


def test_undo_retry_and_reset(talk: Talk) -> None:
    llm = FakeLLM(["1", "2", "3", "4", "5"], is_chat_tuned=True)
    status, out, err = talk(llm, "a", "b", "/undo", "c", "/retry", "/reset", "/undo", "/retry", "d")
    assert (status, out) == (1, "1\n2\n3\n4\n5\n")
    after_a = "<bos>" + _ANSWERED.format("a", "1")
    assert llm.prompts[1:] == [
        after_a + _TURN.format("b"),
        after_a + _TURN.format("c"),
        after_a + _TURN.format("c"),
        "<bos>" + _TURN.format("d"),
    ]
    assert "dropped “b” and its answer; 1 exchange left" in err
    assert "there is no answer yet to undo" in err and "there is no answer yet to try again" in err


def test_retry_with_a_seed_differs_and_can_be_made_again(talk: Talk) -> None:
    lines = ("x", "/retry", "/retry", "y")
    first = talk(FakeLLM(None), *lines, options="--seed 1 --max-tokens 12")[1].splitlines()
    assert len(set(first[:3])) == 3
    assert talk(FakeLLM(None), *lines, options="--seed 1 --max-tokens 12")[1].splitlines() == first
    err = talk(FakeLLM(["a"]), "x", "/retry", options="--temperature 0")[2]
    assert "at temperature 0 the answer stays the same" in err


def test_set_changes_and_shows_options(talk: Talk) -> None:
    llm = FakeLLM(["ab\ncd"])
    status, out, err = talk(llm, "/set --Stop \\n", "x", '/set stop ["b", "c"]', "x", "/set stop none", "x", "/set")
    assert (status, out) == (0, "ab\na\nab\ncd\n")
    shown = dict(line.split(maxsplit=1) for line in err.splitlines()[-10:])
    assert shown["temperature"] == "0.8" and shown["stop"] == "none" and shown["ignore_eos"] == "off"
    assert "logprobs" not in shown
    lines = ("/set top-k 5", "/set top_k", "/set top_k off", "/set stop_token_ids 1,2", '/set stop ["[x"]')
    err = talk(FakeLLM(), *lines)[2]
    assert [line.split(maxsplit=1)[1] for line in err.splitlines()[1:]] == ["5", "5", "none", "1,2", '["[x"]']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sve x", "there is no command /sve. Did you mean '/save'?"),
        ("/", "there is no command /. /help lists them."),
        ("/set temprature 1", "Did you mean 'temperature'?"),
        ("/set logprobs 1", "there is no sampling option 'logprobs'"),
        ("/set temperature hot", "temperature must be a number, but is 'hot'"),
        ("/set top_p 2", "top_p must be a number above 0 and at most 1"),
        ("/set ignore_eos maybe", "ignore_eos must be on or off"),
        ('/set stop ["a"', "stop must be a text, a list"),
        ("/set stop [1]", "stop must be a string or a list of strings"),
        ("/undo 2", "/undo stands alone"),
        ("/save", "/save needs more: /save FILE"),
        ("/save x.txt", "x.txt: a conversation's file ends in .json or .md"),
        ("/save x.json", "there is nothing to save yet"),
        ("/load none.json", "none.json: cannot be read: No such file"),
        ("/load x.md", "x.md: Markdown is for reading; only what /save wrote to a .json file can be loaded"),
        ("/load x.txt", "x.txt: a conversation's file ends in .json; add"),
        ("/more", "there is no text yet"),
        (b"caf\xe9", "standard input, line 1: needs to be UTF-8, but byte 3 (0xe9) is not"),
    ],
)
def test_mistakes_are_one_line_and_the_chat_goes_on(
    talk: Talk, line: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = talk(FakeLLM(["on"]), line, "x", options="--quiet")
    assert (status, out) == (1, "on\n")
    assert err.startswith("gemma2: error: ") and message in err and err.count("\n") == 1


def test_help_lists_commands_and_exit_leaves(talk: Talk) -> None:
    status, out, err = talk(FakeLLM(), "/help", "/Exit", "never sent", options="-q")
    assert (status, out) == (0, "")
    for command in ("/reset", "/system", "/save", "/load", "/set", "/undo", "/retry", "/more", "/exit"):
        assert f"\n{command} " in f"\n{err}"


def test_slashes_and_backslashes(talk: Talk) -> None:
    llm = FakeLLM(["ok"], is_chat_tuned=True)
    assert talk(llm, "//etc\\", "  is a folder\\", "")[:2] == (0, "ok\n")
    assert llm.prompts == ["<bos>" + _TURN.format("/etc\n  is a folder")]


# -- files ----------------------------------------------------------------------------------------------------------


def test_save_and_load(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk(FakeLLM(["é{}", "B"], is_chat_tuned=True), "a", "b\\", "c", f"/save {file}", options="--system Hm")
    saved = json.loads(file.read_text())
    assert saved["messages"] == [
        {"role": "system", "content": "Hm"},
        {"role": "user", "content": "a"},
        {"role": "model", "content": "é{}"},
        {"role": "user", "content": "b\nc"},
        {"role": "model", "content": "B"},
    ]
    assert saved["sampling"]["temperature"] == 0.8
    llm = FakeLLM(["C"], is_chat_tuned=True)
    again = tmp_path / "again.json"
    status, _, err = talk(llm, "forgotten", f"/load {file}", f"/save {again}", "d")
    assert status == 0 and "loaded 2 exchanges" in err
    assert json.loads(again.read_text())["messages"] == saved["messages"]
    assert llm.prompts[1] == (
        "<bos>" + _ANSWERED.format("Hm\n\na", "é{}") + _ANSWERED.format("b\nc", "B") + _TURN.format("d")
    )


def test_markdown(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.md"
    talk(FakeLLM([" A\n"], is_chat_tuned=True), "a", f"/save {file}", options="--system Hm")
    assert file.read_text() == (
        "# A conversation with the bundled model\n\n## System\n\nHm\n\n## User\n\na\n\n## Model\n\nA\n"
    )
    file = tmp_path / "text.md"
    talk(FakeLLM([" was"]), "There", "a king", f"/save {file}", options="--system Tales")
    assert file.read_text() == "Tales\n\nThere was a king was\n"


def test_a_file_is_not_written_over_without_asking(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text("mine")
    status, _, err = talk(FakeLLM(["A"]), "a", f"/save {file}")
    assert status == 1 and "is there already and was left as it is" in err
    assert file.read_text() == "mine"


def test_saving_fails_without_a_trace(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("folder.md", "is a folder"),
        ("none/talk.md", "cannot be written: No such file"),
        ("file/talk.md", "cannot be written: Not a directory"),
    ):
        status, _, err = talk(FakeLLM(["A"]), "a", f"/save {tmp_path / name}")
        assert status == 1 and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.md"]


def test_a_full_disk_leaves_nothing_behind(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, target: Path) -> Path:
        assert path.read_text() == "There was\n" and path.parent == target.parent
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    status, _, err = talk(FakeLLM([" was"]), "There", f"/save {tmp_path / 'text.md'}")
    assert status == 1 and "cannot be written: No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_other_programs_lists_of_messages_load(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]')
    llm = FakeLLM(["C"], is_chat_tuned=True)
    assert talk(llm, f"/load {file}", "c")[0] == 0
    assert llm.prompts == ["<bos>" + _ANSWERED.format("a", "b") + _TURN.format("c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON in UTF-8"),
        ("[" * 100_000, "is not JSON in UTF-8"),
        ('{"text": 1}', "this is neither"),
        ("[1]", "message 0: must be an object"),
        ("[]", "at least one message"),
        ('[{"role": "user", "content": "a"}]', "message 0: is a user's and has no answer"),
        ('[{"role": "bot", "content": "a"}]', "message 0: the role must be one of"),
        ('[{"role": "user"}]', "message 0: has no 'content'"),
        ('[{"role": "system"}]', "message 0: content must be a text"),
        ('[{"role": "model", "content": "a"}]', "user and model must take turns"),
        ('[{"role": "user", "content": [{"type": "text", "text": "a"}]}]', "message 0: content must be a text"),
    ],
)
def test_damaged_files_are_refused(talk: Talk, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    llm = FakeLLM(["A", "B"], is_chat_tuned=True)
    status, _, err = talk(llm, "a", f"/load {file}", "b", options="-q")
    assert status == 1
    assert message in err and err.count("\n") == 1
    assert llm.prompts[1].startswith("<bos>" + _ANSWERED.format("a", "A"))  # the conversation is still there


# -- Ctrl-C and terminals -------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_script(talk: Talk) -> None:
    status, out, _ = talk(FakeLLM(["abcdef"], interrupt_at=(2,)), "x", "y")
    assert (status, out) == (130, "abc\n")


def test_ctrl_c_while_a_message_is_read(talk: Talk) -> None:
    llm = FakeLLM(["abcdef"], context=2000, interrupt_at=(0,), is_chat_tuned=True)
    status, out, err = talk(llm, "x" * 1200, "y")
    assert (status, out.strip()) == (130, "") and "stopped before the first word" in err
    assert llm.fake_backend.num_steps == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    fake_model = {"answers": ["abcdefghij" * 20, "second"], "is_chat_tuned": True, "seconds": 0.05}
    with Terminal("chat", fake_model=fake_model, folder=tmp_path) as terminal:
        terminal.wait_for("Enter sends")
        terminal.type("hello\r")
        terminal.wait_for("abc")
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        terminal.wait_for("Enter sends")
        terminal.type("again\r")
        terminal.wait_for("second")
        terminal.wait_for("Enter sends")
        terminal.type("/save talk.json\r")
        terminal.wait_for("saved 2 exchanges")
        terminal.wait_for("Enter sends")
        terminal.type("/save talk.json\r")
        terminal.wait_for("write over it? [y/N]")
        terminal.type("n\r")
        terminal.wait_for("left as it is")
        terminal.wait_for("Enter sends")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again leaves")
        terminal.type("\x03")
        assert terminal.wait_for_end() == 0
    first = json.loads((tmp_path / "talk.json").read_text())["messages"][1]
    assert first["interrupted"] is True
    assert first["content"].startswith("abc") and len(first["content"]) < 200
    history = tmp_path / "state" / "gemma2" / "chat_history"
    assert "+hello\n" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_typing(tmp_path: Path) -> None:
    with Terminal("chat", fake_model={"answers": ["ok"], "is_chat_tuned": True}, folder=tmp_path) as terminal:
        terminal.wait_for("Enter sends")
        terminal.type("never sent\x03")
        terminal.wait_for("Ctrl-C again leaves")
        terminal.type("one\\\rtwo\x1b\rthree")
        terminal.type("\x1b[200~four\nfive\x1b[201~\r")  # a paste
        terminal.wait_for("ok")
        terminal.wait_for("Enter sends")
        terminal.type("/save talk.json\r")
        terminal.wait_for("saved")
        terminal.wait_for("Enter sends")
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["content"] for message in messages] == ["one\ntwo\nthreefour\nfive", "ok"]


def test_an_untuned_model_says_so_and_goes_on_alone(tmp_path: Path) -> None:
    with Terminal("chat", fake_model={"answers": [" was", " a king"]}, folder=tmp_path) as terminal:
        terminal.wait_for("never tuned for chat")
        terminal.wait_for("Enter sends")
        terminal.type("There\r")
        terminal.wait_for(" was")
        terminal.wait_for("Enter sends")
        terminal.type("\r")
        terminal.wait_for(" a king")
        terminal.wait_for("Enter sends")
        terminal.type("/exit\r")
        assert terminal.wait_for_end() == 0


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_lines_break_between_words(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    text = "the quick brown fox jumps over the lazy dog\n\nand a_word_that_is_longer_than_a_line 日本語日本語日本語 end"
    monkeypatch.setenv("COLUMNS", "21")  # 20 are used
    stream = io.StringIO()
    writer = WrappingWriter(stream)
    for start in range(0, len(text), length):
        writer.write(text[start : start + length])
    assert _screen(stream.getvalue()) == [
        "the quick brown fox ",
        "jumps over the lazy ",
        "dog",
        "",
        "and ",
        "a_word_that_is_longe",
        "r_than_a_line ",
        "日本語日本語日本語 ",
        "end",
    ]


def _screen(output: str) -> list[str]:
    """What a terminal shows of the output: text, line breaks, cursor back and erase to the end of the line."""
    lines = [""]
    for part in re.findall(r"\x1b\[\d*[DK]|\n|[^\x1b\n]", output):
        if part == "\n":
            lines.append("")
        elif part.endswith("D") and part[0] == "\x1b":
            columns = int(part[2:-1])
            while columns:
                columns -= get_cwidth(lines[-1][-1])
                lines[-1] = lines[-1][:-1]
        elif part != "\x1b[K":
            lines[-1] += part
    return lines


def test_history_goes_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "gemma2" / "chat_history"
    for value in ("", "relative"):  # the XDG specification has relative ones ignored
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert history_path() == Path.home() / ".local" / "state" / "gemma2" / "chat_history"


def test_no_place_for_history_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder is needed")
    history: Any = chat_screens._open_history(tmp_path / "state" / "gemma2" / "chat_history")
    history.append_string("kept while the program runs")
    assert history.get_strings() == ["kept while the program runs"]
