from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from small_checkpoints import SMALL, Arrays, random_tensors, read_index, write_model

from gemma2.checkpoints import expected_tensors, open_checkpoint, save_checkpoint
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError, Gemma2Error

Q = "model.layers.1.self_attn.q_proj.weight"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(folder: Path, tensors: Arrays, **options: Any) -> str:
    """Saves what must be refused; checks that nothing is left behind, and returns the message."""
    before = names_in(folder) if folder.exists() else None
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, SMALL, tensors.items(), **options)
    assert (names_in(folder) if folder.exists() else None) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- What is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 12_000, 1])
def test_what_is_saved_is_read_again(tmp_path: Path, dtype: str, max_shard_bytes: int) -> None:
    tensors = random_tensors(dtype=dtype)
    folder = save_checkpoint(tmp_path / "a" / "b", SMALL, tensors.items(), max_shard_bytes=max_shard_bytes)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == SMALL
    for name, array in checkpoint.arrays():
        assert array.dtype == tensors[name].dtype
        assert array.tobytes() == tensors[name].tobytes()
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    assert not list(folder.glob(".*"))


def test_shards_are_filled_in_order_up_to_the_limit(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_checkpoint(tmp_path, SMALL, tensors.items(), max_shard_bytes=12_000)
    weight_map = read_index(tmp_path)
    files = [weight_map[name] for name in expected_tensors(SMALL)]
    assert files == sorted(files)
    count = len(set(files))
    assert count > 3
    assert set(files) == {f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)}
    sizes = {file: sum(tensors[name].nbytes for name, owner in weight_map.items() if owner == file) for file in files}
    # The embedding, 12480 bytes, is above the limit and has a file to itself.
    assert sizes.pop(weight_map["model.embed_tokens.weight"]) == 12_480
    filled = list(sizes.values())
    assert all(size <= 12_000 for size in filled)
    assert all(filled[index] + filled[index + 1] > 12_000 for index in range(len(filled) - 1))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())


def test_one_file_has_no_index(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, SMALL, random_tensors().items())
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]


def test_the_order_of_arrival_does_not_matter(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_checkpoint(tmp_path / "a", SMALL, tensors.items(), max_shard_bytes=12_000)
    save_checkpoint(tmp_path / "b", SMALL, reversed(list(tensors.items())), max_shard_bytes=12_000)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_values_are_converted(tmp_path: Path, given: str, stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.checkpoints.safetensors_writer._CHUNK_BYTES", 100)  # so that rows go in pieces
    tensors = random_tensors(dtype=given)
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, SMALL, tensors.items(), dtype=stored))
    kind = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    for name, array in checkpoint.arrays():
        assert array.dtype == kind
        assert array.tobytes() == tensors[name].astype(kind).tobytes()


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    tensors = random_tensors()
    # 1 + 1/256 lies half-way between the neighbours 1 and 1 + 1/128: to the even one. 1 + 3/256: up to the even one.
    tensors["model.norm.weight"][:3] = [1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 255]
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, SMALL, tensors.items(), dtype="bfloat16"))
    assert checkpoint.tensors["model.norm.weight"].numpy()[:3].tolist() == [1.0, 1 + 2 / 128, 1 + 1 / 128]


def test_arrays_need_not_be_contiguous(tmp_path: Path) -> None:
    tensors = random_tensors()
    turned = {name: np.asfortranarray(array) for name, array in tensors.items()}
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, SMALL, turned.items()))
    assert np.array_equal(checkpoint.tensors[Q].numpy(), tensors[Q])


def test_a_checkpoint_is_copied_with_its_tokenizer(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a", random_tensors())
    (source / "tokenizer.json").write_text('{"a": 1}')
    checkpoint = open_checkpoint(source)
    save_checkpoint(
        tmp_path / "b",
        checkpoint.config,
        checkpoint.arrays(),
        dtype="bfloat16",
        tokenizer_files=checkpoint.tokenizer_files,
        extra_files={"generation_config.json": "{}", "NOTICE": b"\xff"},
    )
    assert names_in(tmp_path / "b") == [
        "NOTICE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (tmp_path / "b" / "tokenizer.json").read_text() == '{"a": 1}'


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    config = SMALL.replace(hidden_size=128, intermediate_size=1024, num_hidden_layers=12, vocab_size=1000)
    shapes = expected_tensors(config)

    def tensors() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name, shape in shapes.items():
            yield name, np.zeros(shape, np.float32)

    tracemalloc.start()
    save_checkpoint(tmp_path, config, tensors())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = open_checkpoint(tmp_path).num_bytes
    assert total > 19_000_000
    assert peak < 2_000_000  # the largest tensor has 0.5 MB


def test_a_large_tensor_is_converted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.checkpoints.safetensors_writer._CHUNK_BYTES", 100_000)
    config = SMALL.replace(vocab_size=50_000)
    tensors = random_tensors(config)
    assert tensors["model.embed_tokens.weight"].nbytes == 4_800_000
    tracemalloc.start()
    save_checkpoint(tmp_path, config, tensors.items(), dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# -- transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_model() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL.to_dict()))
    for parameter in model.parameters():  # norms begin as zeros, which would hide a mix-up
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 12_000])
def test_transformers_reads_what_we_write(tmp_path: Path, their_model: Any, dtype: Any, max_shard_bytes: int) -> None:
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    tensors = random_tensors(dtype=dtype)
    save_checkpoint(tmp_path, SMALL, tensors.items(), max_shard_bytes=max_shard_bytes)
    model, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == "Gemma2ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert state.pop("lm_head.weight").data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert set(state) == set(tensors)
    for name, value in state.items():
        assert value.dtype == getattr(torch, dtype)
        assert value.to(torch.float32).numpy().tobytes() == tensors[name].astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "12KB"])
def test_we_read_what_transformers_writes(tmp_path: Path, their_model: Any, dtype: str, max_shard_size: str) -> None:
    import torch

    model = their_model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path)
    assert (len(checkpoint.files) > 1) == (max_shard_size == "12KB")
    assert checkpoint.config == SMALL
    for name, array in checkpoint.arrays():
        assert array.astype(np.float32).tobytes() == model.state_dict()[name].to(torch.float32).numpy().tobytes()


# -- What is refused --------------------------------------------------------------------------------------------


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    good = random_tensors()
    missing = {name: array for name, array in good.items() if ".layers.2." not in name}
    assert "11 of 35 tensors did not come: model.layers.2.input_layernorm.weight" in refusal(folder, missing)
    assert "35 of 35 tensors did not come" in refusal(folder, {})
    assert f"no tensor '{Q}x'. Did you mean '{Q}'?" in refusal(folder, {**good, Q + "x": good[Q]})
    head = {**good, "lm_head.weight": good["model.embed_tokens.weight"]}
    assert "The head is the embedding and is not stored; leave it out" in refusal(folder, head)
    assert "must have the shape (40, 24), but it has (24, 40)" in refusal(folder, {**good, Q: good[Q].T})
    assert "must be a numpy array, but is a list" in refusal(folder, {**good, Q: good[Q].tolist()})


def test_a_tensor_that_comes_twice_is_refused(tmp_path: Path) -> None:
    pairs = list(random_tensors().items())
    with pytest.raises(CheckpointError, match=f"{Q} came twice"):
        save_checkpoint(tmp_path / "new", SMALL, [*pairs, (Q, dict(pairs)[Q])])
    assert not (tmp_path / "new").exists()


def test_wrong_dtypes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    good = random_tensors()
    assert "is float16, but float32 and bfloat16 are what can be stored" in refusal(
        folder, random_tensors(dtype="float16")
    )
    assert "is int8" in refusal(folder, {name: array.astype(np.int8) for name, array in good.items()}, dtype="float32")
    mixed = {**good, Q: good[Q].astype(ml_dtypes.bfloat16)}
    assert f"{Q} is bfloat16, but the tensors before it are float32; say with dtype=" in refusal(folder, mixed)
    assert "dtype must be float32 or bfloat16, but is 'float16'. Say dtype='float32'" in refusal(
        folder, good, dtype="float16"
    )
    assert "Did you mean 'bfloat16'?" in refusal(folder, good, dtype="bfloat")
    assert "max_shard_bytes must be at least 1" in refusal(folder, good, max_shard_bytes=0)


def test_further_files_are_checked(tmp_path: Path) -> None:
    folder, good = tmp_path / "new", random_tensors()
    assert "gone.json: no such file" in refusal(folder, good, tokenizer_files=[tmp_path / "gone.json"])
    assert "must be a plain file name" in refusal(folder, good, extra_files={"../x": ""})
    assert "config.json is written by itself" in refusal(folder, good, extra_files={"config.json": ""})
    assert "written by itself" in refusal(folder, good, extra_files={"other.safetensors": ""})
    (tmp_path / "a.txt").touch()
    assert "a.txt is given twice" in refusal(
        folder, good, tokenizer_files=[tmp_path / "a.txt"], extra_files={"a.txt": ""}
    )


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is not empty (it has notes.txt)" in refusal(tmp_path, random_tensors())
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a file, but a model is written to a folder"):
        save_checkpoint(tmp_path / "notes.txt", SMALL, random_tensors().items(), overwrite=True)


def test_overwriting_replaces_the_model_and_keeps_the_rest(tmp_path: Path) -> None:
    tensors = random_tensors(seed=1)
    save_checkpoint(tmp_path, SMALL, random_tensors().items(), max_shard_bytes=12_000)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokenizer.json").write_text("old")
    new = tmp_path.parent / "tokenizer.json"
    new.write_text("new")
    save_checkpoint(tmp_path, SMALL, tensors.items(), overwrite=True, tokenizer_files=[new])
    assert names_in(tmp_path) == ["config.json", "model.safetensors", "notes.txt", "tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "new"
    assert np.array_equal(open_checkpoint(tmp_path).tensors[Q].numpy(), tensors[Q])


def test_a_model_may_be_overwritten_from_itself(tmp_path: Path) -> None:
    tensors = random_tensors()
    checkpoint = open_checkpoint(write_model(tmp_path, tensors))
    save_checkpoint(tmp_path, SMALL, checkpoint.arrays(), dtype="bfloat16", overwrite=True)
    again = open_checkpoint(tmp_path)
    assert again.tensors[Q].numpy().tobytes() == tensors[Q].astype(ml_dtypes.bfloat16).tobytes()


def test_a_refused_overwrite_leaves_the_old_model(tmp_path: Path) -> None:
    old = random_tensors()
    write_model(tmp_path, old)
    refusal(tmp_path, {**random_tensors(seed=1), Q: np.zeros((1, 1), np.float32)}, overwrite=True)
    assert np.array_equal(open_checkpoint(tmp_path).tensors[Q].numpy(), old[Q])


# -- When it breaks off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("source failed"), KeyboardInterrupt(), OSError(5, "source disk")])
def test_errors_of_the_source_pass_through_and_leave_nothing(tmp_path: Path, error: BaseException) -> None:
    def tensors() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for index, pair in enumerate(random_tensors().items()):
            if index == 20:
                raise error
            yield pair

    with pytest.raises(type(error)) as caught:
        save_checkpoint(tmp_path / "new", SMALL, tensors())
    assert caught.value is error
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    class Full(np.ndarray[Any, Any]):
        """Fails like a full disk when it is about to be written."""

        def __getitem__(self, key: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

    tensors = random_tensors()
    tensors[Q] = tensors[Q].view(Full)
    assert "not written, as the disk is full; make room" in refusal(tmp_path / "new", tensors)


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 50_000})())
    message = refusal(tmp_path / "new", random_tensors())
    assert "the disk is full: 82.8 kB are needed, 50.0 kB are free" in message


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "new", SMALL, random_tensors().items())


KILLED = """
    import os, signal, sys
    sys.path[:0] = {paths!r}
    from small_checkpoints import SMALL, random_tensors
    from gemma2.checkpoints import safetensors_writer as writer
    point, overwrite = sys.argv[2], sys.argv[3] == "True"
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if point == "publishing":
        moves = []
        original = writer.Path.replace
        def replace(self, target):
            moves.append(target)
            if len(moves) == 3:
                die()
            return original(self, target)
        writer.Path.replace = replace
    def tensors():
        for index, pair in enumerate(random_tensors(seed=1).items()):
            if point == "writing" and index == 20:
                die()
            yield pair
    writer.save_checkpoint(sys.argv[1], SMALL, tensors(), max_shard_bytes=12_000, overwrite=overwrite)
"""


@pytest.mark.parametrize("point", ["writing", "publishing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_write_never_looks_whole(tmp_path: Path, point: str, overwrite: bool) -> None:
    folder = tmp_path / "model"
    old = random_tensors(seed=0)
    if overwrite:
        write_model(folder, old)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]
    code = textwrap.dedent(KILLED).format(paths=paths)
    done = subprocess.run([sys.executable, "-c", code, str(folder), point, str(overwrite)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert any(name.endswith(".partial") for name in os.listdir(folder))
    if overwrite and point == "writing":
        assert np.array_equal(open_checkpoint(folder).tensors[Q].numpy(), old[Q])
    else:
        with pytest.raises(Gemma2Error):
            open_checkpoint(folder)
        assert not (folder / "config.json").exists()
    # The next write clears up what the killed one left.
    new = random_tensors(seed=1)
    save_checkpoint(folder, SMALL, new.items(), overwrite=overwrite or point == "publishing")
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert np.array_equal(open_checkpoint(folder).tensors[Q].numpy(), new[Q])


def test_the_config_is_that_which_was_given(tmp_path: Path) -> None:
    config = SMALL.replace(attn_logit_softcapping=None, layer_types=("full_attention",) * 3, sliding_window=5)
    save_checkpoint(tmp_path, config, random_tensors(config).items())
    assert Gemma2Config.from_json_file(tmp_path) == config
