"""Calibration: the inputs of the matrices are those of the model, and rounding that knows them costs less."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gemma2.api import BUNDLED_FOLDER, LLM
from gemma2.checkpoints import Checkpoint, expected_tensors, open_checkpoint, open_packed, save_checkpoint
from gemma2.checkpoints.packing import pack_model
from gemma2.cli.main import EXIT_FAILED, main
from gemma2.config import FULL, SLIDING, Gemma2Config
from gemma2.cpu import CpuBackend
from gemma2.cpu.calibration import CalibrationRun, cut, random_words
from gemma2.errors import CheckpointError, DataError
from gemma2.quantization import SECOND_PLANE, packed_shapes
from gemma2.quantization.feedback import DAMPING, SecondMoments
from gemma2.quantization.packing import EMBEDDING
from gemma2.text import Tokenizer

Floats = npt.NDArray[np.float32]

SMALL = Gemma2Config(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=11,
    vocab_size=320,
    max_position_embeddings=128,
    sliding_window=9,
    layer_types=(SLIDING, FULL, SLIDING),
)


def random_model(folder: Path) -> Checkpoint:
    """Weights large enough that both caps bend and the window counts."""
    random = np.random.default_rng(0)
    tensors = {
        name: random.normal(scale=0.3 if len(shape) == 1 else 2.5 * shape[-1] ** -0.5, size=shape).astype(np.float32)
        for name, shape in expected_tensors(SMALL).items()
    }
    return open_checkpoint(save_checkpoint(folder, SMALL, tensors.items(), dtype="bfloat16"))


# -- Second moments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_inputs", "max_block", "block"), [(64, 4608, 64), (150, 200, 192), (200, 128, 128)])
def test_factors_are_those_of_the_definition(num_inputs: int, max_block: int, block: int) -> None:
    random = np.random.default_rng(1)
    x = (random.normal(size=(500, num_inputs)) @ random.normal(size=(num_inputs, num_inputs))).astype(np.float32)
    moments = SecondMoments(num_inputs, max_block=max_block)
    for part in np.array_split(x, 7):
        moments.add(part)
    feedback = moments.feedback()
    assert feedback.factors.shape == (num_inputs, block) and feedback.samples.shape == (28, num_inputs)
    for first in range(0, num_inputs, block):
        inputs = x[:, first : first + block].astype(np.float64)
        size = inputs.shape[1]
        moment = inputs.T @ inputs
        moment = moment / (np.trace(moment) / size) + DAMPING * np.eye(size)
        upper = np.linalg.cholesky(np.linalg.inv(moment)).T
        diagonal = np.diag(upper)
        np.testing.assert_allclose(feedback.importance[first : first + size], 1 / diagonal**2, rtol=1e-4)
        expected = upper / diagonal[:, None]
        np.testing.assert_allclose(feedback.factors[first : first + size, :size], expected, atol=1e-4)


def test_inputs_that_are_always_zero_or_the_same_are_no_obstacle() -> None:
    moments = SecondMoments(64)
    x = np.ones((10, 64), np.float32)
    x[:, 5] = 0
    moments.add(x)
    feedback = moments.feedback()
    assert np.isfinite(feedback.factors).all() and (feedback.importance > 0).all()
    nothing = SecondMoments(64)
    nothing.add(np.zeros((10, 64), np.float32))
    assert np.isfinite(nothing.feedback().factors).all()
    broken = SecondMoments(64)
    broken.add(np.full((10, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="not finite"):
        broken.feedback()


# -- Runs -------------------------------------------------------------------------------------------------------------


def test_the_inputs_are_those_of_the_model(tmp_path: Path) -> None:
    """Against the PyTorch model, whose linear maps are listened to."""
    torch = pytest.importorskip("torch")
    from gemma2.model import load_model

    checkpoint = random_model(tmp_path)
    random = np.random.default_rng(2)
    sequences = [random.integers(0, SMALL.vocab_size, length).astype(np.int32) for length in (40, 1, 128)]
    model = load_model(checkpoint, dtype="float32")
    seen: dict[str, list[Floats]] = {}

    def listen(name: str) -> Any:
        return lambda _, args, out: seen.setdefault(name, []).append(args[0].numpy().reshape(-1, args[0].shape[-1]))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(listen(name))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor(ids[None].astype(np.int64)))
    run = CalibrationRun(checkpoint, sequences, num_threads=2)
    names = [name for name, shape in packed_shapes(SMALL).items() if len(shape) == 2 and name != EMBEDDING]
    for name in [*names, EMBEDDING]:
        source = "lm_head" if name == EMBEDDING else name.removesuffix(".weight")
        source = source.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")
        inputs = np.concatenate(seen[source]).astype(np.float64)
        moment = inputs.T @ inputs
        size = inputs.shape[1]
        moment = moment / (np.trace(moment) / size) + DAMPING * np.eye(size)
        # The factors say what the moments were: (U / diagonal) and the diagonal give H⁻¹, compared where it acts.
        feedback = run.feedback(name)
        upper = feedback.factors[:, :size] / np.sqrt(feedback.importance)[:, None]
        identity = np.triu(upper).astype(np.float64) @ moment @ np.triu(upper).astype(np.float64).T
        np.testing.assert_allclose(identity, np.eye(size), atol=0.08, err_msg=name)  # bfloat16 weights and inputs


def test_names_are_asked_for_in_order(tmp_path: Path) -> None:
    run = CalibrationRun(random_model(tmp_path), [np.arange(20, dtype=np.int32)], num_threads=1)
    run.feedback("model.layers.1.mlp.down_proj.weight")
    run.feedback(EMBEDDING)
    with pytest.raises(AssertionError):
        run.feedback("model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("lengths", [[], [5, 0], [129]])
def test_sequences_that_cannot_be_run(tmp_path: Path, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="sequences of 1 to 128 tokens"):
        CalibrationRun(random_model(tmp_path), [np.zeros(n, np.int32) for n in lengths], num_threads=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the products of infinities
def test_a_model_that_overflows_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = random_model(tmp_path / "sound")
    weights = dict(checkpoint.arrays())
    weights["model.layers.1.pre_feedforward_layernorm.weight"] = np.full(SMALL.hidden_size, 3e38, np.float32)
    broken = open_checkpoint(save_checkpoint(tmp_path / "broken", SMALL, weights.items(), dtype="bfloat16"))
    run = CalibrationRun(broken, [np.arange(1, 9, dtype=np.int32)], num_threads=1)
    with pytest.raises(
        CheckpointError, match=r"cannot be calibrated at model.layers.1.mlp.gate_up_proj.weight: .*finite"
    ):
        pack_model(broken, "q4", num_threads=1, calibration=run)


def test_a_calibrated_model_is_closer_to_the_exact_one() -> None:
    checkpoint, tokenizer = open_checkpoint(BUNDLED_FOLDER), Tokenizer.from_folder(BUNDLED_FOLDER)
    words = random_words(checkpoint.config, num_tokens=4096, bos_id=tokenizer.bos_id)
    (others,) = random_words(checkpoint.config, num_tokens=512, bos_id=tokenizer.bos_id, seed=1)

    def log_probabilities(weight_format: str, *, calibrated: bool = False) -> Floats:
        run = CalibrationRun(checkpoint, words, num_threads=2) if calibrated else None
        packed = pack_model(checkpoint, weight_format, num_threads=2, calibration=run)
        backend = CpuBackend(packed, num_threads=2, head_candidates=checkpoint.config.vocab_size)
        logits = LLM(backend, tokenizer).logits(others)
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    exact = log_probabilities("float32")

    def divergence(log_probabilities: Floats) -> float:
        return float(np.mean(np.sum(np.exp(exact) * (exact - log_probabilities), axis=1)))

    alone, together = log_probabilities("q4"), log_probabilities("q4", calibrated=True)
    assert divergence(together) < 0.7 * divergence(alone) < 0.01


def test_formats_that_are_exact_take_no_calibration(tmp_path: Path) -> None:
    checkpoint = random_model(tmp_path)
    run = CalibrationRun(checkpoint, [np.arange(20, dtype=np.int32)], num_threads=1)
    with pytest.raises(ValueError, match="for q8 and q4"):
        pack_model(checkpoint, "bfloat16", num_threads=1, calibration=run)
    packed = pack_model(checkpoint, "q8", num_threads=1, calibration=run)
    assert set(packed.tensors) == set(packed_shapes(SMALL))
    assert SECOND_PLANE not in packed.tensors


# -- Words and texts --------------------------------------------------------------------------------------------------


def test_random_words() -> None:
    sequences = random_words(SMALL, num_tokens=1000, bos_id=2)
    assert [len(ids) for ids in sequences] == [128] * 7
    assert all(ids[0] == 2 and ids.min() >= 2 and ids.max() < 320 for ids in sequences)
    words = np.concatenate([ids[1:] for ids in sequences])
    assert words.min() >= 80 and np.median(words) < 160  # the first ids are the frequent words
    np.testing.assert_array_equal(random_words(SMALL, num_tokens=1000, bos_id=2), sequences)


def test_texts_are_cut_into_sequences() -> None:
    texts = [[2, *range(10, 310)], [], [7, 8], [2, *range(100, 400)]]
    sequences = cut(texts, SMALL, num_tokens=200, bos_id=2)
    assert [len(ids) for ids in sequences] == [128, 3, 128]  # no text gives more than an eighth, or one sequence
    assert all(ids[0] == 2 and 2 not in ids[1:] for ids in sequences)
    assert sequences[1].tolist() == [2, 7, 8]
    assert sum(map(len, cut([[2, *range(10, 310)]], SMALL, num_tokens=200, bos_id=2))) in range(200, 204)  # no other
    with pytest.raises(DataError, match="hold no text"):
        cut([[2], []], SMALL, num_tokens=200, bos_id=2)


# -- The command ------------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "The ship came home. " * 300}) + "\n")
    options = ["--calibration-tokens", "1000", "--json"]
    for number, files in enumerate(([], [str(tmp_path / "text.jsonl")])):
        folder = str(tmp_path / str(number))
        assert main(["quantize", str(BUNDLED_FOLDER), folder, *options, "--calibrate", *files]) == 0
        captured = capsys.readouterr()
        values = json.loads(captured.out)
        assert values["calibrated"] is True and open_packed(folder).is_calibrated
        assert "far fewer" not in captured.err
        errors = {tensor["name"]: tensor["output_error"] for tensor in values["tensors"]}
        assert all(errors[name] < 0.05 for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))


def test_the_commands_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refusal(*arguments: str) -> str:
        assert main(["quantize", str(BUNDLED_FOLDER), str(tmp_path / "new"), *arguments]) == EXIT_FAILED
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty.txt").touch()
    (tmp_path / "keys.jsonl").write_text('{"nottext": "a"}\n')
    assert "--calibrate is for q8 and q4" in refusal("--format", "bfloat16", "--calibrate")
    assert "goes with --calibrate" in refusal("--calibration-tokens", "100")
    assert "holds no document" in refusal("--calibrate", str(tmp_path / "empty.txt"))
    assert "nowhere.txt" in refusal("--calibrate", str(tmp_path / "nowhere.txt"))
    missing = refusal("--calibrate", str(tmp_path / "keys.jsonl"))
    assert missing.endswith("no key 'text'; the keys are 'nottext'. The text must be under 'text'.")


def test_the_command_tells_of_little_text_and_what_it_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "little.txt").write_text("The ship came home. " * 20)
    arguments = [str(BUNDLED_FOLDER), str(tmp_path / "new"), "--calibrate", str(tmp_path / "little.txt")]
    assert main(["quantize", *arguments]) == 0
    captured = capsys.readouterr()
    assert re.search(r"hold \d+ tokens, far fewer than 16,384", captured.err)
    assert "new: q4, calibrated on files, the embedding in two planes; written in" in captured.out
    assert "inputs of the calibration; not to be compared" in captured.out
    assert main(["inspect", str(tmp_path / "new")]) == 0
    assert "CPU engine: q4, calibrated, the embedding in two planes" in capsys.readouterr().out


def test_progress_comes_to_all_the_work(tmp_path: Path) -> None:
    checkpoint = random_model(tmp_path)
    told: list[tuple[int, int]] = []
    run = CalibrationRun(
        checkpoint, [np.arange(20, dtype=np.int32)] * 3, num_threads=1, progress=lambda *work: told.append(work)
    )
    pack_model(checkpoint, "q4", num_threads=1, calibration=run)
    assert told == sorted(told) and told[-1] == (run.work, run.work)
    assert told[0][0] == 20
