"""Every form says what it says, is told from its columns, and what a record lacks is named with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from examples_in_files import ANSWER, FORMS, QUESTION, TURNS, write_records

from gemma2.data import Conversation, Example, ExampleError, PlainText, PreferencePair, PromptCompletion, Record
from gemma2.data.forms import check_columns, choose_form, read_example
from gemma2.errors import DataError


def record(values: dict[str, Any], number: int = 1) -> Record:
    return Record(values=values, source="x.jsonl", unit="line", number=number)


def read(values: dict[str, Any], format: Any = "auto", columns: dict[str, str] | None = None) -> Example:
    return read_example(
        record(values), choose_form([record(values)], format=format, columns=columns or {}).form, columns or {}
    )


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "model", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_told_and_read(name: str) -> None:
    values = {"id": 7, **FORMS[name]}
    choice = choose_form([record(values)], format="auto", columns={})
    assert choice.form.name == name
    example = read_example(record(values), choice.form, {})
    if name in ("messages", "sharegpt"):
        assert example == Conversation(messages=(user(QUESTION), model(ANSWER)))
    else:
        assert example == PromptCompletion(prompt=QUESTION, completion=ANSWER)


def test_what_is_told_comes_with_its_reason() -> None:
    assert str(choose_form([record(FORMS["question_answer"])], format="auto", columns={})) == (
        "x.jsonl: question_answer, as its columns are 'question', 'answer'"
    )
    columns = {"instruction": "ask", "input": "about"}
    choice = choose_form([record({"ask": "a", "about": "b", "output": "c"})], format="auto", columns=columns)
    assert str(choice) == "x.jsonl: alpaca, as its columns are 'ask' for 'instruction', 'output', 'about' for 'input'"
    forced = choose_form([record({"x": 1})], format="text", columns={})
    assert str(forced) == "x.jsonl: text, as the settings say"


def test_text() -> None:
    assert read({"text": " kept as it is\n"}) == PlainText(text=" kept as it is\n")


def test_alpaca_with_an_input() -> None:
    for instruction, context, prompt in (("Add.", "1 2", "Add.\n\n1 2"), ("", "1 2", "1 2"), ("Add.", " ", "Add.")):
        found = read({"instruction": instruction, "input": context, "output": "3"})
        assert found == PromptCompletion(prompt=prompt, completion="3")
    assert read({"instruction": "Add.", "input": None, "output": "3"}) == PromptCompletion(
        prompt="Add.", completion="3"
    )
    assert read({"instruction": "Add.", "output": "3"}) == PromptCompletion(prompt="Add.", completion="3")


def test_roles_have_many_names() -> None:
    names = ["system", "human", "gpt", "user", "chatgpt", "human", "bing", "user", "bard", "user", "model"]
    found = read({"conversations": [{"from": name, "value": str(place)} for place, name in enumerate(names)]})
    assert isinstance(found, Conversation)
    assert [message["role"] for message in found.messages] == ["system", *["user", "model"] * 5]
    assert [message["content"] for message in found.messages] == [str(place) for place in range(11)]


def test_either_spelling_of_messages_is_read_under_either_name() -> None:
    expected = read(FORMS["messages"])
    assert read({"conversations": TURNS}) == expected
    assert read({"messages": FORMS["sharegpt"]["conversations"]}) == expected
    # As a table has it whose rows are spelled in two ways.
    both = [{"role": None, "content": None, **message} for message in FORMS["sharegpt"]["conversations"]]
    assert read({"messages": both}) == expected


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "How many "}, {"type": "text", "text": "legs?", "image_url": None}]
    assert read({"messages": [user(parts), model("8")]}) == read({"messages": [user("How many legs?"), model("8")]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"train": True}, {"train": True}),
        ({"train": 0, "weight": None}, {"train": False}),
        ({"train": None, "weight": 0}, {"train": False}),
        ({"weight": 0.0}, {"train": False}),
        ({"weight": False, "train": False}, {"train": False}),
        ({"weight": 1}, {}),  # as it is without
        ({"weight": 1, "train": False}, {"train": False}),
        ({"weight": 1.0, "train": 1}, {"train": True}),
    ],
)
def test_messages_say_whether_they_are_trained(flags: dict[str, Any], expected: dict[str, bool]) -> None:
    told = Conversation(messages=(user("a"), {**model("b"), **expected}))
    assert read({"messages": [user("a"), {**model("b"), **flags}]}) == told
    assert read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **flags}]}) == told


def test_prompts_and_completions_of_messages() -> None:
    prompt = [system("S"), user("a"), {"role": "assistant", "content": "b"}, user("c")]
    expected = Conversation(messages=(system("S"), user("a"), model("b"), user("c"), model("d")), num_given=4)
    assert read({"prompt": prompt, "completion": [model("d")]}) == expected
    assert read({"prompt": prompt, "completion": "d"}) == expected
    assert read({"prompt": "c", "completion": [model("d")]}) == Conversation(
        messages=(user("c"), model("d")), num_given=1
    )


def test_a_system_column_is_read_only_if_it_is_named() -> None:
    columns = {"system": "system"}
    with_system = {"question": "a", "answer": "b", "system": "S"}
    assert read(with_system) == PromptCompletion(prompt="a", completion="b")
    assert read(with_system, columns=columns) == Conversation(
        messages=(system("S"), user("a"), model("b")), num_given=2
    )
    for blank in ("", None):
        assert read({**with_system, "system": blank}, columns=columns) == PromptCompletion(prompt="a", completion="b")
    assert read({**FORMS["messages"], "hint": "S"}, columns={"system": "hint"}) == Conversation(
        messages=(system("S"), user(QUESTION), model(ANSWER))
    )
    with pytest.raises(ExampleError, match="'system' must be a string, but is a number"):
        read({**with_system, "system": 1}, columns=columns)


PAIR = PreferencePair(
    chosen=PromptCompletion(prompt="a", completion="yes"), rejected=PromptCompletion(prompt="a", completion="no")
)
CHAT_PAIR = PreferencePair(
    chosen=Conversation(messages=(user("a"), model("yes")), num_given=1),
    rejected=Conversation(messages=(user("a"), model("no")), num_given=1),
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "a", "chosen": "yes", "rejected": "no"}, PAIR),
        ({"prompt": [user("a")], "chosen": [model("yes")], "rejected": [model("no")]}, CHAT_PAIR),
        ({"prompt": "a", "chosen": [model("yes")], "rejected": [model("no")]}, CHAT_PAIR),
        ({"prompt": [user("a")], "chosen": "yes", "rejected": [model("no")]}, CHAT_PAIR),
        ({"chosen": [user("a"), model("yes")], "rejected": [user("a "), model("no")]}, CHAT_PAIR),
        ({"prompt": " a", "chosen": [user("a"), model("yes")], "rejected": [user("a"), model("no")]}, CHAT_PAIR),
        ({"prompt": None, "chosen": [user("a"), model("yes")], "rejected": [user("a"), model("no")]}, CHAT_PAIR),
        ({"prompt": [user("a")], "chosen": [user("a"), model("yes")], "rejected": [user("a"), model("no")]}, CHAT_PAIR),
    ],
)
def test_preference_pairs(values: dict[str, Any], expected: PreferencePair) -> None:
    found = read(values)
    assert isinstance(found, PreferencePair)
    assert found.chosen == expected.chosen
    assert str(found.rejected).replace("'a '", "'a'") == str(expected.rejected)


def test_a_pair_with_a_long_common_beginning_and_long_answers() -> None:
    common = [system("S"), user("a"), model("b"), user("c")]
    found = read({"chosen": [*common, model("d"), user("e"), model("f")], "rejected": [*common, model("g")]})
    assert isinstance(found, PreferencePair)
    assert isinstance(found.chosen, Conversation) and isinstance(found.rejected, Conversation)
    assert (found.chosen.num_given, found.rejected.num_given) == (4, 4)
    assert [message["content"] for message in found.chosen.messages[4:]] == ["d", "e", "f"]


def test_flags_do_not_part_a_pair() -> None:
    chosen, rejected = [{**user("a"), "train": False}, model("yes")], [user("a"), model("no")]
    for prompt in ({}, {"prompt": [user("a")]}):
        found = read({**prompt, "chosen": chosen, "rejected": rejected})
        assert isinstance(found, PreferencePair) and isinstance(found.chosen, Conversation)
        assert found.chosen.num_given == 1


def test_columns_with_other_names() -> None:
    values = {"question": "a", "answer": "b", "prompt": "not this"}
    columns = {"prompt": "question", "completion": "answer"}
    assert choose_form([record(values)], format="auto", columns=columns).form.name == "prompt_completion"
    assert read(values, columns=columns) == PromptCompletion(prompt="a", completion="b")
    # A column that is given to one field is no other's.
    assert read({"instruction": "a", "output": "b", "text": "c"}, columns={"text": "output"}) == PlainText(text="b")
    assert read({"a": "1", "input": "2", "b": "3"}, columns={"instruction": "a", "output": "b"}) == PromptCompletion(
        prompt="1\n\n2", completion="3"
    )
    assert read({"input": "1", "output": "3"}, columns={"instruction": "input"}) == PromptCompletion(
        prompt="1", completion="3"
    )


def test_the_form_is_the_one_of_most_records() -> None:
    odd = [record({"text": "x"}, 1), *(record(FORMS["messages"], number) for number in (2, 3)), record({}, 4)]
    assert choose_form(odd, format="auto", columns={}).form.name == "messages"


@pytest.mark.parametrize(
    ("values", "columns", "message"),
    [
        (
            {"messsages": TURNS, "id": 3},
            {},
            r"^x.jsonl: no form of examples has the columns 'messsages', 'id'. Did you mean 'messages'\? The forms are "
            r"messages \(messages\), sharegpt \(conversations\), prompt_completion \(prompt, completion\), .*"
            r"preference \(chosen, rejected\); if columns have other names, give them, such as columns: {prompt: ",
        ),
        ({}, {}, "no form of examples has the columns none. The forms are"),
        ({"text": None}, {}, "no form of examples has the columns 'text'. The forms are"),
        ({f"column{number}": 1 for number in range(30)}, {}, "'column11', …"),
        (
            {"instruction": "a", "output": "b", "text": "c"},
            {},
            r"^x.jsonl: the columns 'instruction', 'output', 'text' fit several forms, alpaca \(instruction, output\) "
            r"and text \(text\); set format to the one that is meant$",
        ),
        ({"question": "a", "answer": "b"}, {"prompt": "question"}, "no form of examples has"),
    ],
)
def test_a_form_that_cannot_be_told(values: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_form([record(values)], format="auto", columns=columns)


def test_columns_must_be_of_the_form() -> None:
    check_columns({"prompt": "q", "system": "s"}, "auto")
    with pytest.raises(DataError, match=r"the format 'auto' has no field 'promt'; .* Did you mean 'prompt'\?"):
        check_columns({"promt": "q"}, "auto")
    with pytest.raises(DataError, match=r"the format 'text' has no field 'prompt'; it has text."):
        check_columns({"prompt": "q"}, "text")


def missing(*names: str) -> dict[str, Any]:
    return {"messages": [{name: "user" for name in names}]}


BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no column": (
        "question_answer",
        {"question": "a", "anser": "b"},
        "missing column",
        r"no column 'answer'; the columns are 'question', 'anser'. Did you mean 'anser'\?",
    ),
    "null": ("text", {"text": None}, "not text", "'text' must be a string, but is null"),
    "a number": (
        "prompt_completion",
        {"prompt": 3, "completion": "b"},
        "not text",
        "'prompt' must be a string, but is a number",
    ),
    "an object": (
        "alpaca",
        {"instruction": "a", "output": {}},
        "not text",
        "'output' must be a string, but is an object",
    ),
    "bytes": ("text", {"text": b"x"}, "not text", "'text' must be a string, but is a bytes"),
    "half a surrogate pair": (
        "text",
        {"text": "a\ud800"},
        "not text",
        "'text' holds half of a surrogate pair at character 1",
    ),
    "half a pair in a message": (
        "messages",
        {"messages": [user("\udc00")]},
        "not text",
        "'messages', message 0 holds half of a surrogate",
    ),
    "blank text": ("text", {"text": " \n"}, "empty turn", "'text' is empty; remove the example or fill it"),
    "blank prompt": ("prompt_completion", {"prompt": "", "completion": "b"}, "empty turn", "'prompt' is empty"),
    "blank completion": (
        "prompt_completion",
        {"prompt": "a", "completion": "\t"},
        "empty turn",
        "'completion' is empty",
    ),
    "blank instruction": (
        "alpaca",
        {"instruction": "", "input": "", "output": "b"},
        "empty turn",
        "'instruction' and 'input' are empty",
    ),
    "messages that are text": (
        "messages",
        {"messages": "hello"},
        "not messages",
        r"'messages' must be a list of messages \{'role': …, 'content': …\}, but is a string",
    ),
    "messages that are an object": ("sharegpt", {"conversations": {}}, "not messages", "but is an object"),
    "no messages": ("messages", {"messages": []}, "empty turn", "'messages' has no messages"),
    "a message that is text": (
        "messages",
        {"messages": ["a"]},
        "not messages",
        "'messages', message 0 must be an object with 'role' and 'content', but is a string",
    ),
    "no content": (
        "messages",
        missing("role", "text"),
        "not messages",
        "'messages', message 0 needs 'role' and 'content', or 'from' and 'value', but has 'role', 'text'",
    ),
    "null content": (
        "messages",
        {"messages": [user("a"), {"role": "assistant", "content": None}]},
        "not text",
        "'messages', message 1: its content must be a text, but is null",
    ),
    "an image": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "not text",
        "as Gemma 2 reads only text, but one is 'image'",
    ),
    "parts without text": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "not text",
        "but one is 'without text'",
    ),
    "parts that are no objects": (
        "messages",
        {"messages": [{"role": "user", "content": ["a"]}]},
        "not text",
        "but one is None",
    ),
    "unknown role": (
        "messages",
        {"messages": [{"role": "asistant", "content": "a"}]},
        "wrong roles",
        r"'messages', message 0: the role must be one of system, .*, but is 'asistant'. Did you mean 'assistant'\?",
    ),
    "role that is null": ("messages", {"messages": [{"role": None, "content": "a"}]}, "wrong roles", "but is None"),
    "a tool's turn": (
        "messages",
        {"messages": [user("a"), {"role": "tool", "content": "b"}]},
        "wrong roles",
        "message 1: the role must be one of",
    ),
    "an empty turn": (
        "messages",
        {"messages": [user("a"), model(" \n")]},
        "empty turn",
        "'messages', message 1: the turn of 'model' is empty",
    ),
    "an empty turn of a human": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": ""}]},
        "empty turn",
        "'conversations', message 0: the turn of 'human' is empty",
    ),
    "a flag that is a text": (
        "messages",
        {"messages": [user("a"), {**model("b"), "train": "false"}]},
        "wrong flag",
        "'messages', message 1: 'train' must be true, false, 1 or 0, but is 'false'",
    ),
    "a weight between": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a", "weight": 0.5}]},
        "wrong flag",
        "'conversations', message 0: 'weight' must be true, false, 1 or 0, but is 0.5",
    ),
    "a weight above": ("messages", {"messages": [{**user("a"), "weight": 2}]}, "wrong flag", "but is 2"),
    "flags that say both": (
        "messages",
        {"messages": [{**user("a"), "train": True, "weight": 0}]},
        "wrong flag",
        "message 0: 'train' says yes, but 'weight' no",
    ),
    "no answer": (
        "messages",
        {"messages": [system("S"), user("a")]},
        "no answer",
        "the model says nothing, so that there is nothing to learn",
    ),
    "an answer in the prompt only": (
        "prompt_completion",
        {"prompt": [user("a"), model("b")], "completion": [user("c")]},
        "no answer",
        "the model says nothing",
    ),
    "pair: the same": (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "no preference",
        "'chosen' and 'rejected' are the same",
    ),
    "pair: the same conversation": (
        "preference",
        {"chosen": [user("a"), model("b")], "rejected": [user("a"), model("b ")]},
        "no preference",
        "'chosen' and 'rejected' are the same",
    ),
    "pair: nothing in common": (
        "preference",
        {"chosen": [user("a"), model("b")], "rejected": [user("c"), model("d")]},
        "no preference",
        "'chosen' and 'rejected' must begin alike",
    ),
    "pair: parting at a question": (
        "preference",
        {
            "chosen": [user("a"), model("b"), user("c"), model("d")],
            "rejected": [user("a"), model("b"), user("e"), model("f")],
        },
        "no preference",
        "must part at an answer, but 'chosen' has none there",
    ),
    "pair: one goes on": (
        "preference",
        {"chosen": [user("a"), model("b")], "rejected": [user("a")]},
        "no preference",
        "must part at an answer, but 'rejected' has none there",
    ),
    "pair: another prompt": (
        "preference",
        {"prompt": "z", "chosen": [user("a"), model("b")], "rejected": [user("a"), model("c")]},
        "no preference",
        "'prompt' is not what 'chosen' and 'rejected' begin with",
    ),
    "pair: texts without a prompt": (
        "preference",
        {"chosen": "b", "rejected": "c"},
        "missing column",
        "no column 'prompt', which is needed where 'chosen' is no list of messages",
    ),
    "pair: text and messages": (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": [model("c")]},
        "not messages",
        "'chosen' and 'rejected' must both be texts, or both be messages",
    ),
    "pair: one missing": ("preference", {"prompt": "a", "chosen": "b"}, "missing column", "no column 'rejected'"),
    "pair: empty": ("preference", {"prompt": "a", "chosen": "b", "rejected": ""}, "empty turn", "'rejected' is empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named(kind: str) -> None:
    format, values, reason, message = BAD[kind]
    with pytest.raises(ExampleError, match="^x.jsonl, line 1: .*" + message) as error:
        read(values, format)
    assert error.value.reason == reason


def test_a_column_that_was_mapped_is_named_when_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ExampleError, match=r"no column 'ask', which is to be 'prompt'; the columns are 'asks', 'b'\. Did"
    ):
        read({"asks": "a", "b": "b"}, "prompt_completion", {"prompt": "ask", "completion": "b"})


def test_all_forms_in_files_are_told(tmp_path: Path) -> None:
    from gemma2.data import find_sources

    for name, values in FORMS.items():
        (source,) = find_sources(write_records(tmp_path / f"{name}.jsonl", [values]))
        found = [item for item in source.read() if isinstance(item, Record)]
        assert choose_form(found, format="auto", columns={}).form.name == name
