"""From files to tokens: every form gives the same, and what is bad is raised or counted as the settings say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import compress, write_bytes
from examples_in_files import ANSWER, FORMS, QUESTION, random_chats, write_records

from gemma2.data import (
    EncodedExample,
    EncodedPair,
    ExampleError,
    TokenizedExamples,
    TokenizingProgress,
    encode_example,
    render_example,
    tokenize_examples,
)
from gemma2.data.examples import Conversation
from gemma2.errors import DataError
from gemma2.text import Tokenizer, render_chat

GOOD = {"question": "2 + 2?", "answer": "4"}
PAIR = {"prompt": "a b c", "chosen": "yes " * 10, "rejected": "no " * 20}


def tokenize(files: Any, tokenizer: Tokenizer, **settings: Any) -> TokenizedExamples:
    return tokenize_examples(files, tokenizer, **{"sequence_length": 512, **settings})


def trained_text(tokenizer: Tokenizer, encoded: EncodedExample | EncodedPair) -> str:
    assert isinstance(encoded, EncodedExample)
    return "".join(span.text for span in render_example(tokenizer, encoded) if span.is_trained)


def test_every_form_becomes_the_same_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": QUESTION}, {"role": "model", "content": ANSWER}]
    expected = tokenizer.encode_with_control(render_chat(turns[:1])) + tokenizer.encode(ANSWER, add_bos=False) + [107]
    for name, values in FORMS.items():
        found = tokenize(write_records(tmp_path / f"{name}.jsonl", [values]), tokenizer)
        encoded = found.encoded(0)
        assert isinstance(encoded, EncodedExample)
        assert encoded.ids.tolist() == expected
        assert trained_text(tokenizer, encoded) == f"{ANSWER}<end_of_turn>"
        assert [str(choice.form.name) for choice in found.choices] == [name]


def test_sources_of_several_forms(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("messages", "alpaca"):
        write_records(tmp_path / f"{name}.jsonl", [FORMS[name]] * 3)
    write_records(tmp_path / "z.json", [{"text": "Once"}])
    found = tokenize(tmp_path, tokenizer)
    assert [choice.form.name for choice in found.choices] == ["alpaca", "messages", "text"]
    assert [found.where(index).removeprefix(f"{tmp_path}/") for index in (0, 2, 3, 5, 6)] == [
        "alpaca.jsonl, line 1",
        "alpaca.jsonl, line 3",
        "messages.jsonl, line 1",
        "messages.jsonl, line 3",
        "z.json, line 1",
    ]
    assert found.encoded(0).ids.tolist() == found.encoded(5).ids.tolist()  # type: ignore[union-attr]
    assert trained_text(tokenizer, found.encoded(6)) == "Once<eos>"


def test_flags_of_messages_are_heard_in_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def turns(*flags: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"from": ("human", "gpt")[i % 2], "value": str(i), **flag} for i, flag in enumerate(flags)]

    wanted = [{"conversations": turns({"weight": 1}, {"weight": 0}, {"weight": None}, {"weight": 1})}]
    found = tokenize(write_records(tmp_path / "a.jsonl", wanted), tokenizer)
    assert trained_text(tokenizer, found.encoded(0)) == "3<end_of_turn>"
    bad = write_records(tmp_path / "b.jsonl", [*wanted, {"conversations": turns({}, {"train": "no"})}])
    with pytest.raises(ExampleError, match=r"b.jsonl, line 2: 'conversations', message 1: 'train' must be true, false"):
        tokenize(bad, tokenizer)
    nothing = write_records(tmp_path / "c.jsonl", [{"conversations": turns({}, {"train": False})}, *wanted])
    with pytest.raises(ExampleError, match=r"c.jsonl, line 1: nothing is trained, as 'train' or 'weight' of its mess"):
        tokenize(nothing, tokenizer)
    assert tokenize(nothing, tokenizer, on_error="skip").skipped.counts == {"no answer": 1}


def test_tokens_are_kept_as_they_were_encoded_at_four_bytes_each(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chats = random_chats(seed=3, count=40, longest=60)
    found = tokenize(write_records(tmp_path / "x.jsonl", chats), tokenizer, sequence_length=4096)
    assert len(found) == 40
    for index, values in enumerate(chats):
        messages = tuple({**turn, "role": turn["role"].replace("assistant", "model")} for turn in values["messages"])
        expected = encode_example(tokenizer, Conversation(messages=messages))
        encoded = found.encoded(index)
        assert isinstance(encoded, EncodedExample)
        # All but the newline after the last turn.
        assert encoded.ids.tolist() == expected.ids.tolist()[:-1]
        assert encoded.trained.tolist() == expected.trained.tolist()[:-1]
        assert found.num_places[index] == len(encoded.ids) - 1
        assert found.num_trained[index] == np.count_nonzero(encoded.trained)
        inputs, labels = found.inputs_and_labels(index)
        assert inputs.tolist() == encoded.ids.tolist()[:-1]
        shifted = np.where(encoded.trained, encoded.ids, -100).tolist()[1:]
        assert labels.tolist() == shifted
    assert found.tokens.nbytes == 4 * sum(len(found.encoded(index).ids) for index in range(40))  # type: ignore[union-attr]
    whole = [token for i in range(40) for token in found.encoded(i).ids[found.encoded(i).trained].tolist()]  # type: ignore[union-attr]
    assert found.trained_tokens.tolist() == whole
    with pytest.raises(ValueError, match="read-only"):
        found.tokens[0] = 1


def test_only_some_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "x.jsonl", [GOOD] * 5 + [{"question": "?"}])
    assert len(tokenize(file, tokenizer, max_examples=3)) == 3
    assert len(tokenize(file, tokenizer, max_examples=30, on_error="skip")) == 5


BAD_LINES = b"""{"question": "2 + 2?", "answer": "4"}
{"question": "2 + 2?", "answer":
{"question": "\xff", "answer": "4"}
["question"]
{"question": "2 + 2?"}
{"question": "2 + 2?", "answer": null}
{"question": "2 + 2?", "answer": " "}
{"question": "2 + 2?", "answer": [{"role": "user", "content": "4"}]}
{"question": "2 + 2?", "answer": [{"role": "bot", "content": "4"}]}
{"question": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "answer": "c"}
{"question": "2 + 2?", "answer": "\\ud800"}
{"question": "3 + 3?", "answer": "6"}
"""
REASONS = {
    2: "not JSON",
    3: "not UTF-8",
    4: "not an object",
    5: "missing column",
    6: "not text",
    7: "empty turn",
    8: "no answer",
    9: "wrong roles",
    10: "wrong roles",
    11: "not text",
}


def test_what_is_bad_is_skipped_and_counted_by_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_bytes(tmp_path / "x.jsonl", BAD_LINES)
    found = tokenize(file, tokenizer, on_error="skip")
    assert [found.where(index) for index in range(len(found))] == [f"{file}, line 1", f"{file}, line 12"]
    reasons = list(REASONS.values())
    assert found.skipped.counts == {reason: reasons.count(reason) for reason in reasons}
    assert found.skipped.total == 10
    assert found.skipped.last_message.startswith(f"{file}, line 11: 'answer' holds half of a surrogate pair")
    assert str(found.skipped).startswith("10 skipped (")
    assert ", missing column: 1" in str(found.skipped)


@pytest.mark.parametrize("line", REASONS)
def test_what_is_bad_is_an_error_with_its_line(tmp_path: Path, tokenizer: Tokenizer, line: int) -> None:
    lines = BAD_LINES.split(b"\n")
    file = write_bytes(tmp_path / "x.jsonl", lines[0] + b"\n\n" + lines[line - 1] + b"\n" + lines[0])
    with pytest.raises(ExampleError, match=rf"^{file}, line 3: ") as error:
        tokenize(file, tokenizer)
    assert error.value.reason == REASONS[line]


def test_roles_out_of_turn_say_which_message(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(
        tmp_path / "x.jsonl", [{"messages": [{"role": "model", "content": "a"}, {"role": "user", "content": "b"}]}]
    )
    with pytest.raises(
        ExampleError, match=r"x.jsonl, line 1: message 0: user and model must take turns, the user first"
    ):
        tokenize(file, tokenizer)


def test_bad_lines_before_the_first_good_one_do_not_hide_the_form(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_bytes(tmp_path / "x.jsonl", b"?\n" * 40 + BAD_LINES)
    found = tokenize(file, tokenizer, on_error="skip")
    assert (len(found), found.skipped.counts["not JSON"]) == (2, 41)


@pytest.mark.parametrize("ending", [".xz", ".gz", ".zst"])
def test_a_truncated_file(tmp_path: Path, tokenizer: Tokenizer, ending: str) -> None:
    many = [{"text": f"{number}", "note": f"{number**50}"} for number in range(3000)]
    whole = compress(write_records(tmp_path / "x.jsonl", many).read_bytes(), ending)
    (tmp_path / "x.jsonl").unlink()
    write_records(tmp_path / "y.jsonl", many[:2])
    (tmp_path / f"x.jsonl{ending}").write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(ExampleError, match="the file is truncated or damaged"):
        tokenize(tmp_path, tokenizer)
    found = tokenize(tmp_path, tokenizer, on_error="skip")
    assert found.skipped.counts == {"damaged file": 1}
    assert len(found) > 1000
    assert found.where(len(found) - 1) == f"{tmp_path / 'y.jsonl'}, line 2"


def test_an_empty_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_bytes(tmp_path / "a.jsonl", b"")
    write_records(tmp_path / "b.jsonl", [GOOD])
    with pytest.raises(ExampleError, match=r"a.jsonl: the file holds no example"):
        tokenize(tmp_path, tokenizer)
    assert tokenize(tmp_path, tokenizer, on_error="skip").skipped.counts == {"empty file": 1}


def test_nothing_left_is_an_error_whatever_the_settings_say(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "x.jsonl", [{"text": ""}, {"text": 3}])
    with pytest.raises(
        DataError,
        match=r"x.jsonl: no example is left to train on: 2 skipped \(.*empty turn: 1.*\); the last error was: "
        r".*, line 2: 'text' must be a string",
    ):
        tokenize(file, tokenizer, on_error="skip")
    with pytest.raises(DataError, match=r"2 skipped \(too long: 2\)"):
        tokenize(write_records(tmp_path / "x.jsonl", [GOOD, GOOD]), tokenizer, sequence_length=4)


# Over-long examples


def lengths(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens of a prompt as the chat has it, and of its answer."""
    prompt = tokenizer.encode_with_control(render_chat([{"role": "user", "content": GOOD["question"]}]))
    return len(prompt), len(tokenizer.encode(GOOD["answer"], add_bos=False)) + 1


def test_examples_that_fit_exactly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompt, answer = lengths(tokenizer)
    file = write_records(tmp_path / "x.jsonl", [GOOD])
    assert tokenize(file, tokenizer, sequence_length=prompt + answer - 1, too_long="raise").num_places.tolist() == [
        prompt + answer - 1
    ]
    message = (
        rf"x.jsonl, line 1: takes {prompt + answer - 1} places, but sequence_length is {prompt + answer - 2}; raise"
    )
    with pytest.raises(ExampleError, match=message):
        tokenize(file, tokenizer, sequence_length=prompt + answer - 2, too_long="raise", on_error="skip")


def test_a_users_last_turn_takes_no_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = FORMS["messages"]["messages"]
    longer = [*turns, {"role": "user", "content": "and then " * 1000}]
    file = write_records(tmp_path / "x.jsonl", [{"messages": turns}, {"messages": longer}])
    first, second = tokenize(file, tokenizer, too_long="raise").num_places
    assert first == second


def test_too_long_is_skipped_even_where_errors_are_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "x.jsonl", [GOOD, {**GOOD, "answer": "x y " * 600}, GOOD])
    found = tokenize(file, tokenizer)
    assert len(found) == 2
    assert found.skipped.counts == {"too long": 1}
    assert found.num_truncated == 0


def test_truncation_keeps_the_beginning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {**GOOD, "answer": "x y " * 600}
    file = write_records(tmp_path / "x.jsonl", [GOOD, long, {**GOOD, "question": "x y " * 600}])
    found = tokenize(file, tokenizer, too_long="truncate", sequence_length=100)
    assert len(found) == 2
    assert found.num_truncated == 1
    assert found.num_places.tolist()[1] == 100
    whole = tokenize(file, tokenizer, sequence_length=5000).encoded(1)
    cut = found.encoded(1)
    assert isinstance(whole, EncodedExample) and isinstance(cut, EncodedExample)
    assert cut.ids.tolist() == whole.ids[:101].tolist()
    assert cut.trained.tolist() == whole.trained[:101].tolist()
    # The cut of the third leaves nothing to train.
    assert found.skipped.counts == {"too long": 1}
    assert "line 3: its first 100 places hold nothing to train on" in found.skipped.last_message


def test_truncation_of_pairs_cuts_the_longer_side_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "x.jsonl", [PAIR])
    whole = tokenize(file, tokenizer, sequence_length=5000).encoded(0)
    assert isinstance(whole, EncodedPair)
    sides = (whole.chosen.num_places, whole.rejected.num_places)
    assert sides[0] < sides[1]
    for length, expected in [
        (sum(sides), sides),
        (sum(sides) - 1, (sides[0], sides[1] - 1)),
        (2 * sides[0], (sides[0], sides[0])),
        (2 * sides[0] - 3, (sides[0] - 2, sides[0] - 1)),
    ]:
        found = tokenize(file, tokenizer, too_long="truncate", sequence_length=length).encoded(0)
        assert isinstance(found, EncodedPair)
        assert (found.chosen.num_places, found.rejected.num_places) == expected
        assert found.chosen.ids.tolist() == whole.chosen.ids[: expected[0] + 1].tolist()
    with pytest.raises(ExampleError, match=rf"takes {sides[0]} and {sides[1]} places, but sequence_length is 40;"):
        tokenize(file, tokenizer, too_long="raise", sequence_length=40)
    with pytest.raises(DataError, match=r"too long: 1.*its first 12 places hold nothing to train on"):
        tokenize(file, tokenizer, too_long="truncate", sequence_length=12)


def test_a_pair_that_the_cut_makes_alike_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    same = {"prompt": "a", "chosen": "x " * 300 + "yes", "rejected": "x " * 300 + "no"}
    file = write_records(tmp_path / "x.jsonl", [same, PAIR])
    found = tokenize(file, tokenizer, too_long="truncate", sequence_length=200)
    assert (len(found), found.skipped.counts) == (1, {"too long": 1})


# Pairs and settings


def test_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = tokenize(write_records(tmp_path / "x.jsonl", [PAIR, {**PAIR, "chosen": "b "}]), tokenizer)
    assert found.are_pairs
    assert (len(found), len(found.sequence_starts) - 1) == (2, 4)
    second = found.encoded(1)
    assert isinstance(second, EncodedPair)
    assert trained_text(tokenizer, second.chosen) == "b<end_of_turn>"
    assert found.num_places[1] == second.chosen.num_places + second.rejected.num_places
    assert found.num_trained[1] == np.count_nonzero(second.chosen.trained) + np.count_nonzero(second.rejected.trained)


def test_pairs_that_only_spaces_tell_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b "}])
    with pytest.raises(ExampleError, match="'chosen' and 'rejected' are the same"):
        tokenize(file, tokenizer)
    assert len(tokenize(file, tokenizer, template="none")) == 1


def test_pairs_and_single_examples_do_not_mix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_records(tmp_path / "a.jsonl", [PAIR])
    write_records(tmp_path / "b.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"a.jsonl holds preference pairs, but .*b.jsonl does not"):
        tokenize(tmp_path, tokenizer)


def test_pairs_are_trained_on_answers_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="train_on: all is not for preference pairs"):
        tokenize(write_records(tmp_path / "a.jsonl", [PAIR]), tokenizer, train_on="all", on_error="skip")


def test_lists_of_messages_need_the_chat(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "a.jsonl", [FORMS["messages"]])
    with pytest.raises(ExampleError, match="a list of messages can only be a chat; set template to chat") as error:
        tokenize(file, tokenizer, template="none")
    assert error.value.reason == "needs the chat template"


def test_settings_reach_the_encoding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_records(tmp_path / "a.jsonl", [{"q": "2 + 2 =", "a": " 4"}])
    found = tokenize(file, tokenizer, template="none", columns={"prompt": "q", "completion": "a"}, train_on="all")
    assert trained_text(tokenizer, found.encoded(0)) == "2 + 2 = 4<eos>"
    system = {"messages": [{"role": "system", "content": "S"}, *FORMS["messages"]["messages"]]}
    with pytest.raises(ExampleError, match="strict mode refuses"):
        tokenize(write_records(tmp_path / "a.jsonl", [system]), tokenizer, strict_system=True)
    forced = write_records(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "text": "c"}])
    assert trained_text(tokenizer, tokenize(forced, tokenizer, format="text").encoded(0)) == "c<eos>"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"format": "message"},
            r"format must be one of auto, messages, .*, but is 'message'. Did you mean 'messages'\?",
        ),
        ({"template": "gemma"}, "template must be one of chat, none, but is 'gemma'"),
        ({"train_on": "answer"}, r"train_on must be one of .*, but is 'answer'. Did you mean 'answers'\?"),
        ({"too_long": "cut"}, "too_long must be one of skip, truncate, raise"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, but is 0"),
        ({"max_examples": 0}, "max_examples must be at least 1, but is 0"),
        ({"columns": {"promt": "a"}}, r"columns: the format 'auto' has no field 'promt'"),
    ],
)
def test_settings_are_checked_before_anything_is_read(tokenizer: Tokenizer, setting: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize("no such file", tokenizer, **setting)


def test_progress_is_told(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        write_records(tmp_path / name, [GOOD, {"question": "x"}, *[GOOD] * 20])
    told: list[TokenizingProgress] = []
    found = tokenize(tmp_path, tokenizer, on_progress=told.append, on_error="skip")
    fractions = [progress.fraction for progress in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0 and 0 < fractions[0] < 0.1
    assert len(set(fractions)) > 40, "within files that are not compressed it moves with every line"
    last = told[-1]
    assert (last.num_examples, last.num_tokens, last.num_skipped) == (63, len(found.tokens), 3)
    assert last.tokens_per_second == last.num_tokens / last.seconds
