"""`gemma2.load` and what it gives: from a folder on disk to text, and one clear error for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma2
from gemma2 import api
from gemma2.api import LLM
from gemma2.checkpoints import open_checkpoint, save_checkpoint, save_packed
from gemma2.config import Gemma2Config
from gemma2.cpu import CpuBackend
from gemma2.errors import (
    ChatFormatError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    Gemma2Error,
    KVCacheFullError,
    MissingDependencyError,
    SamplingError,
    TokenizerError,
)
from gemma2.model import Gemma2ForCausalLM, TorchBackend, state_arrays
from gemma2.sampling import SamplingParams
from gemma2.text import Tokenizer, encode_chat, train_tokenizer

SENTENCE = "the cat sees a dog then slowly runs from old house to new green river and she was where he is. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of its own; the weights are random, the vocabulary has rows to spare."""
    root = tmp_path_factory.mktemp("api")
    train_tokenizer([SENTENCE * 4] * 10, vocab_size=490, folder=root / "tokenizer")
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        vocab_size=500,
        sliding_window=8,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = Gemma2ForCausalLM(config, dtype=torch.bfloat16)
    model.initialize(torch.Generator().manual_seed(0))
    files = list((root / "tokenizer").iterdir())
    return save_checkpoint(root / "model", config, state_arrays(model), tokenizer_files=files)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    """The folder's model on the CPU."""
    return gemma2.load(folder, device="cpu")


def copy_of(folder: Path, target: Path, **files: object) -> Path:
    """A second folder with the same weights and some JSON files replaced or added."""
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    for name, values in files.items():
        path = target / f"{name}.json"
        path.unlink(missing_ok=True)
        path.write_text(values if isinstance(values, str) else json.dumps(values))
    return target


# -- What it gives ------------------------------------------------------------------------------------------------


def test_one_prompt_and_several(llm: LLM) -> None:
    one = llm.generate("the cat", max_tokens=6, temperature=0, ignore_eos=True)
    assert isinstance(one.text, str) and len(one.token_ids) == 6 and one.finish_reason == "length"
    several = llm.generate(["a dog", "the cat", "she"], max_tokens=6, temperature=0, ignore_eos=True)
    assert [len(each.token_ids) for each in several] == [6, 6, 6]
    assert several[1].token_ids == one.token_ids and several[1].text == one.text
    ids = llm.tokenizer.encode("the cat")
    assert llm.generate(ids, max_tokens=6, temperature=0, ignore_eos=True).token_ids == one.token_ids
    assert llm.generate(np.array(ids), max_tokens=6, temperature=0, ignore_eos=True).token_ids == one.token_ids
    assert [each.token_ids for each in llm.generate([ids], max_tokens=6, temperature=0, ignore_eos=True)] == [
        one.token_ids
    ]
    nothing: list[str] = []
    assert len(llm.generate(nothing, max_tokens=6)) == 0


def test_greedy_text_is_what_the_logits_say(llm: LLM) -> None:
    completion = llm.generate("the cat", max_tokens=8, temperature=0, ignore_eos=True)
    ids = [*completion.prompt_token_ids, *completion.token_ids]
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), 500) and logits.dtype == np.float32 and np.abs(logits).max() <= 30
    drawn = logits[len(completion.prompt_token_ids) - 1 : -1, : llm.tokenizer.vocab_size].argmax(-1)
    assert tuple(drawn.tolist()) == completion.token_ids


def test_params_and_options_join(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert len(llm.generate("the cat", params).token_ids) == 3
    assert len(llm.generate("the cat", params, max_tokens=5).token_ids) == 5
    drawn = [llm.generate("the cat", SamplingParams(seed=seed), max_tokens=9).token_ids for seed in (4, 4, 5)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stream_joins_to_the_text(llm: LLM) -> None:
    whole = llm.generate("the cat", max_tokens=12, temperature=0, ignore_eos=True)
    pieces = list(llm.stream("the cat", max_tokens=12, temperature=0, ignore_eos=True))
    assert "".join(pieces) == whole.text and all(pieces)


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("the cat", max_tokens=30, temperature=0, ignore_eos=True)
    next(stream)
    assert llm.engine.num_running == 1
    del stream
    assert llm.engine.num_running == 0
    assert isinstance(llm.backend, CpuBackend) and llm.backend.kv_cache_used_bytes == 0


def test_chat_reads_the_chat_format(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    answer = llm.chat(messages, max_tokens=5, temperature=0, ignore_eos=True)
    assert list(answer.prompt_token_ids) == encode_chat(llm.tokenizer, messages)
    assert answer.prompt_token_ids.count(llm.tokenizer.bos_id) == 1
    with pytest.raises(ChatFormatError):
        llm.chat([{"role": "system", "content": "be brief"}, *messages], strict_system=True)
    llm.chat([{"role": "system", "content": "be brief"}, *messages], max_tokens=1)


def test_threads_may_use_one_model(llm: LLM) -> None:
    prompts = ["the cat", "a dog then", "she was where he", "new green river"]
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    texts = [llm.generate(prompt, **options).text for prompt in prompts]
    logits = [llm.logits(llm.tokenizer.encode(prompt)) for prompt in prompts]

    def use(index: int) -> bool:
        prompt = prompts[index % 4]
        return (
            llm.generate(prompt, **options).text == texts[index % 4]
            and "".join(llm.stream(prompt, **options)) == texts[index % 4]
            and np.array_equal(llm.logits(llm.tokenizer.encode(prompt)), logits[index % 4])
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(24)))
    assert isinstance(llm.backend, CpuBackend) and llm.backend.kv_cache_used_bytes == 0


def test_a_text_that_is_ended_from_outside_does_not_end_in_silence(llm: LLM) -> None:
    pieces = llm.stream("the cat", max_tokens=20, temperature=0, ignore_eos=True)
    next(pieces)
    for request_id in list(llm.engine._requests):
        llm.engine.abort(request_id)
    with pytest.raises(Gemma2Error, match="the text was ended from outside"):
        list(pieces)


def test_config_and_tokenizer(llm: LLM, folder: Path) -> None:
    assert llm.config == Gemma2Config.from_json_file(folder)
    assert llm.tokenizer.decode(llm.tokenizer.encode("the cat sees")) == "the cat sees"


# -- Which weights, which stop tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "small", "dtype"),
    [
        ("auto", 10**9, torch.float32),
        ("auto", 0, torch.bfloat16),
        ("float32", 0, torch.float32),
        ("bfloat16", 10**9, torch.bfloat16),
    ],
)
def test_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str, small: int, dtype: torch.dtype) -> None:
    """ "auto" is float32 for a small model, and what the files hold for a large one."""
    monkeypatch.setattr(api, "SMALL_MODEL_PARAMETERS", small)
    backend = gemma2.load(folder, weights=weights, backend="torch", device="cpu").backend
    assert isinstance(backend, TorchBackend)
    assert backend._model.model.norm.weight.dtype == dtype


def test_who_runs_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_has_cuda", lambda: False)
    assert isinstance(gemma2.load(folder).backend, CpuBackend)
    assert isinstance(gemma2.load(folder, backend="torch").backend, TorchBackend)
    monkeypatch.setattr(api, "_has_cuda", lambda: True)
    assert isinstance(gemma2.load(folder, device="cpu").backend, CpuBackend)
    assert isinstance(gemma2.load(folder, weights="q8").backend, CpuBackend)
    assert api._choose_backend("auto", weights="auto", device=None) == "torch"
    assert api._choose_backend("auto", weights="bfloat16", device="cuda:1") == "torch"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "q8", "q4"])
def test_both_backends_give_nearly_the_same_logits(folder: Path, weights: str) -> None:
    ids = [2, *range(260, 300)]
    exact = gemma2.load(folder, backend="torch", weights="float32").logits(ids)
    ours = gemma2.load(folder, backend="cpu", weights=weights, num_threads=2).logits(ids)
    error = float(np.sqrt(np.mean((ours - exact) ** 2)) / exact.std())
    assert error < {"float32": 1e-5, "bfloat16": 0.02, "q8": 0.03, "q4": 0.3}[weights]


def test_a_folder_of_packed_weights(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "q4"
    save_packed(packed, open_checkpoint(folder), "q4", num_threads=2)
    loaded = gemma2.load(packed)
    assert isinstance(loaded.backend, CpuBackend) and loaded.backend.weights == "q4"
    again = gemma2.load(folder, backend="cpu", weights="q4")
    assert np.array_equal(loaded.logits([2, 300, 301]), again.logits([2, 300, 301]))
    with pytest.raises(ConfigError, match="its weights are q4, and q8 cannot be made of them"):
        gemma2.load(packed, weights="q8")
    with pytest.raises(ConfigError, match="holds weights for the CPU engine, which torch cannot run"):
        gemma2.load(packed, backend="torch")


def test_packed_weights_beside_a_whole_model_are_told(folder: Path, tmp_path: Path) -> None:
    both = copy_of(folder, tmp_path / "both")
    save_packed(tmp_path / "q4", open_checkpoint(folder), "q4", num_threads=2)
    (both / "model-q4.gemma2.safetensors").symlink_to(tmp_path / "q4" / "model-q4.gemma2.safetensors")
    sentences: list[str] = []
    loaded = gemma2.load(both, backend="cpu", notify=sentences.append)
    assert isinstance(loaded.backend, CpuBackend) and loaded.backend.weights == "float32"
    assert len(sentences) == 1 and "model-q4.gemma2.safetensors, which are not used" in sentences[0]
    gemma2.load(folder, backend="cpu", notify=sentences.append)
    gemma2.load(tmp_path / "q4", notify=sentences.append)
    assert len(sentences) == 1


def test_the_cache_takes_no_more_than_it_is_given(folder: Path) -> None:
    small = gemma2.load(folder, backend="cpu", kv_cache_bytes=1)  # room for one sequence, as always
    prompts, options = ["the cat", "a dog"], {"max_tokens": 50, "ignore_eos": True}
    with pytest.raises(KVCacheFullError, match="kv_cache_bytes"):
        small.generate(prompts, **options)
    gemma2.load(folder, backend="cpu", kv_cache_bytes=1 << 24).generate(prompts, **options)


def test_a_large_model_is_quantized_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "SMALL_MODEL_PARAMETERS", 0)
    monkeypatch.setattr("gemma2.checkpoints.packed_cache.SMALL_MODEL_PARAMETERS", 0)
    monkeypatch.setenv("GEMMA2_CACHE", str(tmp_path / "cache"))
    sentences: list[str] = []
    done: list[tuple[int, int]] = []
    first = gemma2.load(folder, backend="cpu", notify=sentences.append, progress=lambda *both: done.append(both))
    assert isinstance(first.backend, CpuBackend) and first.backend.weights == "q4"
    assert str(tmp_path / "cache") in sentences[0] and done[-1][0] == done[-1][1]
    capsys.readouterr()
    (tmp_path / "cache").rename(tmp_path / "other")
    gemma2.load(folder, backend="cpu")
    err = capsys.readouterr().err
    assert err == f"gemma2: {sentences[0]}\n", "who gives no function reads it, as it takes minutes"
    sentences.clear()
    second = gemma2.load(folder, backend="cpu", notify=sentences.append)
    assert not sentences and not capsys.readouterr().err
    assert np.array_equal(first.logits([2, 300]), second.logits([2, 300]))


@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_stop_tokens_of_the_folder_end_the_text(folder: Path, tmp_path: Path, file: str) -> None:
    plain = gemma2.load(folder, device="cpu")
    told = plain.generate("the cat", max_tokens=8, temperature=0)
    assert told.finish_reason == "length", "the test needs a text of ordinary tokens"
    stop = told.token_ids[3]
    values = {} if file == "generation_config" else json.loads((folder / "config.json").read_text())
    stopping = gemma2.load(
        copy_of(folder, tmp_path / "model", **{file: {**values, "eos_token_id": [1, stop]}}), device="cpu"
    )
    completion = stopping.generate("the cat", max_tokens=8, temperature=0)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == told.token_ids[: told.token_ids.index(stop) + 1]
    assert stopping.generate("the cat", max_tokens=8, temperature=0, ignore_eos=True).finish_reason == "length"
    assert not stopping.is_chat_tuned


def test_what_counts_as_chat_tuned(folder: Path, tmp_path: Path) -> None:
    end_of_turn = Tokenizer.from_folder(folder).end_of_turn_id
    assert (folder / "tokenizer_config.json").is_file(), "a chat template alone does not make a chat model"
    assert not gemma2.load(folder, device="cpu").is_chat_tuned
    tuned = copy_of(folder, tmp_path / "a", generation_config={"eos_token_id": [1, end_of_turn]})
    assert gemma2.load(tuned, device="cpu").is_chat_tuned
    base = copy_of(folder, tmp_path / "b", generation_config={"eos_token_id": 1})
    assert not gemma2.load(base, device="cpu").is_chat_tuned
    assert gemma2.load(copy_of(folder, tmp_path / "gemma-2-2b-it"), device="cpu").is_chat_tuned


def test_the_bundled_model_is_the_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BUNDLED_FOLDER", folder)
    bundled = gemma2.load(device="cpu")
    assert bundled.config == Gemma2Config.from_json_file(folder) and not bundled.is_chat_tuned


# -- Mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "cpu", "device": "cuda"}, ConfigError, r"device='cuda' is one of torch's, but the CPU engine is"),
        ({"weights": "q4", "device": "cuda"}, ConfigError, r"the CPU engine is to run the model, as weights='q4' need"),
        ({"backend": "torch", "weights": "q8"}, ConfigError, r"weights='q8' run in the CPU engine only"),
        ({"backend": "torch", "num_threads": 2}, ConfigError, r"num_threads, kv_cache and kv_cache_bytes are settings"),
        (
            {"backend": "torch", "kv_cache": "int8"},
            ConfigError,
            r"num_threads, kv_cache and kv_cache_bytes are settings",
        ),
        ({"backend": "cpu", "kv_cache": "int4"}, ConfigError, r"kv_cache must be one of auto, float32, bfloat16, int8"),
        ({"backend": "torch", "kv_cache_bytes": 9}, ConfigError, r"kv_cache_bytes are settings of the CPU engine"),
        ({"backend": "cpu", "kv_cache_bytes": 0}, ConfigError, r"kv_cache_bytes must be a whole number of at least 1"),
        ({"backend": "cpu", "num_threads": 0}, ConfigError, r"num_threads must be a whole number from 1 to 1024"),
        ({"backend": "torchh"}, ConfigError, r"backend must be one of .* but is 'torchh'. Did you mean 'torch'\?"),
        ({"weights": "bf16"}, ConfigError, r"weights must be one of auto, float32, bfloat16, q8, q4, but is 'bf16'"),
        ({"device": "gpu"}, ConfigError, r"device must be auto, cpu, cuda or cuda:N, but is 'gpu'"),
        ({"device": "meta"}, ConfigError, r"device must be auto, cpu, cuda or cuda:N, but is 'meta'"),
        ({"device": "cuda:99"}, ConfigError, r"device is 'cuda:99', but torch sees"),
        ({"revision": "main"}, CheckpointError, r"has no revision 'main'"),
    ],
)
def test_arguments_that_cannot_be(
    folder: Path, arguments: dict[str, Any], error: type[Gemma2Error], message: str
) -> None:
    with pytest.raises(error, match=message):
        gemma2.load(folder, **arguments)


def test_a_cache_that_cannot_be_is_refused_before_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "packed_model", lambda *args, **options: pytest.fail("rounds for minutes first"))
    for arguments in ({"kv_cache": "int4"}, {"kv_cache_bytes": 0}):
        with pytest.raises(ConfigError, match="kv_cache"):
            gemma2.load(folder, backend="cpu", **arguments)


def test_models_that_cannot_be(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        gemma2.load(tmp_path / "nothing here")
    with pytest.raises(ConfigError, match="the bundled model has no revision 'v2'"):
        gemma2.load(revision="v2")
    monkeypatch.setattr(api, "BUNDLED_FOLDER", tmp_path / "no bundle")
    with pytest.raises(CheckpointError, match="this installation has no bundled model"):
        gemma2.load()
    without_tokenizer = tmp_path / "without tokenizer"
    without_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        (without_tokenizer / name).symlink_to(folder / name)
    with pytest.raises(TokenizerError, match=r"needs a tokenizer.json or a tokenizer.model"):
        gemma2.load(without_tokenizer)
    broken = copy_of(folder, tmp_path / "broken", generation_config="{")
    with pytest.raises(CheckpointError, match=r"generation_config.json: cannot be read as a JSON object"):
        gemma2.load(broken)
    for wrong in (500, -1, "1", True):
        outside = copy_of(folder, tmp_path / f"outside {wrong}", generation_config={"eos_token_id": [wrong]})
        with pytest.raises(CheckpointError, match="eos_token_id must hold token ids from 0 to 499, but holds"):
            gemma2.load(outside)


def test_options_that_cannot_be(llm: LLM) -> None:
    with pytest.raises(SamplingError, match=r"'temprature' is not a sampling parameter.*Did you mean 'temperature'"):
        llm.generate("the cat", temprature=0)
    with pytest.raises(SamplingError, match="max_tokens must be a whole number"):
        llm.stream("the cat", max_tokens=0)
    with pytest.raises(SamplingError, match="params must be a SamplingParams, but is 64; options go by name"):
        llm.generate("the cat", 64)  # type: ignore[call-overload]
    with pytest.raises(ContextLengthError):
        llm.generate("the cat", max_tokens=64)
    with pytest.raises(ContextLengthError):
        llm.stream([5] * 64)
    with pytest.raises(Gemma2Error):
        llm.logits([])
    with pytest.raises(Gemma2Error):
        llm.logits([2, 500])
    with pytest.raises(ContextLengthError):
        llm.logits([2] * 65)


def test_without_torch_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.api.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'gemma2\[torch\]'"):
        gemma2.load(folder, backend="torch")


def test_what_the_package_offers(folder: Path) -> None:
    program = "import sys, gemma2; print([name for name in ('numpy', 'gemma2.api') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert gemma2.LLM is LLM and gemma2.Gemma2Error is Gemma2Error and set(dir(gemma2)) == set(gemma2.__all__)
    with pytest.raises(gemma2.Gemma2Error):
        gemma2.load(folder / "nothing")
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        gemma2.LLMs  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, gemma2, gemma2.api; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_cpu_engine_runs_without_torch(folder: Path) -> None:
    """Torch is hidden: whatever would import it fails."""
    program = (
        "import sys; sys.modules['torch'] = None; import gemma2; "
        f"print(gemma2.load({str(folder)!r}).generate('the cat', max_tokens=3, ignore_eos=True).finish_reason)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "length"
