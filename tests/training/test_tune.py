"""`gemma2 tune`: examples to an adapter or a model that other programs read; stopped, resumed, kept at its best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import (
    SHORT_RUN,
    KilledError,
    Silent,
    changed,
    kill_and_finish,
    write_examples,
    write_random_model,
    written_settings,
)

import gemma2
from gemma2.checkpoints import open_adapter, open_checkpoint, save_checkpoint
from gemma2.checkpoints.merging import averaged_tensors, folded_tensors
from gemma2.cli.main import main
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, ConfigError, DataError
from gemma2.training.tune import check_settings, tune
from gemma2.training.tune_settings import TuneSettings

pytest.importorskip("peft")

CONFIG = Gemma2Config(
    vocab_size=8192,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    sliding_window=16,
    max_position_embeddings=64,
)
IDS = [2, 105, 700, 900, 1200, 77, 3000, 12, 5, 4000, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the bundled tokenizer."""
    return write_random_model(tmp_path_factory.mktemp("base"), CONFIG, std=0.15)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data"))


def settings_of(tmp_path: Path, examples: Path, name: str = "run", **changes: Any) -> TuneSettings:
    values: dict[str, Any] = {
        "output": str(tmp_path / name),
        "adapter": {"r": 4},
        "data": {"train": [str(examples / "sums.jsonl")]},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "run": {**SHORT_RUN, "dtype": "float32"},
    }
    return written_settings(TuneSettings, tmp_path / f"{name}.yaml", changed(values, changes))


def run(settings: TuneSettings, base: Path, progress: Silent | None = None, **kwargs: Any) -> Path | None:
    plan = check_settings(settings, base)
    return tune(settings, plan, progress=progress or Silent(), say=lambda line: None, **kwargs)


def logits(base: Path, adapter: Path | None = None, **options: Any) -> np.ndarray:
    return gemma2.load(base, adapter=adapter, weights="float32", **options).logits(IDS)


def peft_logits(base: Path, adapter: Path | None = None) -> np.ndarray:
    """What transformers, and PEFT if there is an adapter, make of the same folders."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"use_dora": True, "target_modules": ["k_proj", "gate_proj", "o_proj"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_rslora": True},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora", "use_dora": True},
        {"layers_to_transform": [1], "lora_dropout": 0.2, "init_lora_weights": "gaussian"},
    ],
    ids=["lora", "rslora", "dora", "pissa", "olora", "pissa and dora", "olora and dora", "some layers"],
)
def test_an_adapter_means_the_same_in_peft_and_here(
    tmp_path: Path, base: Path, data: Path, variant: dict[str, Any]
) -> None:
    progress = Silent()
    folder = run(settings_of(tmp_path, data, adapter={"r": 4, **variant}), base, progress)
    assert folder == tmp_path / "run" / "adapter"
    assert progress.losses[-1] < progress.losses[0]
    expected = peft_logits(base, folder)
    assert np.abs(expected - logits(base)).max() > 0.05, "the adapter must do something"
    np.testing.assert_allclose(logits(base, folder), expected, atol=2e-4)
    np.testing.assert_allclose(logits(base, folder, backend="torch"), expected, atol=2e-4)
    merged = tmp_path / "merged"
    checkpoint = open_checkpoint(base)
    save_checkpoint(
        merged,
        CONFIG,
        folded_tensors(checkpoint, [open_adapter(folder, CONFIG)]),
        dtype="float32",
        tokenizer_files=checkpoint.tokenizer_files,
    )
    np.testing.assert_allclose(logits(merged), expected, atol=2e-4)
    np.testing.assert_allclose(peft_logits(merged), expected, atol=2e-4)


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_adapters_that_peft_wrote_are_read(tmp_path: Path, base: Path, variant: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"layers.0.mlp.down_proj": 5},
            **variant,
        ),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(tmp_path))
    expected = peft_logits(base, tmp_path)
    assert np.abs(expected - logits(base)).max() > 0.05
    np.testing.assert_allclose(logits(base, tmp_path), expected, atol=2e-4)


def test_the_engine_runs_an_adapter_on_quantized_weights(tmp_path: Path, base: Path, data: Path) -> None:
    folder = run(settings_of(tmp_path, data, run={"num_steps": 20}), base)
    exact, plain = logits(base, folder), logits(base)
    for weights, tolerance in (("bfloat16", 0.05), ("q8", 0.05), ("q4", 0.4)):
        llm = gemma2.load(base, adapter=folder, weights=weights)
        error = np.sqrt(np.mean((llm.logits(IDS) - exact) ** 2))
        change = np.sqrt(np.mean((plain - exact) ** 2))
        assert error < tolerance * change, (weights, error, change)


def test_every_weight_is_tuned_without_an_adapter(tmp_path: Path, base: Path, data: Path) -> None:
    progress = Silent()
    folder = run(settings_of(tmp_path, data, adapter=None, run={"num_steps": 30}), base, progress)
    assert folder == tmp_path / "run" / "model"
    assert progress.losses[-1] < 0.2 * progress.losses[0]
    llm = gemma2.load(folder)
    answer = llm.chat([{"role": "user", "content": "How much is 7 and 7?"}], max_tokens=20, temperature=0)
    assert answer.finish_reason == "stop", "it must learn to end its turn"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 107]
    np.testing.assert_allclose(logits(folder), peft_logits(folder), atol=2e-4)


@pytest.mark.parametrize("die_at", [1, 3, 5])
def test_a_run_that_dies_ends_with_the_same_adapter(tmp_path: Path, base: Path, data: Path, die_at: int) -> None:
    adapter = {"r": 4, "lora_dropout": 0.3}
    whole = run(settings_of(tmp_path, data, "whole", adapter=adapter), base)
    settings = settings_of(tmp_path, data, "broken", adapter=adapter)
    with pytest.raises(KilledError):
        run(settings, base, Silent(die_at))
    resumed = run(settings, base)
    assert whole is not None and resumed is not None
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_the_log_of_a_run_that_died_is_that_of_one_that_did_not(tmp_path: Path, base: Path, data: Path) -> None:
    def lines(name: str) -> list[tuple[str, int, float]]:
        entries = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [(entry["event"], entry["step"], entry["loss"]) for entry in entries]

    changes: dict[str, Any] = {
        "data": {"validation": [str(data / "other.jsonl")]},
        "run": {"log_every": 4, "checkpoint_every": 3, "num_steps": 8},
    }
    run(settings_of(tmp_path, data, "whole", **changes), base)
    settings = settings_of(tmp_path, data, "broken", **changes)
    with pytest.raises(KilledError):
        run(settings, base, Silent(4))
    run(settings, base)
    assert lines("broken") == lines("whole")
    early = settings_of(tmp_path, data, "early", **{**changes, "run": {**changes["run"], "log_every": 1}})
    with pytest.raises(KilledError):
        run(early, base, Silent(1))
    run(early, base)
    assert sum(line[:2] == ("validation", 0) for line in lines("early")) == 1


def test_the_best_is_kept_from_when_it_is_asked_for(tmp_path: Path, base: Path, data: Path) -> None:
    """The first validation is the best of all, but was not kept: the best of those after it is then written."""
    changes: dict[str, Any] = {
        "data": {"validation": [str(data / "other.jsonl")]},
        "optimizer": {"learning_rate": 3e-2},
    }
    before = settings_of(tmp_path, data, **changes, run={"validate_every": 2, "num_steps": 8})
    with pytest.raises(KilledError):
        run(before, base, Silent(3))
    progress = Silent()
    after = settings_of(tmp_path, data, **changes, run={"validate_every": 2, "num_steps": 8, "keep_best": True})
    run(after, base, progress)
    best = min(progress.validations, key=lambda validation: validation[1])
    assert torch.load(tmp_path / "run" / "checkpoints" / "best.pt")["step"] == best[0]


def test_a_resumed_run_does_not_keep_the_checkpoint_in_memory(tmp_path: Path, base: Path, data: Path) -> None:
    from gemma2.training.run_folder import RunFolder
    from gemma2.training.run_stages import resume_and_train

    settings = settings_of(tmp_path, data, adapter=None)
    with pytest.raises(KilledError):
        run(settings, base, Silent(3))
    state = RunFolder(settings.output, settings).last_state()
    assert state is not None

    class Loaded:
        step = tokens_seen = 0

        def load_state_dict(self, values: dict[str, Any]) -> None:
            assert values["model"]

        def train(self, *, should_stop: Any) -> None:
            assert state is not None and not state[1]

    resume_and_train(Loaded(), state, say=lambda line: None, should_stop=lambda: False)  # type: ignore[arg-type]


def test_killed_with_sigkill_at_any_moment(tmp_path: Path, base: Path, data: Path) -> None:
    changes: dict[str, Any] = {"model": {"name": str(base)}, "adapter": {"r": 4, "lora_dropout": 0.3}}
    whole = run(settings_of(tmp_path, data, "whole", **changes), base)
    settings_of(tmp_path, data, "run", **changes)
    assert whole is not None
    kill_and_finish(["tune", str(tmp_path / "run.yaml")], tmp_path / "run" / "log.jsonl")
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / "adapter" / name).read_bytes() == (whole / name).read_bytes()


def test_preferences_are_learned(tmp_path: Path, base: Path, data: Path) -> None:
    for name, adapter, dtype in (
        ("adapter", {"r": 4}, "float32"),
        ("full", None, "float32"),
        ("bf16", None, "bfloat16"),
    ):
        settings = settings_of(
            tmp_path,
            data,
            name,
            adapter=adapter,
            data={"train": [str(data / "pairs.jsonl")], "validation": [str(data / "pairs.jsonl")]},
            objective={"kind": "dpo"},
            run={"num_steps": 8, "validate_every": 4, "dtype": dtype},
            optimizer={"learning_rate": 3e-3},
        )
        progress = Silent()
        run(settings, base, progress)
        assert progress.losses[0] == pytest.approx(np.log(2), abs=1e-6), "nothing is preferred at first"
        assert progress.losses[-1] < 0.5
        entries = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        steps = [entry for entry in entries if entry["event"] == "step"]
        assert steps[-1]["rewards/accuracies"] > 0.9
        validations = [entry for entry in entries if entry["event"] == "validation"]
        assert "rewards/margins" in validations[0]
        assert "bits_per_byte" not in validations[0], "a loss of pairs is not in nats per token"


def test_the_best_is_kept_and_a_run_stops_early(tmp_path: Path, base: Path, data: Path) -> None:
    settings = settings_of(
        tmp_path,
        data,
        data={"validation": [str(data / "other.jsonl")]},
        optimizer={"learning_rate": 3e-2},
        run={
            "num_steps": 40,
            "validate_every": 1,
            "keep_best": True,
            "early_stopping_patience": 3,
            "tensorboard": True,
        },
    )
    progress = Silent()
    folder = run(settings, base, progress)
    assert folder is not None
    steps, losses = zip(*progress.validations, strict=True)
    best = int(np.argmin(losses))
    assert len(losses) == best + 4 < 40
    again = Silent()
    assert run(settings, base, again) == folder, "a run that is done stays so"
    assert again.losses == []
    adapter = open_adapter(folder, CONFIG)
    kept = torch.load(tmp_path / "run" / "checkpoints" / "best.pt")
    assert kept["step"] == steps[best]
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(
        adapter.updates[f"{name}.weight"].a, kept["model"][f"{name}.lora_A.default.weight"].numpy()
    )
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("quantization", ["nf4", "q8", "q4"])
def test_a_quantized_base(tmp_path: Path, base: Path, data: Path, quantization: str) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    progress = Silent()
    settings = settings_of(tmp_path, data, model={"quantization": quantization}, run={"num_steps": 12})
    folder = run(settings, base, progress)
    assert progress.losses[-1] < 0.8 * progress.losses[0]
    assert folder is not None
    assert open_adapter(folder, CONFIG).num_parameters > 0


def test_checkpointing_and_packing_change_rounding_only(tmp_path: Path, base: Path, data: Path) -> None:
    plain, other = Silent(), Silent()
    run(settings_of(tmp_path, data, "a", run={"num_steps": 3}), base, plain)
    run(settings_of(tmp_path, data, "b", run={"num_steps": 3, "gradient_checkpointing": 2}), base, other)
    assert other.losses == plain.losses
    whole = {"num_steps": 1, "batch_size": 24}
    first, second = Silent(), Silent()
    run(settings_of(tmp_path, data, "c", run=whole), base, first)
    run(settings_of(tmp_path, data, "d", run=whole, data={"packing": False}), base, second)
    assert second.losses == pytest.approx(first.losses, abs=1e-4)


def test_averages(tmp_path: Path, base: Path, data: Path) -> None:
    first = run(settings_of(tmp_path, data, "a", adapter=None), base)
    second = run(settings_of(tmp_path, data, "b", adapter=None, run={"seed": 5}), base)
    assert first is not None and second is not None
    models, origin = [open_checkpoint(first), open_checkpoint(second)], open_checkpoint(base)
    for name, average in averaged_tensors(models, weights=[3, 1]):
        a, b = (model.tensors[name].numpy() for model in models)
        np.testing.assert_allclose(average, 0.75 * a + 0.25 * b, atol=1e-6)
    for name, average in averaged_tensors(models, method="slerp", base=origin):
        a, b = (model.tensors[name].numpy() - origin.tensors[name].numpy() for model in models)
        change = average - origin.tensors[name].numpy()
        cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        assert float((change * (a + b)).sum()) > 0
        # Half-way on an arc, as far from either end.
        expected = (a + b) / np.sqrt(2 * (1 + cosine))
        np.testing.assert_allclose(change, expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="2 models need as many weights, but 3 came"):
        next(iter(averaged_tensors(models, weights=[1, 1, 1])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"r": 4, "target_modules": ["q_pro"]}}, "no linear map 'q_pro' in a layer"),
        ({"adapter": {"r": 4, "target_modules": ["lm_head"]}}, "embedding and head are one matrix"),
        ({"adapter": {"rank": 4}}, "adapter.rank: there is no such setting"),
        ({"adapter": None, "model": {"quantization": "nf4"}}, "cannot be trained themselves; add an adapter"),
        ({"adapter": {"use_dora": True}, "model": {"quantization": "q8"}}, "use_dora reads the frozen matrices"),
        ({"adapter": {"init_lora_weights": "pissa"}, "model": {"quantization": "q4"}}, "q4 would round once more"),
        ({"run": {"num_epochs": 2}}, "num_epochs and num_steps both"),
        ({"run": {"keep_best": True}}, "run.keep_best goes by the validation loss"),
        ({"data": {"format": "alpacca"}}, "data.format"),
        ({"objective": {"kind": "dpo"}, "data": {"format": "text"}}, "objective.kind dpo needs pairs"),
        (
            {"objective": {"kind": "dpo"}, "adapter": {"init_lora_weights": "pissa"}},
            "the reference of dpo is the model",
        ),
        ({"objective": {"kind": "dpo"}, "run": {"compile": True}}, "run.compile is of objective.kind next_token"),
        ({"objective": {"beta": 0.2}}, "objective.beta is of dpo only"),
        ({"adapter": {"init_lora_weights": "orthogonal", "r": 3}}, "orthogonal needs an even r, but it is 3"),
        (
            {"adapter": {"init_lora_weights": "orthogonal"}, "model": {"quantization": "nf4"}},
            "orthogonal is for matrices of numbers",
        ),
        ({"optimizer": {"betas": [0.9, 1.5]}}, r"optimizer\.betas\.1: .*less than 1"),
        ({"optimizer": {"learning_rate": float("inf")}}, r"optimizer\.learning_rate: .*finite"),
        (
            {"adapter": None, "model": {"quantization": "q8"}, "run": {"keep_best": True, "num_stepps": 3}},
            r"3 mistakes: run\.num_stepps: .*Did you mean 'num_steps'.*cannot be trained themselves.*run\.keep_best",
        ),
    ],
)
def test_mistakes_in_settings(tmp_path: Path, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(tmp_path, data, **changes)


def test_mistakes_that_only_the_model_and_the_data_show(tmp_path: Path, base: Path, data: Path) -> None:
    def check(message: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            run(settings_of(tmp_path, data, **changes), base)

    check("must not pass the model's 64 tokens", run={"sequence_length": 65})
    check("must name layers from 0 to 1, but holds", adapter={"layers_to_transform": [2]})
    check("the narrowest map of this model has a side of 32", adapter={"r": 33})
    check("holds preference pairs, but", DataError, data={"train": [str(data / "pairs.jsonl")]})
    check("holds single examples, but", DataError, objective={"kind": "dpo"})


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, base: Path, data: Path) -> None:
    folder = run(settings_of(tmp_path, data, run={"num_steps": 1}), base)
    assert folder is not None
    file = folder / "adapter_config.json"
    good = json.loads(file.read_text())

    def check(message: str, **changes: Any) -> None:
        file.write_text(json.dumps({**good, **changes}))
        with pytest.raises(CheckpointError, match=message):
            open_adapter(folder, CONFIG)

    check("peft_type must be LORA", peft_type="IA3")
    check("modules_to_save", modules_to_save=["lm_head"])
    check("r must be a whole number", r="four")
    check("is for weights that PEFT changes when it loads it", init_lora_weights="pissa_niter_4")
    check("alora_invocation_tokens is set", alora_invocation_tokens=[2])
    check("ask for", r=5)
    check("has no lora_magnitude_vector", use_dora=True)
    file.write_text(json.dumps(good))
    smaller = CONFIG.replace(num_hidden_layers=1) if hasattr(CONFIG, "replace") else None
    if smaller is not None:
        with pytest.raises(CheckpointError, match="no linear map of this Gemma 2 of 1 layers"):
            open_adapter(folder, smaller)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="adapter_model"):
        open_adapter(folder, CONFIG)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_adapter(tmp_path / "absent", CONFIG)
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        open_adapter(base, CONFIG)


def test_the_command(tmp_path: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings_of(tmp_path, data, model={"name": str(base)}, run={"num_steps": 1})
    path = str(tmp_path / "run.yaml")
    assert main(["tune", path, "--dry-run"]) == 0
    shown = capsys.readouterr().err
    assert "<start_of_turn>model\n⟦It is 0.<end_of_turn>⟧" in shown and "memory: about" in shown
    assert main(["tune", path, "--set", "run.seed=1"]) == 0
    folder = tmp_path / "run" / "adapter"
    assert capsys.readouterr().err.endswith(f"wrote {folder}\ntry: gemma2 chat --model {base} --adapter {folder}\n")
