"""The engine: a request's text is its own, however requests are batched, chunked, streamed or aborted."""

from __future__ import annotations

import gc
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from generation_fakes import FakeBackend, ScriptedBackend, byte_ids, ids_of, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2.generation import Completion, Engine, Prompt, TextDelta
from gemma2.sampling import SamplingParams
from gemma2.step import Logits, StepBatch

GREEDY = SamplingParams(temperature=0)


def new_engine(backend: FakeBackend, max_num_seqs: int = 4, max_num_batched_tokens: int = 16) -> Engine:
    return Engine(backend, small_tokenizer(), max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def run_all(engine: Engine) -> list[TextDelta]:
    deltas = []
    while engine.has_unfinished_requests():
        deltas += engine.step()
    return deltas


PROMPTS: list[Prompt] = [
    "hello world",
    "a",
    [2, 5, 300, 301, 302, 303, 304, 305, 306, 307, 308, 309],
    "stop",
    [2],
    "he or ld. op!",
]
PARAMS = [
    SamplingParams(seed=1, max_tokens=9, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(seed=2, top_k=5, top_p=0.9, max_tokens=7),
    SamplingParams(seed=2, min_p=0.1, temperature=1.5, max_tokens=20, ignore_eos=True),
    SamplingParams(seed=3, repetition_penalty=1.5, max_tokens=5),
    SamplingParams(seed=4, stop=["e", "lo"], max_tokens=30),
]


def contents(completion: Completion) -> tuple[object, ...]:
    return (completion.text, completion.token_ids, completion.logprobs, completion.finish_reason)


@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(1, 1), (2, 3), (3, 7), (6, 6), (6, 1000)])
def test_together_in_chunks_or_alone_the_texts_are_the_same(max_num_seqs: int, max_num_batched_tokens: int) -> None:
    together = FakeBackend()
    engine = new_engine(together, max_num_seqs, max_num_batched_tokens)
    got = engine.generate(PROMPTS, PARAMS)
    for prompt, params, completion in zip(PROMPTS, PARAMS, got, strict=True):
        (alone,) = new_engine(FakeBackend(), 1, 1000).generate(prompt, params)
        assert contents(completion) == contents(alone)
    assert all(sum(n for _, n in batch) <= max_num_batched_tokens for batch in together.batches)
    assert max(len(batch) for batch in together.batches) == min(max_num_seqs, 6)
    assert together.caches == {}
    assert sorted(together.freed) == list(range(6))
    assert not engine.has_unfinished_requests()


def test_a_seed_gives_the_same_text_whatever_runs_beside_it() -> None:
    params = SamplingParams(seed=42, max_tokens=15, ignore_eos=True)
    (alone,) = new_engine(FakeBackend()).generate("hello", params)
    crowd = new_engine(FakeBackend()).generate(["a", "hello", "hello", "b"], [params, params, params, SamplingParams()])
    assert crowd[1].token_ids == crowd[2].token_ids == alone.token_ids
    assert crowd[0].token_ids != alone.token_ids
    (unseeded,) = new_engine(FakeBackend()).generate("hello", params.replace(seed=None))
    assert unseeded.token_ids != alone.token_ids


def test_the_draws_follow_the_logits_of_the_requests_own_history() -> None:
    backend = FakeBackend()
    (completion,) = new_engine(backend, 1, 2).generate([2, 300, 301], SamplingParams(temperature=0, max_tokens=6))
    history = [2, 300, 301]
    for token_id in completion.token_ids:
        assert token_id == int(backend.logits_after(history).argmax())  # the best word, never a row of padding
        history.append(token_id)


def test_logprobs_are_the_models_own_and_score_agrees() -> None:
    params = SamplingParams(seed=9, temperature=0.5, top_k=3, logprobs=3, max_tokens=8, ignore_eos=True)
    backend = FakeBackend()
    engine = new_engine(backend)
    (completion,) = engine.generate([2, 300], params)
    assert completion.logprobs is not None and len(completion.logprobs) == 8
    history = [2, 300]
    for token_id, sampled in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = backend.logits_after(history).astype(np.float64)
        exact = logits - np.log(np.exp(logits).sum())
        assert sampled.token_id == token_id
        assert sampled.logprob == pytest.approx(exact[token_id], abs=1e-5)
        assert [entry.token_id for entry in sampled.top_logprobs] == np.argsort(-exact)[:3].tolist()
        history.append(token_id)
    scores = engine.score(history)
    assert scores[1:].tolist() == pytest.approx([sampled.logprob for sampled in completion.logprobs], abs=1e-5)
    (without,) = engine.generate([2, 300], params.replace(logprobs=None))
    assert without.logprobs is None and without.token_ids == completion.token_ids


def test_a_completion_tells_what_came_in_and_how_much_came_out() -> None:
    backend = ScriptedBackend(ids_of("he", "ll", "<eos>"), num_prompt_tokens=2)
    (completion,) = new_engine(backend).generate("st", GREEDY)
    assert completion.prompt_token_ids == (2, *ids_of("st"))
    assert completion.token_ids == tuple(ids_of("he", "ll", "<eos>"))
    assert (completion.num_prompt_tokens, completion.num_completion_tokens) == (2, 3)


# -- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "params", "text", "reason", "stop_reason"),
    [
        (["he", "ll", "<eos>"], {}, "hell", "stop", None),
        (["he", "ll", "<end_of_turn>"], {}, "hell", "stop", 107),
        (["he", "ll", "op"], {"stop_token_ids": ids_of("op")}, "hell", "stop", ids_of("op")[0]),
        (["he", "<eos>", "<end_of_turn>", "op"], {"ignore_eos": True, "max_tokens": 4}, "heop", "length", None),
        (["he", "<eos>"], {"ignore_eos": True, "stop_token_ids": [1]}, "he", "stop", 1),
        (["he", "ll", "<eos>"], {"max_tokens": 2}, "hell", "length", None),
        (["he", "ll", "<eos>"], {"max_tokens": 3}, "hell", "stop", None),
        (["<eos>"], {}, "", "stop", None),
        (["he", "ll", "op"], {"stop": "lo"}, "hel", "stop", "lo"),
        (["he", "ll", "op"], {"stop": ["p", "ell"]}, "h", "stop", "ell"),
        (["he", "l", "<eos>"], {"stop": "lo"}, "hel", "stop", None),  # what was held back is released
        (["he", "l"], {"stop": "lo", "max_tokens": 2}, "hel", "length", None),
        (["he", "l", "<pad>", "op"], {"stop": "lo"}, "he", "stop", "lo"),  # control tokens are no text
    ],
)
def test_how_a_text_ends(
    script: list[str], params: dict[str, object], text: str, reason: str, stop_reason: str | int | None
) -> None:
    engine = new_engine(ScriptedBackend(ids_of(*script)))
    (completion,) = engine.generate([2], SamplingParams.from_dict({"temperature": 0, **params}))
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, reason, stop_reason)
    assert completion.token_ids == tuple(ids_of(*script))[: completion.num_completion_tokens]
    if reason == "stop" and not isinstance(stop_reason, str):
        assert completion.num_completion_tokens == len(script)  # the stop token counts, but is no text


TEXT_IDS = st.sampled_from(
    ids_of("a", "b", "he", "ll", "hell", "hello", "st", "op", "<pad>", "é") + byte_ids("é🤗") + byte_ids("l")
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(TEXT_IDS, min_size=1, max_size=20),
    st.lists(st.sampled_from(["l", "lo", "ohe", "llst", "🤗", "é", "bab", "\ufffd", "hellohell"]), max_size=3),
)
def test_any_tokens_and_stops_stream_what_the_whole_text_says(token_ids: list[int], stops: list[str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=len(token_ids), stop=stops)
    deltas = list(new_engine(ScriptedBackend(token_ids)).stream([2], params))
    completion = deltas[-1].completion
    assert completion is not None and all(delta.completion is None for delta in deltas[:-1])
    assert "".join(delta.text for delta in deltas) == completion.text
    assert sum((delta.token_ids for delta in deltas), ()) == completion.token_ids

    whole = small_tokenizer().decode(token_ids)
    ends = [(whole.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    if ends:
        end, _, stop = min(ends)
        assert (completion.text, completion.stop_reason) == (whole[: end - len(stop)], stop)
    else:
        assert (completion.text, completion.finish_reason) == (whole, "length")


def test_half_a_character_is_never_given_out() -> None:
    script = [*byte_ids("🤗"), *ids_of("a"), *byte_ids("é"), *ids_of("<eos>")]
    texts = [delta.text for delta in new_engine(ScriptedBackend(script)).stream([2], GREEDY)]
    assert texts == ["", "", "", "🤗", "a", "", "é", ""]


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    for end, reason in ((ids_of("<eos>"), "stop"), ([], "length")):
        script = [*ids_of("a"), *byte_ids("🤗")[:2], *end]
        (completion,) = new_engine(ScriptedBackend(script)).generate([2], GREEDY.replace(max_tokens=len(script)))
        assert (completion.text, completion.finish_reason) == ("a\ufffd\ufffd", reason)


def test_what_comes_at_the_end_is_text_like_any_other() -> None:
    script = [*ids_of("he", "l"), *byte_ids("🤗")[:2]]
    params = GREEDY.replace(max_tokens=4)
    # "l" was held back for "lo" and stands before the broken bytes; and broken bytes may complete a stop string.
    (completion,) = new_engine(ScriptedBackend(script)).generate([2], params.replace(stop=["lo"]))
    assert (completion.text, completion.finish_reason) == ("hel\ufffd\ufffd", "length")
    (completion,) = new_engine(ScriptedBackend(script)).generate([2], params.replace(stop=["l\ufffd"]))
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("he", "stop", "l\ufffd")


def test_without_max_tokens_it_goes_on_to_the_contexts_end() -> None:
    backend = ScriptedBackend(ids_of("a"), num_prompt_tokens=5, context=12)
    (completion,) = new_engine(backend).generate([2, 300, 301, 302, 303], GREEDY)
    assert (completion.finish_reason, completion.stop_reason, completion.text) == ("length", None, "a" * 7)


# -- streams, steps and aborts --------------------------------------------------------------------------------------


def test_closing_or_dropping_a_stream_frees_its_cache() -> None:
    backend = FakeBackend()
    engine = new_engine(backend)
    stream = engine.stream("hello", SamplingParams(seed=1, ignore_eos=True))
    next(stream)
    assert list(backend.caches) == [0]
    stream.close()
    assert (backend.caches, backend.freed) == ({}, [0])

    stream = engine.stream("hello", SamplingParams(seed=1, ignore_eos=True))
    next(stream)
    del stream
    gc.collect()
    assert (backend.caches, backend.freed) == ({}, [0, 1])

    for delta in engine.stream("hello", SamplingParams(seed=1, ignore_eos=True)):
        if delta.token_ids:
            break
    del delta
    gc.collect()
    assert backend.caches == {}

    engine.stream("hello")  # never begun
    gc.collect()
    assert not engine.has_unfinished_requests()
    assert (engine.num_waiting, engine.num_running) == (0, 0)


def test_streams_in_turns_and_steps_take_nothing_from_each_other() -> None:
    engine = new_engine(FakeBackend())
    params = [SamplingParams(seed=seed, max_tokens=6, ignore_eos=True) for seed in range(4)]
    added = engine.add_request("a", params[0])
    streams = [engine.stream("b", params[1]), engine.stream("c", params[2])]
    texts = ["", ""]
    for _ in range(6):
        for index, stream in enumerate(streams):
            texts[index] += next(stream).text
    (between,) = engine.generate("d", params[3])
    assert [list(stream) for stream in streams] == [[], []]
    assert {delta.request_id for delta in engine.step()} == {added}
    alone = [new_engine(FakeBackend()).generate(name, own)[0] for name, own in zip("bcd", params[1:], strict=True)]
    assert [*texts, between.text] == [completion.text for completion in alone]


def test_steps_give_each_delta_once_and_the_completion_last() -> None:
    engine = new_engine(FakeBackend(), 2, 3)
    ids = [engine.add_request(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert len(set(ids)) == 6
    deltas = run_all(engine)
    expected = new_engine(FakeBackend()).generate(PROMPTS, PARAMS)
    for request_id, whole in zip(ids, expected, strict=True):
        own = [delta for delta in deltas if delta.request_id == request_id]
        assert "".join(delta.text for delta in own) == whole.text
        assert own[-1].completion is not None and contents(own[-1].completion) == contents(whole)
        assert own[-1].finish_reason == whole.finish_reason
        assert [delta.completion for delta in own[:-1]] == [None] * (len(own) - 1)
        if whole.logprobs is not None:
            assert sum((delta.logprobs or () for delta in own), ()) == whole.logprobs
    assert engine.step() == []


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_an_abort_frees_the_cache_and_gives_out_what_was_held_back(steps_before: int) -> None:
    backend = ScriptedBackend(ids_of("he", "l", "l", "l", "l", "l"))
    engine = new_engine(backend, max_num_seqs=1)
    first = engine.add_request([2], GREEDY.replace(stop=["lll!"]), request_id="first")
    second = engine.add_request([2], GREEDY.replace(max_tokens=1), request_id="second")
    deltas = [delta for _ in range(steps_before) for delta in engine.step()]
    engine.abort(first)
    engine.abort("never heard of")
    engine.abort(first)
    assert backend.caches == {}
    deltas += run_all(engine)
    own = [delta for delta in deltas if delta.request_id == first]
    completion = own[-1].completion
    assert completion is not None and completion.finish_reason == "abort"
    assert completion.text == "".join(delta.text for delta in own) == ["", "he", "helll"][min(steps_before, 2)]
    assert completion.num_completion_tokens == steps_before
    assert [delta.finish_reason for delta in deltas if delta.request_id == second] == ["length"]
    assert not engine.has_unfinished_requests()


def test_a_stream_that_is_aborted_from_elsewhere_ends() -> None:
    engine = new_engine(FakeBackend())
    stream = engine.stream("hello", SamplingParams(seed=1, ignore_eos=True))
    engine.abort(next(stream).request_id)
    (last,) = list(stream)
    assert last.finish_reason == "abort"


def test_a_failing_backend_ends_the_requests_of_its_batch_and_no_others() -> None:
    backend = FakeBackend()
    engine = new_engine(backend, max_num_seqs=2)
    stream = engine.stream("a", SamplingParams(seed=1, ignore_eos=True))
    next(stream)
    running = engine.add_request("b")
    waiting = engine.add_request("c", SamplingParams(seed=1, max_tokens=3))
    backend.fail_at = 1
    with pytest.raises(MemoryError):
        engine.step()
    assert backend.caches == {}
    assert [delta.finish_reason for delta in stream] == ["abort"]
    deltas = run_all(engine)
    ends = {delta.request_id: delta.finish_reason for delta in deltas if delta.completion}
    assert ends[running] == "abort" and ends[waiting] in ("stop", "length")
    assert backend.caches == {}


def test_a_failing_generate_leaves_nothing_behind() -> None:
    backend = FakeBackend()
    engine = new_engine(backend, max_num_seqs=2)
    backend.fail_at = 2
    with pytest.raises(MemoryError):
        engine.generate(["a"] * 5, SamplingParams(seed=1, ignore_eos=True))
    assert backend.caches == {}
    assert not engine.has_unfinished_requests()
    assert (engine.num_waiting, engine.num_running) == (0, 0)
    assert engine.generate("a", GREEDY.replace(max_tokens=2))[0].num_completion_tokens > 0


def test_one_request_may_have_the_whole_context_in_one_token_steps() -> None:
    backend = FakeBackend(max_position_embeddings=40)
    (completion,) = new_engine(backend, 1, 1).generate([2] * 30, SamplingParams(seed=0, ignore_eos=True))
    assert completion.num_completion_tokens == 10
    assert backend.batches == [[(0, 1)]] * 39  # the last token is drawn, and never read


def test_scores_are_finite_for_every_prefix_length() -> None:
    backend = FakeBackend()
    engine = new_engine(backend, 2, 3)
    token_ids = [2, *range(300, 310)]
    whole = engine.score(token_ids)
    for length in range(1, len(token_ids) + 1):
        np.testing.assert_allclose(engine.score(token_ids[:length]), whole[: length - 1], rtol=1e-6)
    assert whole.dtype == np.float32 and all(math.isfinite(value) and value < 0 for value in whole)
    assert backend.caches == {}


# -- threads --------------------------------------------------------------------------------------------------------


class SlowBackend(FakeBackend):
    """Lets other threads run amid a step, and notices if two use it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.users = 0

    def forward(self, batch: StepBatch) -> Logits:
        self.users += 1
        time.sleep(0.002)
        logits = super().forward(batch)
        assert self.users == 1, "two threads are in the backend"
        self.users -= 1
        return logits


def test_threads_share_steps_and_get_their_own_texts() -> None:
    alone = [contents(new_engine(FakeBackend()).generate(*one)[0]) for one in zip(PROMPTS, PARAMS, strict=True)]
    backend = SlowBackend()
    engine = new_engine(backend, max_num_seqs=8, max_num_batched_tokens=64)
    together = threading.Barrier(len(PROMPTS) + 1)

    def generate(index: int) -> tuple[object, ...]:
        together.wait()
        if index % 2:
            return contents(engine.generate(PROMPTS[index], PARAMS[index])[0])
        *_, last = engine.stream(PROMPTS[index], PARAMS[index])
        assert last.completion is not None
        return contents(last.completion)

    def look() -> list[list[float]]:
        together.wait()
        return [engine.score("hello").tolist() for _ in range(5)] + engine.logits("hello").tolist()

    with ThreadPoolExecutor(len(PROMPTS) + 1) as threads:
        looking = threads.submit(look)
        assert list(threads.map(generate, range(len(PROMPTS)))) == alone
        expected = new_engine(FakeBackend())
        assert looking.result() == [expected.score("hello").tolist()] * 5 + expected.logits("hello").tolist()
    assert max(len(batch) for batch in backend.batches) >= 3
    assert backend.caches == {} and not engine.has_unfinished_requests()


def test_no_thread_waits_for_the_end_of_anothers_text() -> None:
    engine = new_engine(SlowBackend())
    whole = SamplingParams(seed=1, ignore_eos=True)
    with ThreadPoolExecutor(1) as threads:
        long = threads.submit(engine.generate, "a", whole)
        while not engine.num_running:
            time.sleep(0.001)
        engine.generate("b", whole.replace(max_tokens=3))
        assert not long.done()


def test_a_step_that_fails_in_another_thread_is_told() -> None:
    backend = SlowBackend()
    engine = new_engine(backend)
    backend.fail_at = 20
    together = threading.Barrier(2)

    def generate(prompt: str) -> BaseException | None:
        together.wait()
        try:
            engine.generate(prompt, SamplingParams(seed=1, ignore_eos=True))
        except (MemoryError, RuntimeError) as error:
            return error
        return None

    with ThreadPoolExecutor(2) as threads:
        errors = sorted(type(error).__name__ for error in threads.map(generate, ["a", "b"]))
    assert errors == ["MemoryError", "RuntimeError"]
    assert backend.caches == {} and not engine.has_unfinished_requests()


def test_a_stream_dropped_amid_a_step_ends_after_it() -> None:
    """As the collector of garbage may do at any time; so does a handler of a signal that aborts a request."""
    backend = FakeBackend()
    engine = new_engine(backend)
    streams = [engine.stream("a", SamplingParams(seed=1, ignore_eos=True))]
    next(streams[0])
    aborted = engine.add_request("b", SamplingParams(seed=1, ignore_eos=True))

    def drop(history: list[int]) -> Logits:
        streams.clear()
        engine.abort(aborted)
        assert 0 in backend.caches
        return FakeBackend.logits_after(backend, history)

    backend.logits_after = drop  # type: ignore[method-assign]
    engine.step()
    assert backend.caches == {}
    assert [delta.finish_reason for delta in engine.step()] == ["abort"]
    assert not engine.has_unfinished_requests()
