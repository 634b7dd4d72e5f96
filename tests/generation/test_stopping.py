"""Stop strings: found wherever the text is cut, nothing of them let through, nothing else held back."""

from __future__ import annotations

import pytest
from generation_fakes import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.generation import StopStrings
from gemma2.generation.stopping import stop_token_ids
from gemma2.sampling import SamplingParams


def until_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What must come out, character by character."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
)
def test_for_all_texts_stops_and_cuts(pieces: list[str], stops: list[str]) -> None:
    expected, matched = until_stop("".join(pieces), stops)
    stopper = StopStrings(stops)
    out = ""
    for index, piece in enumerate(pieces):
        out += stopper.push(piece)
        so_far = "".join(pieces[: index + 1])
        if stopper.matched is not None:
            break
        # Held back: the longest end that may be the beginning of a stop string, and no more.
        undecided = max(
            (n for stop in stops for n in range(len(stop)) if n and so_far.endswith(stop[:n])),
            default=0,
        )
        assert out == so_far[: len(so_far) - undecided]
    assert stopper.matched == matched
    if matched is None:
        out += stopper.finish()
    assert out == expected
    assert stopper.finish() == ""


@pytest.mark.parametrize(
    ("text", "stops", "expected", "matched"),
    [
        ("hello world", ["wor"], "hello ", "wor"),
        ("hello world", ["xyz", "o", "hello w"], "hell", "o"),  # complete first, though another began before
        ("hello world", ["lo", "hello"], "", "hello"),  # complete together: the longest
        ("aab", ["ab"], "a", "ab"),  # a beginning that fails is itself the beginning of another try
        ("ababac", ["abac"], "ab", "abac"),
        ("stop", ["stop"], "", "stop"),
        ("sto", ["stop"], "sto", None),
        ("naïve 🤗!", ["🤗"], "naïve ", "🤗"),
        ("", ["a"], "", None),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_small_truths(text: str, stops: list[str], expected: str, matched: str | None, size: int) -> None:
    stopper = StopStrings(stops)
    out = ""
    for start in range(0, len(text), size):
        if stopper.matched is None:
            out += stopper.push(text[start : start + size])
    assert (out + stopper.finish(), stopper.matched) == (expected, matched)


def test_text_is_released_as_soon_as_it_cannot_be_a_stop_string() -> None:
    stopper = StopStrings(["\n\nUser:"])
    assert [stopper.push(piece) for piece in ("Hi.", "\n", "\nU", "ne", " fois\n")] == [
        "Hi.",
        "",
        "",
        "\n\nUne",
        " fois",
    ]
    assert stopper.finish() == "\n"


def test_a_long_stop_string_costs_no_more_than_a_short_one() -> None:
    # With a naive comparison at every character these are 10^10 steps.
    stopper = StopStrings(["a" * 100_000 + "b"])
    assert stopper.push("a" * 200_000) == "a" * 100_000
    assert stopper.push("c") == "a" * 100_000 + "c"


def test_stop_tokens_are_the_models_own_and_those_named() -> None:
    tokenizer = small_tokenizer()
    assert stop_token_ids(tokenizer, SamplingParams()) == {1, 107}
    assert stop_token_ids(tokenizer, SamplingParams(stop_token_ids=[5])) == {1, 5, 107}
    assert stop_token_ids(tokenizer, SamplingParams(stop_token_ids=[5], ignore_eos=True)) == {5}
