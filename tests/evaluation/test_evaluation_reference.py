"""Scores of text against transformers in float32, which reads the same windows one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2.api import BUNDLED_FOLDER, LLM, load
from gemma2.evaluation import TextScore, score_texts

TEXT = (Path(__file__).parents[2] / "docs" / "tour.md").read_text(encoding="utf-8")[:1500]
TEXTS = [TEXT, "A second, short one: é🤗▁.", TEXT[100:300]]
BOS = 2


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load(backend="cpu", weights="float32", num_threads=1)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_FOLDER, dtype=torch.float32, attn_implementation="eager")
    return model.eval()  # type: ignore[no-any-return]


def reference_nats(
    model: torch.nn.Module, texts: list[str], *, context: int, stride: int, bos: int | None = BOS
) -> tuple[float, int]:
    """Sum of -ln p and number of tokens, as the definition says it: text by text, window by window."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_FOLDER)
    nats, num_tokens = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        num_scored = 0
        for begin in range(0, len(ids), stride):
            window = ids[begin : begin + context]
            inputs = torch.tensor([[BOS if bos is None else bos, *window[:-1]]])
            with torch.inference_mode():
                logits = model(inputs if bos is not None else inputs[:, 1:]).logits[0].double()
            logprobs = logits.log_softmax(-1)
            if bos is None:  # the first token has nothing that it could be predicted from
                logprobs = torch.cat([torch.zeros(1, logprobs.shape[1]), logprobs])
            new = len(window) - (num_scored - begin)
            for index in range(len(window) - new, len(window)):
                nats -= float(logprobs[index, window[index]])
            num_scored += new
            num_tokens += new
            if num_scored == len(ids):
                break
    return nats, num_tokens


@pytest.mark.parametrize(("context", "stride"), [(512, 256), (100, 30), (64, 64), (12, 1)])
def test_the_same_as_transformers(llm: LLM, reference: torch.nn.Module, context: int, stride: int) -> None:
    texts = TEXTS[1:] if stride == 1 else TEXTS
    ours = score_texts(llm.backend, llm.tokenizer, texts, context=context, stride=stride)
    nats, num_tokens = reference_nats(reference, texts, context=context, stride=stride)
    assert ours.num_tokens == num_tokens
    assert ours.num_bytes == sum(len(text.encode()) for text in texts)
    assert ours.nats / num_tokens == pytest.approx(nats / num_tokens, abs=2e-6)


def test_it_bites(llm: LLM, reference: torch.nn.Module) -> None:
    """Mistakes that a program may make: no <bos>, another token for it, one token of context too few."""
    texts = TEXTS[1:]
    ours = score_texts(llm.backend, llm.tokenizer, texts, context=20, stride=10)
    for mistake in ({"bos": None}, {"bos": 1}, {"context": 19}, {"stride": 11}):
        options = {"context": 20, "stride": 10, **mistake}
        nats, num_tokens = reference_nats(reference, texts, **options)  # type: ignore[arg-type]
        assert abs(ours.nats - nats) / num_tokens > 2e-4, mistake  # 100 times what is allowed


def test_every_backend_and_format(llm: LLM) -> None:
    def score(model: LLM) -> TextScore:
        return score_texts(model.backend, model.tokenizer, TEXTS, context=128)

    exact = score(llm)
    torch.set_num_threads(1)
    for options, tolerance in (
        ({"backend": "torch", "weights": "float32"}, 1e-6),
        ({"backend": "cpu", "weights": "bfloat16"}, 2e-3),
        ({"backend": "cpu", "weights": "q8", "kv_cache": "int8"}, 1e-2),
        ({"backend": "cpu", "weights": "q4"}, 3e-2),
    ):
        other = score(load(num_threads=1 if options["backend"] == "cpu" else None, **options))
        assert (other.num_tokens, other.num_bytes) == (exact.num_tokens, exact.num_bytes)
        assert other.bits_per_byte == pytest.approx(exact.bits_per_byte, abs=tolerance), options
        assert options["weights"] == "float32" or other.nats != exact.nats


def test_texts_of_one_step_do_not_see_each_other(llm: LLM) -> None:
    alone = [score_texts(llm.backend, llm.tokenizer, [text]).nats for text in TEXTS]
    assert score_texts(llm.backend, llm.tokenizer, TEXTS).nats == np.sum(alone)
