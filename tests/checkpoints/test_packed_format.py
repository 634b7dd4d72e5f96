"""Packed folders: what is written comes back, any damage is one clear error, and a stopped write leaves nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from small_checkpoints import SMALL, random_tensors, write_model, write_sharded_model

from gemma2 import _kernels as kernels
from gemma2.checkpoints import (
    is_packed,
    open_checkpoint,
    open_packed,
    packed_format,
    packing,
    resolve_model,
    save_packed,
)
from gemma2.checkpoints.packing import pack_model, packed_pieces
from gemma2.config import Gemma2Config
from gemma2.errors import CheckpointError
from gemma2.quantization import PACKED_FORMATS, SECOND_PLANE, PackedModel, packed_shapes
from gemma2.quantization.packing import packed_parts

EMBEDDING = "model.embed_tokens.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def source(folder: Path, *, dtype: str = "bfloat16", config: Gemma2Config = SMALL) -> Path:
    write_model(folder, random_tensors(config, dtype=dtype), config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 107]}')
    return folder


def packed_file(folder: Path) -> Path:
    (file,) = folder.glob("*.gemma2.safetensors")
    return file


def unpacked(model: PackedModel) -> dict[str, np.ndarray[Any, Any]]:
    """The weights that a packed model stands for; both planes of the embedding added."""
    weights = {}
    for name, shape in packed_shapes(model.config).items():
        array = model.tensors[name]
        if len(shape) == 2:
            runtime = kernels.Runtime(1)
            array = kernels.unpack_matrix(runtime, kernels.Matrix(model.format, *shape, array))
            if name == EMBEDDING and SECOND_PLANE in model.tensors:
                plane = kernels.Matrix(model.format, *shape, model.tensors[SECOND_PLANE])
                array = array + kernels.unpack_matrix(runtime, plane)
        weights[name] = array
    return weights


@pytest.mark.parametrize("weight_format", PACKED_FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_come_back_by_the_way_of_a_file(tmp_path: Path, weight_format: str, dtype: str) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "source", dtype=dtype))
    save_packed(tmp_path / "packed", checkpoint, weight_format, num_threads=2)
    model = open_packed(tmp_path / "packed").load(num_threads=2)
    assert (model.config, model.format) == (SMALL, weight_format)
    tolerance = {"float32": 0, "bfloat16": 2**-8, "q8": 0.03, "q4": 0.5}[weight_format]
    stored = {name: tensor.numpy().astype(np.float32) for name, tensor in checkpoint.tensors.items()}
    for name, array in unpacked(model).items():
        exact = np.concatenate([stored[part] for part in packed_parts(SMALL)[name]])
        np.testing.assert_allclose(array, exact, rtol=tolerance if weight_format == "bfloat16" else 0, atol=tolerance)
        if array.ndim == 1:  # norms are kept as they are
            np.testing.assert_array_equal(array, exact)
    for name, tensor in model.tensors.items():
        assert tensor.ctypes.data % 64 == 0, name
        assert not tensor.flags.writeable
    in_memory = pack_model(checkpoint, weight_format, num_threads=1)
    assert list(in_memory.tensors) == list(model.tensors)
    for name, tensor in in_memory.tensors.items():
        np.testing.assert_array_equal(tensor, model.tensors[name])
        assert tensor.ctypes.data % 64 == 0


def test_fused_matrices_hold_the_rows_of_their_parts_in_order() -> None:
    parts = packed_parts(SMALL)
    assert list(parts) == list(packed_shapes(SMALL))
    layer = "model.layers.2."
    assert parts[layer + "self_attn.qkv_proj.weight"] == tuple(f"{layer}self_attn.{x}_proj.weight" for x in "qkv")
    assert parts[layer + "mlp.gate_up_proj.weight"] == tuple(f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up"))
    assert parts["model.norm.weight"] == ("model.norm.weight",)


def test_the_second_plane_makes_the_embedding_as_exact_as_q8(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "source"))
    errors = {
        kind: save_packed(tmp_path / kind, checkpoint, kind, num_threads=1, second_plane=None) for kind in ("q4", "q8")
    }
    assert errors["q4"][EMBEDDING].relative > 0.05
    assert errors["q4"][SECOND_PLANE].relative < 1.3 * errors["q8"][EMBEDDING].relative < 0.01
    without = save_packed(tmp_path / "without", checkpoint, "q4", num_threads=1, second_plane=False)
    assert SECOND_PLANE not in without
    assert open_packed(tmp_path / "q4").has_second_plane
    assert not open_packed(tmp_path / "without").has_second_plane
    assert SECOND_PLANE not in open_packed(tmp_path / "without").load(num_threads=1).tensors
    with pytest.raises(ValueError, match="only q4 has a second plane"):
        save_packed(tmp_path / "q8", checkpoint, "q8", num_threads=1, second_plane=True)


def test_ranges_of_rows_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL.replace(vocab_size=300)
    write_sharded_model(tmp_path, random_tensors(config, dtype="bfloat16"), config)
    checkpoint = open_checkpoint(tmp_path)
    whole = pack_model(checkpoint, "q4", num_threads=1)
    monkeypatch.setattr(packing, "_RANGE_BYTES", 32 * 24 * 2 + 1)  # one tile of the embedding
    assert sum(piece.name == EMBEDDING for piece in packed_pieces(checkpoint, "q4", num_threads=1)) == 10
    told: list[tuple[int, int]] = []
    cut = pack_model(checkpoint, "q4", num_threads=3, progress=lambda done, total: told.append((done, total)))
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(tensor, cut.tensors[name])
    assert told[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)
    assert told == sorted(told) and len(told) > 30


def test_tensors_of_mixed_dtypes_are_fused(tmp_path: Path) -> None:
    tensors = random_tensors()
    mixed = {
        name: array.astype(ml_dtypes.bfloat16)
        if "k_proj" in name
        else array.astype(np.float16)
        if "v_proj" in name
        else array
        for name, array in tensors.items()
    }
    checkpoint = open_checkpoint(write_model(tmp_path, mixed))
    model = pack_model(checkpoint, "float32", num_threads=1)
    parts = [mixed[QKV.replace("qkv_proj", f"{x}_proj")].astype(np.float32) for x in "qkv"]
    np.testing.assert_array_equal(unpacked(model)[QKV], np.concatenate(parts))


def test_the_folder_has_what_running_needs(tmp_path: Path) -> None:
    folder = source(tmp_path / "source")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "eos_token_id": 107}))
    (folder / "notes.txt").write_text("mine")
    save_packed(tmp_path / "packed", open_checkpoint(folder), "q8", num_threads=1)
    names = sorted(os.listdir(tmp_path / "packed"))
    assert names == ["config.json", "generation_config.json", "model-q8.gemma2.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "packed/config.json").read_text())["eos_token_id"] == 107
    assert is_packed(tmp_path / "packed") and not is_packed(folder) and not is_packed(tmp_path / "missing")
    assert resolve_model(tmp_path / "packed") == tmp_path / "packed"
    with pytest.raises(CheckpointError, match=r"holds weights packed for the CPU engine .model-q8.*use the model that"):
        open_checkpoint(tmp_path / "packed")


def test_the_file_is_safetensors_and_every_tensor_is_aligned(tmp_path: Path) -> None:
    save_packed(tmp_path / "packed", open_checkpoint(source(tmp_path / "source")), "q4", num_threads=1)
    file = packed_file(tmp_path / "packed")
    with safe_open(file, "np") as opened:
        assert opened.metadata()["weight_format"] == "q4"
        assert opened.get_tensor("model.norm.weight").dtype == np.float32
        assert opened.get_tensor(EMBEDDING).dtype == np.uint8
    assert all(entry.start % 64 == 0 for entry in open_packed(tmp_path / "packed").entries.values())


# -- Damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    config = SMALL.replace(num_hidden_layers=1, vocab_size=40)
    checkpoint = open_checkpoint(source(folder / "source", config=config))
    save_packed(folder / "packed", checkpoint, "q4", num_threads=1)
    return folder / "packed"


def load(folder: Path) -> PackedModel:
    return open_packed(folder).load(num_threads=2)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    return str(raised.value)


def test_a_byte_that_changed_anywhere_is_noticed(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    file = packed_file(folder)
    data = bytearray(file.read_bytes())
    random = np.random.default_rng(0)
    header_end = 8 + int.from_bytes(data[:8], "little")
    text_end = data.rindex(b"}", 0, header_end) + 1
    places = [*range(9), text_end - 1, text_end, header_end - 1, header_end, len(data) - 1]
    places += random.integers(8, text_end, 150).tolist() + random.integers(header_end, len(data), 60).tolist()
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        file.write_bytes(flipped)
        message = refusal(folder)
        assert file.name in message, place
    file.write_bytes(data)
    load(folder)


def test_a_space_of_the_header_that_became_another_is_noticed(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    file = packed_file(folder)
    data = bytearray(file.read_bytes())
    data[7 + int.from_bytes(data[:8], "little")] = ord("\n")  # JSON reads the same
    file.write_bytes(data)
    assert "its header is not the one that was written" in refusal(folder)


def test_a_cut_file_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    file = packed_file(folder)
    data = file.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    for size in (0, 1, 7, 8, 100, header_end - 1, header_end, header_end + 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        assert "truncated" in refusal(folder) or size == 8
    file.write_bytes(data + b"\0")
    assert "belong to no tensor" in refusal(folder)


def rewritten(whole: Path, folder: Path, change: Callable[[dict[str, Any]], None], alignment: int = 4096) -> Path:
    """A copy whose header was changed, with a checksum that fits."""
    shutil.copytree(whole, folder)
    file = packed_file(folder)
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    header["__metadata__"]["header_checksum"] = "0" * 16
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    blank = len(text).to_bytes(8, "little") + text
    checksum = packed_format._header_checksum(blank)
    file.write_bytes(
        blank.replace(b'"header_checksum":"' + b"0" * 16, f'"header_checksum":"{checksum}'.encode()) + data[end:]
    )
    return folder


def test_files_of_other_versions_are_refused(whole: Path, tmp_path: Path) -> None:
    def metadata(**values: str) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["__metadata__"].update(values)

    load(rewritten(whole, tmp_path / "same", metadata()))
    newer = refusal(rewritten(whole, tmp_path / "newer", metadata(format_version="2")))
    assert "is of version 2 of the packed format, but this gemma2 reads version 1; update gemma2, or make it" in newer
    codebook = refusal(rewritten(whole, tmp_path / "codebook", metadata(codebook="-8 -7")))
    assert "in another layout or with another codebook" in codebook
    assert "another layout" in refusal(rewritten(whole, tmp_path / "group", metadata(group="32")))
    assert "another layout" in refusal(rewritten(whole, tmp_path / "format", metadata(weight_format="q5")))
    assert "its tensors are not those" in refusal(
        rewritten(whole, tmp_path / "q8", metadata(weight_format="q8", codebook=""))
    )
    assert "no file of packed weights" in refusal(rewritten(whole, tmp_path / "kind", metadata(format="pt")))
    assert "header is damaged" in refusal(rewritten(whole, tmp_path / "config", metadata(config="{}")))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2, "intermediate_size": 2**31 - 2},  # beyond 2^64 bytes
        {"vocab_size": 2**62},
        {"vocab_size": 2**70},
        {"hidden_size": 2**62},
        {"num_hidden_layers": 10**4, "layer_types": None},
        {"num_hidden_layers": 10**6, "layer_types": None},  # to list their tensors would take gigabytes
    ],
)
def test_architectures_beyond_all_sizes_are_refused(whole: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    def change(header: dict[str, Any]) -> None:
        config = {**json.loads(header["__metadata__"]["config"]), **changes}
        header["__metadata__"]["config"] = json.dumps(config, separators=(",", ":"))

    told = refusal(rewritten(whole, tmp_path / "copy", change))
    assert "its tensors are not those of the architecture" in told or "more than any model has" in told


def test_tensors_that_do_not_lie_where_kernels_can_read_them_are_refused(whole: Path, tmp_path: Path) -> None:
    shifted = rewritten(whole, tmp_path / "copy", lambda header: None, alignment=4096 + 8)
    assert "do not begin at multiples of 64 bytes" in refusal(shifted)


def test_a_config_that_does_not_belong_to_the_file_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    SMALL.to_json_file(folder / "config.json")
    assert "another architecture" in refusal(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no such file"):
        open_packed(folder)


def test_folders_without_one_packed_file_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.copyfile(packed_file(folder), folder / "model-q8.gemma2.safetensors")
    assert "holds 2 files of packed weights" in refusal(folder)
    assert "holds no packed weights" in refusal(tmp_path)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "holds nan in row 39, column 5, which no model can run with")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, said: str) -> None:
    tensors = random_tensors(dtype="bfloat16")
    name = "model.layers.2.mlp.up_proj.weight"  # the second part of a fused matrix
    tensors[name][39, 5] = value
    checkpoint = open_checkpoint(write_model(tmp_path / "source", tensors))
    for weight_format in PACKED_FORMATS:
        with pytest.raises(CheckpointError) as raised:
            save_packed(tmp_path / "packed", checkpoint, weight_format, num_threads=1)
        assert f"{name} {said}" in str(raised.value)
        assert not (tmp_path / "packed").exists()
    tensors[name][39, 5] = 0
    tensors["model.layers.1.input_layernorm.weight"][7] = -np.inf
    checkpoint = open_checkpoint(write_model(tmp_path / "source", tensors))
    with pytest.raises(CheckpointError, match=r"input_layernorm.weight holds -inf in value 7"):
        pack_model(checkpoint, "q4", num_threads=1)


def test_weights_too_large_for_a_format(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = 1e30
    checkpoint = open_checkpoint(write_model(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"down_proj.weight holds 1e.30 in row 3, column 4, too large for q8"):
        pack_model(checkpoint, "q8", num_threads=1)
    pack_model(checkpoint, "bfloat16", num_threads=1)


# -- Folders ----------------------------------------------------------------------------------------------------------


def test_only_empty_folders_and_packed_ones_are_written_to(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "source"))
    (tmp_path / "empty").mkdir()
    save_packed(tmp_path / "empty", checkpoint, "q4", num_threads=1)
    mapped = load(tmp_path / "empty").tensors[EMBEDDING]
    before = mapped.copy()
    save_packed(tmp_path / "empty", checkpoint, "q8", num_threads=1)  # replaces it
    assert packed_file(tmp_path / "empty").name == "model-q8.gemma2.safetensors"
    np.testing.assert_array_equal(mapped, before)  # whoever runs the old one goes on
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    for folder, said in ((full, "is not empty .it has thesis.txt"), (tmp_path / "source", "is not empty")):
        with pytest.raises(CheckpointError, match=said):
            save_packed(folder, checkpoint, "q4", num_threads=1)
    assert os.listdir(full) == ["thesis.txt"]
    with pytest.raises(CheckpointError, match="is a file"):
        save_packed(full / "thesis.txt", checkpoint, "q4", num_threads=1)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "source"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"the disk is full: .* are needed, 1.0 kB are free"):
        save_packed(tmp_path / "packed", checkpoint, "q4", num_threads=1)
    monkeypatch.undo()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_packed(tmp_path / "packed", checkpoint, "q4", num_threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "packed").exists()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from gemma2.checkpoints import open_checkpoint, save_packed
    folder, source, point = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    stop = lambda: os.kill(os.getpid(), signal.SIGINT if point == "interrupted" else signal.SIGKILL)
    def progress(done, total):
        if done > total // 2 and point != "publishing":
            stop()
    if point == "publishing":
        moves, original = [], Path.replace
        def replace(self, target):
            moves.append(target)
            if len(moves) == 2:
                stop()
            return original(self, target)
        Path.replace = replace
    save_packed(folder, open_checkpoint(source), "q8", num_threads=1, progress=progress)
"""


@pytest.mark.parametrize("point", ["interrupted", "writing", "publishing"])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_stopped_write_leaves_no_half_model(tmp_path: Path, point: str, replacing: bool) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "source"))
    folder = tmp_path / "packed"
    if replacing:
        save_packed(folder, checkpoint, "q4", num_threads=1)
        old = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = textwrap.dedent(KILLED).format(paths=[str(Path(__file__).parents[2] / "src")])
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "source"), point]
    done = subprocess.run(arguments, capture_output=True)
    assert done.returncode == (-signal.SIGINT if point == "interrupted" else -signal.SIGKILL), done.stderr.decode()
    if point == "interrupted":
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == old if replacing else not folder.exists()
    elif point == "writing" and replacing:
        assert load(folder).format == "q4"
    else:
        with pytest.raises(ValueError):
            load(folder)
    save_packed(folder, checkpoint, "q8", num_threads=1)  # clears up
    assert load(folder).format == "q8"
    names = sorted(os.listdir(folder))
    assert names == ["config.json", "generation_config.json", "model-q8.gemma2.safetensors", "tokenizer.json"]


def test_a_folder_that_is_being_written_to_is_left_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source(tmp_path / "source"))
    refusals = []

    def progress(done: int, total: int) -> None:
        if done < total:
            with pytest.raises(CheckpointError, match="another process is writing to it") as refusal:
                save_packed(tmp_path / "packed", checkpoint, "q8", num_threads=1)
            refusals.append(refusal)

    save_packed(tmp_path / "packed", checkpoint, "q4", num_threads=1, progress=progress)
    assert refusals and load(tmp_path / "packed").format == "q4"


def test_memory_stays_small(tmp_path: Path) -> None:
    """A model of 200 MB is packed with little more than the interpreter needs."""
    config = SMALL.replace(vocab_size=50_000, hidden_size=1024)
    write_model(tmp_path / "source", random_tensors(config, dtype="bfloat16"), config)
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "src")!r})
from gemma2.checkpoints import open_checkpoint, save_packed
checkpoint = open_checkpoint({str(tmp_path / "source")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_packed({str(tmp_path / "packed")!r}, checkpoint, "q8", num_threads=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 130 << 20
