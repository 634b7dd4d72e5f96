from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from small_checkpoints import (
    SMALL,
    random_tensors,
    read_index,
    safetensors_bytes,
    with_header,
    write_index,
    write_model,
    write_sharded_model,
)

from gemma2.checkpoints import expected_tensors, open_checkpoint
from gemma2.config import PRESETS
from gemma2.errors import CheckpointError, ConfigError, Gemma2Error

Q = "model.layers.1.self_attn.q_proj.weight"
FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"


def refusal(folder: Path, kind: type[Gemma2Error] = CheckpointError) -> str:
    """Opens a folder that must be refused, and returns the message."""
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded_model(tmp_path / "model", random_tensors())


# -- Sound folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [write_model, write_sharded_model])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_come_back(tmp_path: Path, writer, dtype: str) -> None:  # type: ignore[no-untyped-def]
    tensors = random_tensors(dtype=dtype)
    checkpoint = open_checkpoint(writer(tmp_path / "model", tensors))
    assert checkpoint.config == SMALL
    assert list(checkpoint.tensors) == list(expected_tensors(SMALL))
    for name, array in checkpoint.arrays():
        tensor = checkpoint.tensors[name]
        assert tensor.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        assert (tensor.name, tensor.shape) == (name, tensors[name].shape)
        assert array.dtype == tensors[name].dtype
        assert array.tobytes() == tensors[name].tobytes()
    assert checkpoint.num_bytes == sum(array.nbytes for array in tensors.values())
    assert {file.name for file in checkpoint.files} == {path.name for path in checkpoint.folder.glob("*.safetensors")}


def test_bfloat16_is_bfloat16(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, random_tensors(dtype="bfloat16")))
    assert checkpoint.tensors[Q].numpy().dtype == ml_dtypes.bfloat16


def test_arrays_are_views_of_the_file_and_cannot_be_written(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_tensors())
    tensor = open_checkpoint(folder).tensors[Q]
    array = tensor.numpy()
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    # Written through the file, the change shows in the array: it is the file.
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(tensor._start)
        stream.write(np.float32(77).tobytes())
    assert array[0, 0] == 77
    assert tensor.numpy()[0, 0] == 77


def test_an_odd_address_gives_an_aligned_copy(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_model(tmp_path, tensors)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors, pad=3))
    array = open_checkpoint(tmp_path).tensors[Q].numpy()
    assert array.flags.aligned
    assert not array.flags.writeable
    assert array.tobytes() == tensors[Q].tobytes()


def test_an_array_outlives_the_checkpoint_and_the_folder(tmp_path: Path) -> None:
    tensors = random_tensors()
    array = open_checkpoint(write_model(tmp_path / "model", tensors)).tensors[Q].numpy()
    shutil.rmtree(tmp_path / "model")
    assert array.tobytes() == tensors[Q].tobytes()


def test_bytes_may_be_read_into_a_buffer(tmp_path: Path) -> None:
    tensors = random_tensors(dtype="bfloat16")
    tensor = open_checkpoint(write_model(tmp_path, tensors)).tensors[Q]
    stored = tensors[Q].tobytes()
    assert tensor.raw_bytes().tobytes() == stored
    for first_byte, size in [(0, len(stored)), (7, 100), (len(stored) - 1, 1), (len(stored), 0)]:
        buffer = np.full(size, 99, np.uint8)
        tensor.read_into(buffer, first_byte=first_byte)
        assert buffer.tobytes() == stored[first_byte : first_byte + size]
    for first_byte, size in [(1, len(stored)), (-1, 1)]:
        with pytest.raises(ValueError, match="cannot read"):
            tensor.read_into(np.empty(size, np.uint8), first_byte=first_byte)
    with tensor.file.open("r+b") as stream:
        stream.truncate(tensor._start + 10)
    with pytest.raises(CheckpointError, match="is truncated: it ends inside"):
        tensor.read_into(np.empty(20, np.uint8))


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    tensors = random_tensors(dtype="bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    checkpoint = open_checkpoint(write_model(tmp_path, tensors))
    assert checkpoint.tensors["model.norm.weight"].dtype == "F32"
    assert checkpoint.tensors[Q].dtype == "BF16"


def test_an_index_may_name_the_single_file_or_a_folder_below(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "one", random_tensors())
    write_index(folder, dict.fromkeys(expected_tensors(SMALL), "model.safetensors"))
    open_checkpoint(folder)
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts" / "all.safetensors")
    write_index(folder, dict.fromkeys(expected_tensors(SMALL), "parts/all.safetensors"))
    open_checkpoint(folder)


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path: Path, sharded: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_checkpoint(snapshot).folder == snapshot


def test_tokenizer_files_are_listed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_tensors())
    for name in ("tokenizer.model", "tokenizer.json", "notes.txt"):
        (folder / name).write_text("{}")
    assert [path.name for path in open_checkpoint(folder).tokenizer_files] == ["tokenizer.json", "tokenizer.model"]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", random_tensors())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/model").folder == tmp_path / "model"


def test_opening_the_2b_reads_headers_only(tmp_path: Path) -> None:
    config = PRESETS["2b"]
    header, position = {}, 0
    for name, (rows, *columns) in expected_tensors(config).items():
        size = 2 * rows * (columns[0] if columns else 1)
        header[name] = {"dtype": "BF16", "shape": [rows, *columns], "data_offsets": [position, position + size]}
        position += size
    config.to_json_file(tmp_path / "config.json")
    file = tmp_path / "model.safetensors"
    file.write_bytes(with_header(header, b""))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + position)  # 5.2 GB that take no room: the file is sparse
    started = time.perf_counter()
    checkpoint = open_checkpoint(tmp_path)
    seconds = time.perf_counter() - started
    assert checkpoint.num_bytes == 5_228_683_776
    assert checkpoint.tensors["model.norm.weight"].numpy().sum() == 0
    assert seconds < 0.2


# -- The tied head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [write_model, write_sharded_model])
def test_an_equal_head_is_accepted_and_left_out(tmp_path: Path, writer) -> None:  # type: ignore[no-untyped-def]
    tensors = random_tensors(dtype="bfloat16")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    checkpoint = open_checkpoint(writer(tmp_path / "model", tensors))
    assert "lm_head.weight" not in checkpoint.tensors


def test_a_head_that_differs_in_its_last_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma2.checkpoints.safetensors_reader._COMPARE_BYTES", 1000)
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    open_checkpoint(write_model(tmp_path, tensors))
    tensors["lm_head.weight"][-1, -1] += 1
    message = refusal(write_model(tmp_path, tensors))
    assert f"{tmp_path / 'model.safetensors'}: lm_head.weight differs from model.embed_tokens.weight" in message


def test_a_head_of_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding[:-1], embedding.astype(ml_dtypes.bfloat16)):
        tensors["lm_head.weight"] = head
        assert "lm_head.weight differs" in refusal(write_model(tmp_path, tensors))
    # The same bytes, but other numbers.
    tensors = random_tensors(dtype="bfloat16")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].view(np.float16)
    assert "lm_head.weight differs" in refusal(write_model(tmp_path, tensors))


# -- Tensors that do not fit ------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[Q]
    message = refusal(write_model(tmp_path, tensors))
    assert f"{tmp_path}: lacks 1 tensor of the 35 of this Gemma 2: {Q}" in message


def test_many_missing_tensors_are_one_line(tmp_path: Path) -> None:
    tensors = {name: array for name, array in random_tensors().items() if ".layers.2." not in name}
    message = refusal(write_model(tmp_path, tensors))
    assert "lacks 11 tensors of the 35" in message
    assert "model.layers.2.input_layernorm.weight" in message
    assert "and 8 more" in message


def test_an_extra_tensor_is_named_with_its_file(sharded: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(10, np.float32)
    message = refusal(write_sharded_model(sharded, tensors))
    assert "safetensors: holds 1 tensor that this Gemma 2 does not have: model.layers.0.self_attn.q_norm" in message


def test_a_misspelt_name_is_matched_to_the_missing_one(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[Q.replace("q_proj", "query_proj")] = tensors.pop(Q)
    message = refusal(write_model(tmp_path, tensors))
    assert "lacks 1 tensor" in message
    assert "holds 1 tensor" in message
    assert f"Did you mean '{Q}'?" in message


def test_names_without_model_in_front_are_explained(tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): array for name, array in random_tensors().items()}
    assert "save the Gemma2ForCausalLM" in refusal(write_model(tmp_path, tensors))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[Q] = tensors[Q].T.copy()
    message = refusal(write_model(tmp_path, tensors))
    assert f"model.safetensors: {Q} has the shape (24, 40), but" in message
    assert "config.json asks for (40, 24)" in message


def test_a_config_of_another_size_gives_one_error(tmp_path: Path) -> None:
    write_model(tmp_path, random_tensors())
    SMALL.replace(hidden_size=32).to_json_file(tmp_path / "config.json")
    assert "(34 other tensors differ too)" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "int8", "int64"])
def test_a_wrong_dtype_is_named(tmp_path: Path, dtype: str) -> None:
    tensors = random_tensors()
    tensors[Q] = tensors[Q].astype(dtype)
    message = refusal(write_model(tmp_path, tensors))
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: {Q} is stored as ")


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_tensors())
    values = {**SMALL.to_dict(), "quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(values))
    assert "quantized (gptq)" in refusal(folder)


# -- Damaged folders --------------------------------------------------------------------------------------------


def test_a_truncated_file_is_named(sharded: Path) -> None:
    file = sharded / SECOND
    file.write_bytes(file.read_bytes()[:-5])
    assert refusal(sharded).startswith(f"{file}: is truncated: ")


def test_an_empty_file_is_named(sharded: Path) -> None:
    (sharded / SECOND).write_bytes(b"")
    assert refusal(sharded).startswith(f"{sharded / SECOND}: is truncated: ")


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert f"index.json: names 1 of 3 files that are not there: {SECOND}" in refusal(sharded)


def test_a_shard_that_is_a_folder_or_a_dead_link(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).mkdir()
    assert f"{SECOND}: must be a safetensors file, but is a folder" in refusal(sharded)
    (sharded / SECOND).rmdir()
    (sharded / SECOND).symlink_to(sharded / "blob")
    assert f"not there: {SECOND}" in refusal(sharded)


def test_a_tensor_that_the_shard_does_not_hold(sharded: Path) -> None:
    write_index(sharded, {**read_index(sharded), "model.layers.9.extra": SECOND})
    assert f"{SECOND}: lacks 1 tensor that model.safetensors.index.json says it holds" in refusal(sharded)


def test_a_tensor_that_the_index_assigns_elsewhere(sharded: Path) -> None:
    weight_map = read_index(sharded)
    name = next(name for name, file in weight_map.items() if file == FIRST)
    tensors = {key: array for key, array in random_tensors().items() if weight_map[key] == SECOND or key == name}
    (sharded / SECOND).write_bytes(safetensors_bytes(tensors))
    message = refusal(sharded)
    assert f"{SECOND}: holds {name}, which model.safetensors.index.json assigns to {FIRST}; both hold it" in message


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    weight_map = read_index(sharded)
    file = weight_map.pop(Q)
    write_index(sharded, weight_map)
    assert f"{file}: holds {Q}, which model.safetensors.index.json does not list" in refusal(sharded)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[]", "is not valid JSON: an object was expected"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' comes twice"),
        (b'{"metadata": {}}', "must have a weight_map from tensor names to file names, but has 'metadata'"),
        (b"{}", "but has nothing"),
        (b'{"weight_map": {}}', "must have a weight_map"),
        (b'{"weight_map": ["a"]}', "must have a weight_map"),
        (b'{"weight_map": {"a": 3}}', "the file of a must be a file name, but is 3"),
        (b'{"weight_map": {"a": ""}}', "the file of a must be a file name"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors', but files must lie in the folder"),
        (b'{"weight_map": {"a": "b/../../x.safetensors"}}', "must lie in the folder"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "must lie in the folder"),
        (b'{"weight_map": {"a": "..\\\\x"}}', "must lie in the folder"),
        (b'{"weight_map": {"a": "C:x"}}', "must lie in the folder"),
        (b'{"weight_map": {"a": "\\u0000"}}', "must lie in the folder"),
    ],
)
def test_an_index_that_is_none(sharded: Path, contents: bytes, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(contents)
    told = refusal(sharded)
    assert told.startswith(f"{sharded / 'model.safetensors.index.json'}: ")
    assert message in told


def test_a_file_name_beyond_all_bounds(sharded: Path) -> None:
    write_index(sharded, {"a": "x" * 300})
    refusal(sharded)


def test_a_single_file_beside_shards_is_ambiguous(sharded: Path) -> None:
    write_model(sharded, random_tensors(seed=1))
    assert "holds both model.safetensors and model.safetensors.index.json" in refusal(sharded)


# -- Folders that are no model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "nor packed weights (*.gemma2.safetensors); it is empty"),
        (["notes.txt", "config.json"], "it has config.json, notes.txt"),
        (["gemma-2-2b-it-Q4_K_M.gguf"], "holds GGUF weights (gemma-2-2b-it-Q4_K_M.gguf), which are not read yet"),
        (["config.json", "pytorch_model.bin"], "PyTorch pickles (pytorch_model.bin)"),
        (["model.ckpt", "tokenizer.model"], "PyTorch pickles (model.ckpt)"),
        (["config.json", FIRST, SECOND], "but not model.safetensors.index.json"),
        (["config.json", "gemma.safetensors"], "must be called model.safetensors"),
        (["model.weights.h5", "config.json"], "format that is not read (model.weights.h5)"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter"),
        (["config.json", "adapter_model.safetensors"], "holds an adapter"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    told = refusal(tmp_path)
    assert told.startswith(f"{tmp_path}: ")
    assert message in told


def test_an_adapter_says_for_which_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma-2-2b"}')
    assert "for 'google/gemma-2-2b', not a whole model" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    assert "holds an adapter" in refusal(tmp_path)


def test_a_folder_around_the_model_says_where_it_is(tmp_path: Path) -> None:
    inner = write_model(tmp_path / "models--google--gemma-2-2b" / "snapshots" / "abc", random_tensors())
    assert f"but {inner} looks like one" in refusal(inner.parent.parent)
    assert f"but {inner} looks like one" in refusal(inner.parent)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'gone'}: no such folder" in refusal(tmp_path / "gone")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "is a file, but a model is a folder; GGUF is not read yet" in refusal(tmp_path / "a.gguf")
    file = write_model(tmp_path, random_tensors()) / "model.safetensors"
    assert "give the folder that it lies in" in refusal(file)


def test_a_config_that_is_missing_or_of_another_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_tensors())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type must be 'gemma2', but is 'llama'" in refusal(folder, ConfigError)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder, ConfigError)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, random_tensors())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr("gemma2.checkpoints.safetensors_reader.mmap.mmap", refuse)
    assert refusal(folder) == f"{folder / 'model.safetensors'}: cannot be read: Permission denied"
