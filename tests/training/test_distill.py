"""`gemma2 distill`: a student comes nearer its teacher, live, from a cache and on its own samples; and it resumes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from small_run import (
    SHORT_RUN,
    KilledError,
    Silent,
    changed,
    kill_and_finish,
    write_examples,
    write_lines,
    write_random_model,
    written_settings,
)

import gemma2
from gemma2.checkpoints import open_checkpoint
from gemma2.cli.main import main
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, ConfigError, DataError
from gemma2.model.modeling import Gemma2ForCausalLM
from gemma2.training.distill import check_settings, distill, write_cache
from gemma2.training.distill_settings import DistillSettings
from gemma2.training.distillation import torch_teacher
from gemma2.training.engine_teacher import engine_teacher
from gemma2.training.objectives import Batch

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the bundled tokenizer, sure of itself."""
    config = Gemma2Config.from_dict({**SHAPE, "hidden_size": 64, "vocab_size": 8192}, source="test")
    return write_random_model(tmp_path_factory.mktemp("teacher"), config, std=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_examples(tmp_path_factory.mktemp("data"))
    text = "The old man looked at her and said that he would go to the river in the morning. "
    write_lines(folder / "text.jsonl", [{"text": text * 8}] * 12)
    return folder


def settings_of(tmp_path: Path, base: Path, corpus: Path, name: str = "run", **changes: Any) -> DistillSettings:
    values: dict[str, Any] = {
        "output": str(tmp_path / name),
        "teacher": {"name": str(base)},
        "student": {"model": SHAPE},
        "text": {"train": [str(corpus / "text.jsonl")], "shuffle_buffer": 20},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "run": {**SHORT_RUN, "sequence_length": 32},
    }
    return written_settings(DistillSettings, tmp_path / f"{name}.yaml", changed(values, changes))


def run(settings: DistillSettings, progress: Silent | None = None) -> Path | None:
    student = None if settings.student.name is None else Path(settings.student.name)
    plan = check_settings(settings, Path(settings.teacher.name), student)
    return distill(settings, plan, progress=progress or Silent(), say=lambda line: None)


def weights(folder: Path | None) -> bytes:
    assert folder is not None
    return (folder / "model.safetensors").read_bytes()


def test_a_student_comes_nearer_its_teacher(tmp_path: Path, teacher: Path, data: Path) -> None:
    progress = Silent()
    settings = settings_of(
        tmp_path,
        teacher,
        data,
        text={"train": [str(data / "text.jsonl")], "validation": [str(data / "text.jsonl")], "shuffle_buffer": 20},
        run={"num_steps": 60, "validate_every": 30},
    )
    folder = run(settings, progress)
    assert folder == tmp_path / "run" / "model"
    # Random as it is, the teacher says little of the text itself; what counts is its distribution.
    assert progress.losses[-1] < 0.6 * progress.losses[0]
    ids = gemma2.load(teacher).tokenizer.encode("The old man looked at her and said that he would go")
    expected = gemma2.load(teacher, weights="float32").logits(ids)
    found = gemma2.load(folder).logits(ids)
    new = Gemma2ForCausalLM(open_checkpoint(folder).config)
    new.initialize(torch.Generator().manual_seed(0))

    def divergence(logits: np.ndarray) -> float:
        p, q = (torch.log_softmax(torch.tensor(x), -1) for x in (expected, logits))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.no_grad():
        before = divergence(new(torch.tensor([ids]))[0].numpy())
    assert divergence(found) < 0.6 * before
    assert (folder / "tokenizer.json").exists()


def test_the_engine_is_the_same_teacher(teacher: Path) -> None:
    from gemma2.model.loading import load_model

    checkpoint = open_checkpoint(teacher)
    draw = np.random.default_rng(0)
    segments = np.array([[1] * 20 + [2] * 12, [1] * 5 + [2] * 20 + [0] * 7])
    positions = np.array([[*range(20), *range(12)], [*range(5), *range(20), *[0] * 7]])
    labels = draw.integers(0, 8192, (2, 32))
    labels[draw.random((2, 32)) < 0.4] = -100
    labels[segments == 0] = -100
    batch = Batch(
        input_ids=torch.from_numpy(draw.integers(0, 8192, (2, 32))),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        segment_ids=torch.from_numpy(segments),
    )
    places = torch.from_numpy(np.flatnonzero(labels.reshape(-1) != -100))
    exact = torch_teacher(load_model(checkpoint, dtype="float32"), compute_dtype=torch.float32)(batch)
    cap = checkpoint.config.final_logit_softcapping
    assert cap is not None
    expected = cap * torch.tanh(exact.at(places) / cap)
    backend = gemma2.load(teacher, weights="float32").backend
    for size in (1, 3, 64):
        reader = engine_teacher(backend)(batch)
        found = torch.cat([reader.at(piece).clone() for piece in torch.split(places, size)])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["text", "examples"])
def test_a_cache_of_all_words_teaches_the_same(tmp_path: Path, teacher: Path, data: Path, kind: str) -> None:
    changes: dict[str, Any] = {"run": {"num_steps": 20}}
    if kind == "examples":
        changes = {"text": None, "examples": {"train": [str(data / "sums.jsonl")]}, "run": {"num_steps": None}}
        changes["run"]["num_epochs"] = 2
    live = Silent()
    run(settings_of(tmp_path, teacher, data, "live", **changes), live)
    cache = tmp_path / "cache"
    changes["teacher"] = {"cache": str(cache), "cache_top_k": 8192}
    settings = settings_of(tmp_path, teacher, data, "cached", **changes)
    plan = check_settings(settings, teacher, None, for_cache=True)
    done: list[int] = []
    asked = iter([False, False, True])
    assert not write_cache(
        settings, plan, cache, on_step=lambda step, n: done.append(n), should_stop=lambda: next(asked, False)
    )
    assert len(done) == 3, "it stops after a step"
    with pytest.raises(CheckpointError, match="is not whole, from step 0 on; `gemma2 distill cache` goes on"):
        run(settings)
    again: list[int] = []
    assert write_cache(settings, plan, cache, on_step=lambda step, n: again.append(n))
    assert len(again) == plan.num_steps
    assert again[:3] == [0] * 3 and all(again[3:]), "and goes on after what is there"
    cached = Silent()
    run(settings, cached)
    assert cached.losses == pytest.approx(live.losses, rel=2e-3)

    few = settings_of(tmp_path, teacher, data, "few", **{**changes, "teacher": {"cache": str(tmp_path / "few8")}})
    assert few.teacher.cache is not None
    write_cache(
        few, check_settings(few, teacher, None, for_cache=True), few.teacher.cache, on_step=lambda step, n: None
    )
    sixty_four = Silent()
    run(few, sixty_four)
    assert sixty_four.losses[-1] < sixty_four.losses[0]

    file = sorted(cache.glob("steps-*.safetensors"))[0]
    contents = bytearray(file.read_bytes())
    contents[-9] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match="its checksum is another one"):
        run(settings_of(tmp_path, teacher, data, "damaged", **changes))
    again.clear()
    assert write_cache(settings, plan, cache, on_step=lambda step, n: again.append(n))
    assert all(again[:5]) and again[16:] == [0] * len(again[16:]), "what is damaged is written anew, and nothing else"
    mended = Silent()
    run(settings_of(tmp_path, teacher, data, "mended", **changes), mended)
    assert mended.losses == cached.losses
    changes["run"] = {**changes["run"], "seed": 3}
    with pytest.raises(ConfigError, match=r"is a cache of something else \(identity.run.seed: 0 then, 3 now\)"):
        run(settings_of(tmp_path, teacher, data, "other", **changes))


def written_cache(settings: DistillSettings, teacher: Path) -> Path:
    assert settings.teacher.cache is not None
    plan = check_settings(settings, teacher, None, for_cache=True)
    assert write_cache(settings, plan, settings.teacher.cache, on_step=lambda step, n: None)
    return settings.teacher.cache


def test_a_cache_becomes_longer(tmp_path: Path, teacher: Path, data: Path) -> None:
    changes: dict[str, Any] = {"teacher": {"cache": str(tmp_path / "cache"), "cache_top_k": 8}}
    short = settings_of(tmp_path, teacher, data, "short", **changes, run={"num_steps": 3})
    cache = written_cache(short, teacher)
    longer = settings_of(tmp_path, teacher, data, "longer", **changes, run={"num_steps": 5})
    with pytest.raises(ConfigError, match="holds 3 steps, but the run takes 5; `gemma2 distill cache` with this run"):
        run(longer)
    steps: list[int] = []
    plan = check_settings(longer, teacher, None, for_cache=True)
    assert write_cache(longer, plan, cache, on_step=lambda step, n: steps.append(n))
    assert steps[:3] == [0] * 3 and all(steps[3:])
    run(longer)
    run(short)
    per_token = 8 * (2 + 2) + 4  # words of 8,192 in two bytes, log-probabilities in two, the rest's in four
    num_tokens = 5 * 4 * 32
    size = sum(file.stat().st_size for file in cache.glob("steps-*"))
    assert 0.8 * num_tokens * per_token < size < num_tokens * per_token + 1000, "the size that is stated"


def test_a_cache_belongs_to_its_teacher_and_its_texts(tmp_path: Path, teacher: Path, data: Path) -> None:
    own, texts = tmp_path / "teacher", tmp_path / "texts.jsonl"
    shutil.copytree(teacher, own)
    shutil.copy(data / "text.jsonl", texts)
    changes: dict[str, Any] = {
        "teacher": {"cache": str(tmp_path / "cache"), "cache_top_k": 8},
        "text": {"train": [str(texts)], "shuffle_buffer": 20},
    }
    cache = written_cache(settings_of(tmp_path, own, data, **changes), own)
    moved = own.rename(tmp_path / "moved")
    run(settings_of(tmp_path, moved, data, "moved-run", **changes))  # wherever it lies
    with pytest.raises(ConfigError, match=r"identity\.teacher\.weights: 'float32' then, 'bfloat16' now"):
        run(settings_of(tmp_path, moved, data, "b", **changes, run={"dtype": "bfloat16"}))

    texts.write_text(texts.read_text().replace("old man", "young woman"))
    settings = settings_of(tmp_path, moved, data, "c", **changes)
    with pytest.raises(CheckpointError, match="step 0 was written for another batch"):
        run(settings)
    with pytest.raises(CheckpointError, match="step 0 was written for another batch"):
        written_cache(settings, moved)

    config = open_checkpoint(teacher).config
    shutil.rmtree(moved)
    write_random_model(moved, config, std=0.2)
    for use in (run, partial(written_cache, teacher=moved)):
        with pytest.raises(ConfigError, match=r"is a cache of something else \(identity\.teacher\.files"):
            use(settings)

    info = cache / "cache.json"
    good = json.loads(info.read_text())
    for change in ({"num_steps": "x"}, {"top_k": None}, {"identity": 3}, {"version": 1}):
        info.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=r"as the description of a cache|only 2 can be read"):
            run(settings)
    with FileLock(cache / ".lock"), pytest.raises(ConfigError, match="another process is writing this cache"):
        written_cache(settings, moved)


def test_killed_with_sigkill_at_any_moment(tmp_path: Path, teacher: Path, data: Path) -> None:
    whole = run(settings_of(tmp_path, teacher, data, "whole", run={"num_steps": 12}))
    settings_of(tmp_path, teacher, data, run={"num_steps": 12})
    kill_and_finish(["distill", str(tmp_path / "run.yaml")], tmp_path / "run" / "log.jsonl")
    assert weights(tmp_path / "run" / "model") == weights(whole)


def test_the_writing_of_a_cache_killed_with_sigkill(tmp_path: Path, teacher: Path, data: Path) -> None:
    changes: dict[str, Any] = {"run": {"num_steps": 200, "batch_size": 2}}
    whole = settings_of(tmp_path, teacher, data, "whole", **changes, teacher={"cache": str(tmp_path / "whole-cache")})
    written_cache(whole, teacher)
    settings_of(tmp_path, teacher, data, **changes, teacher={"cache": str(tmp_path / "cache")})
    kill_and_finish(["distill", "cache", str(tmp_path / "run.yaml")], tmp_path / "cache", num_kills=3)
    for file in (tmp_path / "whole-cache").glob("steps-*"):
        assert file.read_bytes() == (tmp_path / "cache" / file.name).read_bytes()


@pytest.mark.parametrize("kind", ["text", "examples"])
def test_samples_of_rows_as_long_as_the_context(tmp_path: Path, teacher: Path, data: Path, kind: str) -> None:
    changes: dict[str, Any] = {"on_policy": {"prompt_tokens": 4}, "run": {"num_steps": 2, "sequence_length": 64}}
    if kind == "examples":
        changes |= {"text": None, "examples": {"train": [str(data / "sums.jsonl")], "packing": False}}
    progress = Silent()
    run(settings_of(tmp_path, teacher, data, **changes), progress)
    assert len(progress.losses) == 2


def test_models_and_data_that_do_not_fit(tmp_path: Path, teacher: Path, data: Path) -> None:
    def check(message: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        settings = settings_of(tmp_path, teacher, data, **changes)
        student = None if settings.student.name is None else Path(settings.student.name)
        with pytest.raises(error, match=message):  # as --dry-run looks
            check_settings(settings, teacher, student, needs_cache=False)

    swapped = tmp_path / "swapped"
    shutil.copytree(teacher, swapped)
    (swapped / "tokenizer.model").unlink()
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["▁house"], words["▁river"] = words["▁river"], words["▁house"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    check(r"have other tokenizers \(piece", student={"name": str(swapped), "model": None})
    check("must not pass the student's 64 tokens", run={"sequence_length": 65})
    check("number of layers from 0 to 2, the layers of the model, but is 9", run={"gradient_checkpointing": 9})
    check("must be a multiple of num_streams", text={"train": [str(data / "text.jsonl")], "num_streams": 3})
    check("'absent'", DataError, text={"train": [str(data / "text.jsonl")], "text_key": "absent"})
    pairs, sums = str(data / "pairs.jsonl"), str(data / "sums.jsonl")
    long = {"sequence_length": 64}
    check("examples.train holds preference pairs", DataError, text=None, examples={"train": [pairs]}, run=long)
    examples = {"train": [sums], "validation": [pairs]}
    check("examples.validation holds preference pairs", DataError, text=None, examples=examples, run=long)
    examples = {"train": [sums], "validation": ["absent.jsonl"]}
    check("absent", DataError, text=None, examples=examples)
    check(
        "must name layers from 0 to 1, but holds",
        student={"name": str(teacher), "model": None},
        adapter={"layers_to_transform": [77]},
    )


@pytest.mark.parametrize("source", ["live", "on policy", "cache"])
def test_a_run_that_dies_ends_with_the_same_student(tmp_path: Path, teacher: Path, data: Path, source: str) -> None:
    changes: dict[str, Any] = {}
    if source == "on policy":
        changes = {
            "text": None,
            "examples": {"train": [str(data / "sums.jsonl")]},
            "on_policy": {"fraction": 0.6},
            "run": {"num_steps": 4, "batch_size": 2},
        }
    if source == "cache":
        changes = {"teacher": {"cache": str(tmp_path / "cache")}}
        settings = settings_of(tmp_path, teacher, data, **changes)
        plan = check_settings(settings, teacher, None, for_cache=True)
        write_cache(settings, plan, tmp_path / "cache", on_step=lambda step, n: None)
    whole = run(settings_of(tmp_path, teacher, data, "whole", **changes))
    settings = settings_of(tmp_path, teacher, data, "broken", **changes)
    with pytest.raises(KilledError):
        run(settings, Silent(3))
    assert weights(run(settings)) == weights(whole)


def test_what_a_student_says_itself(tmp_path: Path, teacher: Path, data: Path) -> None:
    from gemma2.data import ExampleLoader, tokenize_examples
    from gemma2.model.loading import load_model
    from gemma2.text import Tokenizer
    from gemma2.training.distill_settings import OnPolicySettings
    from gemma2.training.on_policy import OnPolicyLoader

    tokenizer = Tokenizer.from_folder(teacher)
    examples = tokenize_examples([str(data / "sums.jsonl")], tokenizer, sequence_length=64)
    student = load_model(open_checkpoint(teacher), dtype="float32")
    settings = OnPolicySettings(temperature=100.0)
    plain = next(ExampleLoader(examples, batch_size=3))
    sampled = next(OnPolicyLoader(ExampleLoader(examples, batch_size=3), student, tokenizer, settings, seed=1))
    again = next(OnPolicyLoader(ExampleLoader(examples, batch_size=3), student, tokenizer, settings, seed=1))
    other = next(OnPolicyLoader(ExampleLoader(examples, batch_size=3), student, tokenizer, settings, seed=2))
    np.testing.assert_array_equal(sampled.input_ids, again.input_ids)
    assert (sampled.input_ids != other.input_ids).any()
    for row in range(3):
        for segment in range(1, plain.segment_ids[row].max() + 1):
            before, after = plain.segment_ids[row] == segment, sampled.segment_ids[row] == segment
            prompt = int(np.flatnonzero(plain.labels[row, before] != -100)[0]) + 1
            np.testing.assert_array_equal(
                plain.input_ids[row, before][:prompt], sampled.input_ids[row, after][:prompt], "prompts stay"
            )
            ids, labels = sampled.input_ids[row, after], sampled.labels[row, after]
            assert (labels[: prompt - 1] == -100).all() and (labels[prompt - 1 :] != -100).all()
            np.testing.assert_array_equal(ids[prompt:], labels[prompt - 1 : -1])
            np.testing.assert_array_equal(sampled.positions[row, after], np.arange(len(ids)))
    assert (sampled.labels[sampled.segment_ids == 0] == -100).all()


def test_students_that_exist_and_adapters(tmp_path: Path, teacher: Path, data: Path) -> None:
    student = run(settings_of(tmp_path, teacher, data, "first", run={"num_steps": 2}))
    settings = settings_of(
        tmp_path,
        teacher,
        data,
        "second",
        student={"name": str(student), "model": None},
        adapter={"r": 4},
        teacher={"backend": "cpu", "weights": "q8"},
        objective={"kind": "jsd", "beta": 0.3, "temperature": 2.0, "hard_label_weight": 0.2},
        run={"num_steps": 8},
    )
    progress = Silent()
    folder = run(settings, progress)
    assert folder == tmp_path / "second" / "adapter"
    assert np.mean(progress.losses[-3:]) < np.mean(progress.losses[:3])
    gemma2.load(student, adapter=folder).generate("The old man", max_tokens=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "data is needed"),
        ({"student": {"name": "bundled"}}, "needs either name"),
        ({"student": {"model": {**SHAPE, "hiden_size": 3}}}, "there is no field 'hiden_size'"),
        ({"adapter": {"r": 2}}, "a new student is random"),
        ({"teacher": {"backend": "cpu", "weights": "nf4"}}, "cpu runs auto, float32, bfloat16, q8, q4, not nf4"),
        ({"teacher": {"cache": "x"}, "on_policy": {}}, "what the student will say cannot be in"),
        ({"objective": {"kind": "kl"}}, "objective.kind"),
        ({"run": {"num_steps": None}}, "run.num_steps is needed with text"),
        ({"objective": {"hard_label_weight": 0.5}, "on_policy": {}}, "must not take for the truth"),
        ({"objective": {"kind": "forward_kl", "beta": 0.9}}, "beta is of jsd only, but kind is forward_kl"),
        ({"objective": {"temperature": float("inf")}}, "objective.temperature: .*finite"),
        ({"run": {"compile": True}}, "the loss of distillation has no such form"),
        ({"on_policy": {"prompt_tokens": 100}}, r"prompt_tokens \(100\) must be below run.sequence_length \(32\)"),
    ],
)
def test_mistakes_in_settings(tmp_path: Path, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(tmp_path, tmp_path, data, **changes)


def test_the_command(tmp_path: Path, teacher: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings_of(tmp_path, teacher, data, teacher={"cache": str(tmp_path / "cache")}, run={"num_steps": 2})
    path = str(tmp_path / "run.yaml")
    assert main(["distill", path, "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert "64 most probable words takes 260 bytes a trained token" in shown and "memory: about" in shown
    assert main(["distill", path]) == 1
    assert "holds no cache.json; write a cache with `gemma2 distill cache" in capsys.readouterr().err
    assert main(["distill", "cache", path]) == 0
    assert main(["distill", path]) == 0
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert main(["distill", "cash", path]) == 1
    assert "one file of settings is needed, or cache and one" in capsys.readouterr().err
