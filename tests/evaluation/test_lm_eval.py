"""The model for lm-eval: scores, texts and chat, against the engine and against lm-eval's own Hugging Face model.

Most tests need nothing of lm-eval but its base class, for which there is a stand-in; the others are skipped without it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval_stand_in
import numpy as np
import pytest

from gemma2.api import BUNDLED_FOLDER, LLM, load
from gemma2.cli.main import EXIT_FAILED, main
from gemma2.errors import ChatFormatError, ConfigError, ContextLengthError, SamplingError
from gemma2.generation import ContinuationScore

lm_eval_stand_in.put_in_place()
from gemma2.cli.lm_eval_model import Gemma2LM  # noqa: E402
from gemma2.evaluation.lm_eval import HarnessModel  # noqa: E402

needs_lm_eval = pytest.mark.skipif(not lm_eval_stand_in.IS_INSTALLED, reason="lm-eval is not installed")

PAIRS = [
    ("It was a dark", " night"),
    ("It was a dark", " zebra, and the old man"),
    ("She looked at him and", " said"),
    ("It was a dark ", "night"),  # the space goes to the continuation
    ("It was a dark", " and stormy night in the old house."),
    ("", "The house"),
    ("naïve 🤗", " café"),
    ("A line\n", "\nand more"),
    ("The end of <end_of_turn> is text", " here"),
]


@dataclass
class Request:
    """What lm-eval calls an Instance."""

    args: tuple[Any, ...]


def requests(*args: tuple[Any, ...]) -> list[Request]:
    return [Request(arguments) for arguments in args]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(num_threads=1)


@pytest.fixture(scope="module")
def model(llm: LLM) -> HarnessModel:
    return HarnessModel(llm)


def logprobs_of(llm: LLM, token_ids: list[int]) -> list[float]:
    return llm.engine.score(token_ids).tolist()


# -- scores ---------------------------------------------------------------------------------------------------------


def test_loglikelihoods_are_the_engines(llm: LLM, model: HarnessModel) -> None:
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(PAIRS, found, strict=True):
        ids = llm.tokenizer.encode(context + continuation)
        num_context = len(llm.tokenizer.encode(context.rstrip()))
        assert logprob == pytest.approx(sum(logprobs_of(llm, ids)[num_context - 1 :]), abs=1e-4)
        logits = llm.logits(ids[:-1])[num_context - 1 :, : llm.tokenizer.vocab_size]
        assert is_greedy == (logits.argmax(axis=1).tolist() == ids[num_context:])


def test_a_shared_context_is_read_once(llm: LLM, model: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    original = llm.backend.forward

    def forward(batch: Any) -> Any:
        lengths.extend(len(step.token_ids) for step in batch.steps)
        return original(batch)

    monkeypatch.setattr(llm.backend, "forward", forward)
    context = "It was a dark night, and the old man looked at her and said,"
    model.loglikelihood(requests(*[(context, answer) for answer in (" yes", " no", " perhaps")]), disable_tqdm=True)
    assert len([n for n in lengths if n > 5]) == 1 and sum(lengths) < 30


def test_is_greedy_where_it_is(llm: LLM, model: HarnessModel) -> None:
    text = llm.generate("The old man looked at", max_tokens=6, temperature=0).text
    ((_, is_greedy), (_, is_other)) = model.loglikelihood(
        requests(("The old man looked at", text), ("The old man looked at", text[:4] + "zebra")), disable_tqdm=True
    )
    assert is_greedy and not is_other


def test_a_long_context_loses_its_beginning_but_not_its_bos(llm: LLM) -> None:
    model = HarnessModel(llm, max_length=20)
    context, continuation = "words of a long text, " * 20, "and its end"
    ((logprob, _),) = model.loglikelihood(requests((context, continuation)), disable_tqdm=True)
    ids = llm.tokenizer.encode(context + continuation)
    num_continuation = len(ids) - len(llm.tokenizer.encode(context.rstrip()))
    shortened = [2, *ids[-20:]]
    assert logprob == pytest.approx(sum(logprobs_of(llm, shortened)[-num_continuation:]), abs=1e-4)
    with pytest.raises(ContextLengthError, match=r"a continuation has \d+ tokens, but the model reads 20"):
        model.loglikelihood(requests(("a", context)), disable_tqdm=True)


def test_a_continuation_that_joins_the_contexts_last_token(llm: LLM, model: HarnessModel) -> None:
    """ "th" + "e" is one token, as long as "th" was: it is what is scored."""
    assert len(llm.tokenizer.encode(" th")) == len(llm.tokenizer.encode(" the")) == 2
    ((logprob, _),) = model.loglikelihood(requests((" th", "e")), disable_tqdm=True)
    assert logprob == pytest.approx(logprobs_of(llm, llm.tokenizer.encode(" the"))[-1], abs=1e-4)


def test_rolling(llm: LLM) -> None:
    model = HarnessModel(llm, max_length=10)
    text = "It was a dark night, and the old man looked at her and said that he would go home."
    ids = llm.tokenizer.encode(text, add_bos=False)
    assert 20 < len(ids) < 30
    parts = [(ids[:10], 10), (ids[10:20], 10), (ids[-10:], len(ids) - 20)]
    expected = sum(sum(logprobs_of(llm, [2, *part])[-num_scored:]) for part, num_scored in parts)
    short = sum(logprobs_of(llm, llm.tokenizer.encode("Short.")))
    found = model.loglikelihood_rolling(requests((text,), ("",), ("Short.",)), disable_tqdm=True)
    assert found == pytest.approx([expected, 0.0, short], abs=1e-4)


@needs_lm_eval
@pytest.mark.parametrize("max_length", [2, 7, 10])
def test_rolling_has_lm_evals_windows(llm: LLM, max_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is scored once, where lm-eval's own model scores it, from as many tokens, the first of them <bos>."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tasks: list[Any] = []

    def score_continuations(asked: Any) -> Any:
        for task in asked:
            tasks.append(task)
            yield (ContinuationScore(logprobs=np.zeros(1, dtype=np.float32), is_greedy=False),)

    monkeypatch.setattr(llm.engine, "score_continuations", score_continuations)
    model = HarnessModel(llm, max_length=max_length)
    whole = llm.tokenizer.encode("It was a dark night, and the old man looked at her and said that he would go home.")
    for num_tokens in range(len(whole)):
        text = llm.tokenizer.decode(whole[: num_tokens + 1])
        ids = llm.tokenizer.encode(text, add_bos=False)
        tasks.clear()
        model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
        found = [(task.context.tolist(), task.continuations[0].tolist()) for task in tasks]
        windows = map(make_disjoint_window, get_rolling_token_windows(ids, 2, max_length, context_len=1))
        # Their later windows begin with the token before; Gemma reads nothing well that does not begin with <bos>.
        assert found == [([2, *context[1:]], scored) for context, scored in windows]
        assert [token for _, scored in found for token in scored] == ids


# -- texts ----------------------------------------------------------------------------------------------------------


def test_generate_until(llm: LLM, model: HarnessModel) -> None:
    prompts = ["It was a dark night, and", "Once upon a time", "The old man looked at her and said,"]
    options: dict[str, Any] = {"until": [",", "\n", ""], "max_gen_toks": 12}
    found = model.generate_until(requests(*[(prompt, options) for prompt in prompts]), disable_tqdm=True)
    for prompt, text in zip(prompts, found, strict=True):
        assert text == llm.generate(prompt, temperature=0, max_tokens=12, stop=[",", "\n"]).text
    (one,) = model.generate_until(
        requests((prompts[0], {"until": "man", "do_sample": False, "temperature": 1.0, "max_tokens": 9})), True
    )
    assert one == llm.generate(prompts[0], temperature=0, max_tokens=9, stop="man").text


def test_samples_differ_and_come_again(model: HarnessModel) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_gen_toks": 8}
    same = requests(*[("Once upon a time", options)] * 3)
    texts = model.generate_until(same, disable_tqdm=True)
    assert len(set(texts)) == 3 and model.generate_until(same, disable_tqdm=True) == texts


def test_a_long_prompt_makes_room_for_the_answer(llm: LLM) -> None:
    model = HarnessModel(llm, max_length=40)
    prompt = "words of a long text, " * 20
    options = {"until": [], "max_gen_toks": 10}
    (text,) = model.generate_until(requests((prompt, options)), disable_tqdm=True)
    ids = llm.tokenizer.encode(prompt)
    assert text == llm.generate([2, *ids[-29:]], temperature=0, max_tokens=10).text
    (text,) = model.generate_until(requests((prompt, {"max_gen_toks": 1000})), disable_tqdm=True)
    assert text == llm.generate([2, *ids[-19:]], temperature=0, max_tokens=20).text


def test_options_that_are_not_known(llm: LLM, model: HarnessModel) -> None:
    with pytest.raises(ConfigError, match=r"'temperatur'.* Did you mean 'temperature'\?"):
        model.generate_until(requests(("a", {}), ("b", {"temperatur": 1})), disable_tqdm=True)
    with pytest.raises(SamplingError, match="top_p must be"):
        model.generate_until(requests(("a", {"do_sample": True, "top_p": 7})), disable_tqdm=True)
    assert not llm.engine.has_unfinished_requests()


# -- chat -----------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you? "},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "Go on."},
]


def test_chat(llm: LLM, model: HarnessModel) -> None:
    text = model.apply_chat_template(CHAT)
    assert text.startswith("<bos><start_of_turn>user\nBe kind.\n\nWho are you?<end_of_turn>\n<start_of_turn>model\n")
    assert text.endswith("Go on.<end_of_turn>\n<start_of_turn>model\n")
    going_on = model.apply_chat_template(CHAT[:3], add_generation_prompt=False)
    assert going_on.endswith("<start_of_turn>model\nA model.")
    options = {"max_gen_toks": 8, "until": ["\n\n"]}
    (answer,) = model.generate_until(requests((text, options)), disable_tqdm=True)
    assert answer == llm.chat(CHAT, temperature=0, max_tokens=8, stop="\n\n").text
    with pytest.raises(ChatFormatError):
        model.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_template_for_the_log(model: HarnessModel) -> None:
    assert model.chat_template() == "" and "<start_of_turn>" in model.chat_template(True)
    with pytest.raises(ConfigError, match="no template 'mine'"):
        model.chat_template("mine")
    assert "/" not in model.tokenizer_name and model.tokenizer_name.endswith("tokenizer.json")


# -- loading --------------------------------------------------------------------------------------------------------


def test_model_args() -> None:
    model = Gemma2LM(str(BUNDLED_FOLDER), weights="q8", threads=1, max_length=64, batch_size=4, device="cuda:0")
    assert (model.max_length, model.max_gen_toks) == (64, 256)
    with pytest.raises(ConfigError, match=r"weight=… is not known.* Did you mean 'weights'\?"):
        Gemma2LM(weight="q8")
    with pytest.raises(ConfigError, match="max_length must be from 2 to 512"):
        Gemma2LM(threads=1, max_length=513)
    with pytest.raises(ConfigError, match="max_gen_toks must be at least 1"):
        Gemma2LM(threads=1, max_gen_toks=0)


def test_the_entry_point_is_the_class() -> None:
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'[project.entry-points."lm_eval.models"]\ngemma2 = "{Gemma2LM.__module__}:{Gemma2LM.__name__}"' in settings


def test_without_lm_eval(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["lm-eval", "run", "--tasks", "x"]) == EXIT_FAILED
    assert "pip install 'gemma2[eval]'" in capsys.readouterr().err


# -- with lm-eval ---------------------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_same_as_lm_evals_hugging_face_model(backend: str) -> None:
    """In float32, to 1e-3: loglikelihoods with <bos>, and rolling without the second one that it would put there."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from lm_eval.models.huggingface import HFLM

    ours = HarnessModel(load(backend=backend, weights="float32"))
    options = {"pretrained": str(BUNDLED_FOLDER), "dtype": "float32", "device": "cpu", "attn_implementation": "eager"}
    theirs = HFLM(**options, batch_size=4)
    pairs = [pair for pair in PAIRS if "<end_of_turn>" not in pair[0]]  # a control token to them, text to us
    found = ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=0, atol=1e-3)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    texts = [("It was a dark night, and the old man looked at her.",), ("The house\n\nof the naïve 🤗.",)]
    rolling = ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    without = HFLM(**options, add_bos_token=False)
    np.testing.assert_allclose(
        rolling, without.loglikelihood_rolling(requests(*texts), disable_tqdm=True), rtol=0, atol=1e-3
    )
    bos_forgotten = without.loglikelihood(requests(*pairs[:5]), disable_tqdm=True)
    assert min(abs(a[0] - b[0]) for a, b in zip(found, bos_forgotten, strict=False)) > 0.05
    prompt = ("It was a dark night, and", {"until": ["."], "max_gen_toks": 12, "do_sample": False})
    assert ours.generate_until(requests(prompt), True) == theirs.generate_until(requests(prompt), True)


_TASKS = {
    "books_mc": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "books_gen": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": [",", "."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
}
_DOCUMENTS = [
    {"question": "It was a dark", "choices": [" night", " zebra"], "answer": 0},
    {"question": "She looked at him and", "choices": [" potato", " said"], "answer": 1},
]


@needs_lm_eval
def test_tasks_from_local_files(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in _DOCUMENTS), encoding="utf-8")
    for name, task in _TASKS.items():
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
            "test_split": "test",
            "doc_to_text": "{{question}}",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**source, **task}), encoding="utf-8")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="gemma2",
        model_args=f"pretrained={BUNDLED_FOLDER},weights=float32,threads=1",
        device="cuda:0",  # what lm-eval's command line says on any machine
        tasks=list(_TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["books_mc"]["acc,none"] == 1.0
    for sample, document in zip(found["samples"]["books_gen"], _DOCUMENTS, strict=True):
        expected = llm.generate(document["question"], temperature=0, max_tokens=8, stop=[",", "."]).text
        assert sample["resps"] == [[expected]]


def test_the_verb_hands_its_arguments_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def cli_evaluate() -> None:
        seen.append(sys.argv)
        if "ls" in sys.argv:
            raise KeyError("tasks")

    module = ModuleType("lm_eval.__main__")
    module.cli_evaluate = cli_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(sys, "argv", ["gemma2"])
    assert main(["lm-eval", "run", "--tasks", "a,b", "--limit", "3"]) == 0
    assert main(["lm-eval", "run", "--model=hf", "--tasks", "a"]) == 0
    assert main(["lm-eval", "run", "--help"]) == 0
    assert main(["lm-eval"]) == 0
    settings = tmp_path / "settings.yaml"
    settings.write_text("tasks: [a]\n")
    assert main(["lm-eval", "run", "--config", str(settings)]) == 0
    settings.write_text("model: hf\ntasks: [a]\n")
    assert main(["lm-eval", "run", f"--config={settings}"]) == 0
    assert seen == [
        ["lm-eval", "run", "--tasks", "a,b", "--limit", "3", "--model", "gemma2"],
        ["lm-eval", "run", "--model=hf", "--tasks", "a"],
        ["lm-eval", "run", "--help"],
        ["lm-eval"],
        ["lm-eval", "run", "--config", str(settings), "--model", "gemma2"],
        ["lm-eval", "run", f"--config={settings}"],
    ]
    assert main(["lm-eval", "ls", "tasks"]) == EXIT_FAILED
    assert capsys.readouterr().err == "gemma2: error: lm-eval ended with KeyError: 'tasks' (--debug shows where)\n"
