"""What the engine takes, and how it refuses the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from generation_fakes import FakeBackend, ScriptedBackend, ids_of, small_tokenizer

from gemma2.errors import ConfigError, ContextLengthError, Gemma2Error, SamplingError, TokenizerError
from gemma2.generation import Engine, scoring
from gemma2.sampling import SamplingParams

TWO = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
VOCAB_SIZE = small_tokenizer().vocab_size


def new_engine(backend: FakeBackend | None = None) -> Engine:
    return Engine(backend or FakeBackend(), small_tokenizer(), max_num_seqs=4, max_num_batched_tokens=16)


def test_a_text_gets_exactly_one_bos_and_ids_are_taken_as_they_are() -> None:
    engine = new_engine()
    for text in ("hello", "", "<bos>hello"):
        (completion,) = engine.generate(text, TWO)
        assert completion.prompt_token_ids.count(2) == 1 and completion.prompt_token_ids[0] == 2
    assert engine.generate("hello", TWO)[0].prompt_token_ids == (2, *ids_of("hello"))
    assert engine.generate([300, 301], TWO)[0].prompt_token_ids == (300, 301)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("hello", [(2, *ids_of("hello"))]),
        ([2, 300], [(2, 300)]),
        ((2, 300), [(2, 300)]),
        (np.array([2, 300]), [(2, 300)]),
        (np.array([2, 200], dtype=np.uint8), [(2, 200)]),
        ([np.int64(2), np.int64(300)], [(2, 300)]),
        ([[2, 300], "hello", np.array([5])], [(2, 300), (2, *ids_of("hello")), (5,)]),
        (np.array([[2, 300], [2, 301]]), [(2, 300), (2, 301)]),
        ([], []),
    ],
)
def test_one_prompt_or_many_texts_or_ids(prompts: Any, expected: list[tuple[int, ...]]) -> None:
    completions = new_engine().generate(prompts, TWO)
    assert [completion.prompt_token_ids for completion in completions] == expected


def test_params_for_all_or_one_for_each_or_none() -> None:
    engine = new_engine(ScriptedBackend(ids_of("a")))
    lengths = [TWO, TWO.replace(max_tokens=5)]
    assert [c.num_completion_tokens for c in engine.generate([[2], [3]], lengths)] == [2, 5]
    assert [c.num_completion_tokens for c in engine.generate([[2], [3]], TWO)] == [2, 2]
    with pytest.raises(Gemma2Error, match="there are 3 prompts and 2 params"):
        engine.generate([[2], [3], [4]], lengths)
    for wrong in ({"temperature": 0}, [{"temperature": 0}]):
        with pytest.raises(Gemma2Error, match="must be a SamplingParams"):
            engine.generate([[2]], wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (np.array([], dtype=np.int64), "at least one token, but has none"),
        ([[]], "at least one token, but has none"),
        ([[2.5]], "flat list of token ids"),
        ([[[2, 3]]], "flat list of token ids"),
        ([[2, [3]]], "flat list of token ids"),
        ([[True]], "flat list of token ids"),
        ([[2, "a"]], "flat list of token ids"),
        ([[2**70]], "flat list of token ids"),
        (None, "flat list of token ids.*None"),
        (7, "flat list of token ids.*7"),
        ([None], "flat list of token ids"),
        ([2, -1], "position 1 is -1"),
        ([2, 300, VOCAB_SIZE], f"from 0 to {VOCAB_SIZE - 1}.*position 2 is {VOCAB_SIZE}"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: Any, words: str) -> None:
    backend = FakeBackend()
    with pytest.raises(Gemma2Error, match=words):
        new_engine(backend).generate(prompt, TWO)
    assert backend.batches == []


def test_the_context_limit() -> None:
    engine = new_engine(ScriptedBackend(ids_of("a"), num_prompt_tokens=10, context=12))
    with pytest.raises(ContextLengthError, match=r"13 tokens.*holds 12 \(max_position_embeddings\).*at most 11 tokens"):
        engine.generate([2] * 13)
    with pytest.raises(ContextLengthError, match=r"12 tokens.*at most 11 tokens"):  # no room for a single token
        engine.generate([2] * 12)
    with pytest.raises(ContextLengthError, match=r"10 tokens and max_tokens is 3, together 13.*holds 12.*to 2 or less"):
        engine.generate([2] * 10, SamplingParams(max_tokens=3))
    assert engine.generate([2] * 10, TWO)[0].num_completion_tokens == 2
    with pytest.raises(ContextLengthError, match=r"13 tokens.*holds 12"):
        engine.score([2] * 13)
    assert engine.score([2] * 12).shape == (11,)


def test_everything_is_checked_before_anything_runs() -> None:
    backend = FakeBackend(max_position_embeddings=12)
    engine = new_engine(backend)
    with pytest.raises(ContextLengthError):
        engine.generate([[2], [2] * 13], TWO)
    with pytest.raises(ContextLengthError):
        engine.stream([2] * 13)  # not only when the first delta is asked for
    with pytest.raises(ContextLengthError):
        engine.add_request([2] * 13)
    assert backend.batches == [] and not engine.has_unfinished_requests()


def test_stop_tokens_must_be_tokens() -> None:
    with pytest.raises(SamplingError, match=f"from 0 to {VOCAB_SIZE - 1}, but holds {VOCAB_SIZE}"):
        new_engine().generate("a", SamplingParams(stop_token_ids=[VOCAB_SIZE]))


def test_a_request_id_is_taken_until_its_request_is_over() -> None:
    engine = new_engine()
    assert engine.add_request("a", TWO, request_id="mine") == "mine"
    with pytest.raises(Gemma2Error, match="'mine' is taken"):
        engine.add_request("b", TWO, request_id="mine")
    while engine.has_unfinished_requests():
        engine.step()
    engine.add_request("b", TWO, request_id="mine")


def test_a_made_id_avoids_one_that_the_caller_chose() -> None:
    engine = new_engine()
    engine.add_request("a", TWO, request_id="request-0")
    assert len(engine.generate(["b", "c"], TWO)) == 2


def test_logits_that_cannot_be_drawn_from_end_the_batch_with_a_clear_error() -> None:
    class Broken(FakeBackend):
        def logits_after(self, history: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
            return np.full(VOCAB_SIZE, np.nan, dtype=np.float32)

    backend = Broken()
    engine = new_engine(backend)
    with pytest.raises(SamplingError, match="logits are NaN"):
        engine.generate(["a", "b"], TWO)
    assert backend.caches == {} and not engine.has_unfinished_requests()
    with pytest.raises(SamplingError, match="logits are NaN"):
        engine.score("hello world")
    assert backend.caches == {}


def test_a_tokenizer_or_limits_that_do_not_fit_are_refused_at_once() -> None:
    backend = FakeBackend()
    backend._config = backend.config.replace(vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(TokenizerError, match="belongs to another model"):
        Engine(backend, small_tokenizer())
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        Engine(FakeBackend(), small_tokenizer(), max_num_seqs=8, max_num_batched_tokens=4)


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [1, 2, 5, 100])
def test_scores_are_exact_and_never_hold_more_logits_than_allowed(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend()
    monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", rows_at_once * 4 * backend.config.vocab_size)
    token_ids = [2, 300, 310, 2, 5, 301, 302, 303, 299, 298, 297, 1, 107, 300, 300, 300, 300, 12]
    scores = new_engine(backend).score(token_ids)
    expected = []
    for index in range(1, len(token_ids)):
        logits = backend.logits_after(token_ids[:index]).astype(np.float64)  # of the words, without the padding
        expected.append(logits[token_ids[index]] - np.log(np.exp(logits).sum()))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert backend.most_rows == min(rows_at_once, 16)  # 16 is max_num_batched_tokens
    assert backend.caches == {}


def test_scoring_between_steps_does_not_disturb_running_requests() -> None:
    engine = new_engine()
    stream = engine.stream("hello", SamplingParams(seed=1, max_tokens=5, ignore_eos=True))
    text = next(stream).text
    engine.score("he or ld")
    text += "".join(delta.text for delta in stream)
    assert text == new_engine().generate("hello", SamplingParams(seed=1, max_tokens=5, ignore_eos=True))[0].text


def test_one_token_has_no_scores_and_none_is_an_error() -> None:
    assert new_engine().score([2]).shape == (0,)
    assert new_engine().score("").shape == (0,)
    with pytest.raises(Gemma2Error, match="at least one token"):
        new_engine().score([])
