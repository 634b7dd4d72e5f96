"""SamplingParams: every field's range, normal forms, and the errors' words."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from gemma2.errors import Gemma2Error, SamplingError
from gemma2.sampling import SamplingParams

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "of at least 0"),
    ("temperature", float("inf"), "of at least 0"),
    ("temperature", float("nan"), "of at least 0"),
    ("temperature", "0.5", "of at least 0"),
    ("temperature", True, "of at least 0"),
    ("temperature", 10**400, "of at least 0"),
    ("top_k", 0, "at least 1 (None switches it off)"),
    ("top_k", -1, "at least 1"),
    ("top_k", 1.5, "whole number"),
    ("top_p", 0.0, "above 0 and at most 1"),
    ("top_p", 1.01, "above 0 and at most 1"),
    ("min_p", -0.1, "at least 0 and at most 1"),
    ("min_p", 1.1, "at least 0 and at most 1"),
    ("repetition_penalty", 0, "above 0"),
    ("repetition_penalty", float("nan"), "above 0"),
    ("seed", 2**63, "from -9223372036854775808 to 9223372036854775807"),
    ("seed", 0.5, "whole number"),
    ("max_tokens", 0, "at least 1"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", 21, "from 0 to 20"),
    ("stop", "", "empty"),
    ("stop", ["a", ""], "empty"),
    ("stop", 5, "string or a list of strings"),
    ("stop", [5], "string or a list of strings"),
    ("stop_token_ids", 5, "list of token ids"),
    ("stop_token_ids", "107", "list of token ids"),
    ("stop_token_ids", [-1], "list of token ids"),
    ("stop_token_ids", [1.0], "list of token ids"),
    ("ignore_eos", 1, "true or false"),
]


@pytest.mark.parametrize(("name", "value", "words"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name_range_and_value(name: str, value: Any, words: str) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(name)
    assert words in message
    if not isinstance(value, list) and name != "stop":
        assert repr(value) in message


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"top_k": 1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 0.5},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": 1},
        {"logprobs": 0},
        {"logprobs": 20},
    ],
)
def test_the_ends_of_the_ranges_are_in(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    (name,) = values
    assert getattr(params, name) == values[name]


def test_defaults_change_nothing_of_the_model() -> None:
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "max_tokens": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
    }


def test_one_stop_string_needs_no_list_and_lists_become_tuples() -> None:
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[np.int32(5), 107]).stop_token_ids == (5, 107)
    assert hash(SamplingParams(stop=["a"], stop_token_ids=[1])) == hash(SamplingParams(stop="a", stop_token_ids=(1,)))


def test_numbers_of_numpy_become_plain_ones() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int32(7))
    assert (type(params.temperature), type(params.top_k), type(params.seed)) == (float, int, int)


def test_from_dict_takes_null_as_not_given_and_offers_the_nearest_name() -> None:
    assert SamplingParams.from_dict({"temperature": None, "top_k": 5, "stop": None}) == SamplingParams(top_k=5)
    with pytest.raises(SamplingError, match="Did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 0.5})
    with pytest.raises(SamplingError, match="'wibble' is not a sampling parameter; they are temperature, top_k"):
        SamplingParams.from_dict({"wibble": 0.5})


def test_replace_validates_and_takes_none_as_a_value() -> None:
    params = SamplingParams(top_k=5, seed=1)
    assert params.replace(top_k=None, temperature=0) == SamplingParams(seed=1, temperature=0)
    with pytest.raises(SamplingError, match="top_p must be"):
        params.replace(top_p=2)
    with pytest.raises(SamplingError, match="Did you mean 'top_p'"):
        params.replace(topp=2)


def test_it_is_frozen_keyword_only_and_its_errors_are_the_users() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[call-arg]
    assert issubclass(SamplingError, Gemma2Error)
