"""The cache of rounded weights: made once, found again, made anew when the model changes, and never in the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from small_checkpoints import SMALL, random_tensors, write_model

from gemma2.checkpoints import Checkpoint, open_checkpoint, packed_cache, packed_model
from gemma2.checkpoints.packing import pack_model
from gemma2.errors import CheckpointError
from gemma2.quantization import SECOND_PLANE, PackedModel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, which small models use too."""
    monkeypatch.setenv("GEMMA2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_cache, "SMALL_MODEL_PARAMETERS", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_model(tmp_path / "source", random_tensors(dtype="bfloat16")))


class Told:
    """What `packed_model` said, and how often it rounded."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.num_rounded = 0

    def progress(self, done: int, total: int) -> None:
        self.num_rounded += done == total

    def get(self, checkpoint: Checkpoint, weight_format: str = "q4", **options: Any) -> PackedModel:
        return packed_model(
            checkpoint,
            weight_format,
            num_threads=1,
            progress=self.progress,
            notify=self.sentences.append,
            **options,
        )


def assert_same(left: PackedModel, right: PackedModel) -> None:
    assert (left.config, left.format, list(left.tensors)) == (right.config, right.format, list(right.tensors))
    for name, tensor in left.tensors.items():
        np.testing.assert_array_equal(tensor, right.tensors[name])


def copies(cache: Path) -> list[str]:
    return sorted(name for name in os.listdir(cache) if not name.endswith(".lock"))


@pytest.mark.parametrize("weight_format", ["q4", "q8"])
def test_rounded_once_and_found_again(checkpoint: Checkpoint, cache: Path, weight_format: str) -> None:
    told = Told()
    first = told.get(checkpoint, weight_format)
    assert told.num_rounded == 1
    assert told.sentences == [f"{checkpoint.folder}: rounding to {weight_format}, once; kept in {cache}"]
    second = told.get(open_checkpoint(checkpoint.folder), weight_format)
    assert told.num_rounded == 1 and len(told.sentences) == 1
    assert len(copies(cache)) == 1
    expected = pack_model(checkpoint, weight_format, num_threads=1)
    assert_same(first, expected)
    assert_same(second, expected)


def test_formats_and_planes_are_kept_side_by_side(checkpoint: Checkpoint, cache: Path) -> None:
    told = Told()
    for _ in range(2):
        assert told.get(checkpoint, "q8").format == "q8"
        assert SECOND_PLANE in told.get(checkpoint).tensors
        assert SECOND_PLANE not in told.get(checkpoint, second_plane=False).tensors
    assert told.num_rounded == 3 and len(copies(cache)) == 3


def test_another_folder_is_another_model(checkpoint: Checkpoint, cache: Path, tmp_path: Path) -> None:
    told = Told()
    other = open_checkpoint(write_model(tmp_path / "other" / "source", random_tensors(seed=1, dtype="bfloat16")))
    first, second = told.get(checkpoint), told.get(other)
    assert told.num_rounded == 2 and len(copies(cache)) == 2
    assert_same(second, pack_model(other, "q4", num_threads=1))
    assert_same(first, told.get(checkpoint))


def test_a_model_that_changed_is_rounded_anew_and_the_old_copy_goes(checkpoint: Checkpoint, cache: Path) -> None:
    told = Told()
    told.get(checkpoint)
    file = checkpoint.folder / "model.safetensors"
    before = file.stat().st_mtime_ns
    changed = open_checkpoint(write_model(checkpoint.folder, random_tensors(seed=1, dtype="bfloat16")))
    os.utime(file, ns=(before + 1, before + 1))  # one file after the other within a clock's tick
    assert_same(told.get(changed), pack_model(changed, "q4", num_threads=1))
    assert told.num_rounded == 2 and len(copies(cache)) == 1


def test_leftovers_of_a_killed_process_are_removed(checkpoint: Checkpoint, cache: Path) -> None:
    told = Told()
    told.get(checkpoint)
    (name,) = copies(cache)
    (cache / name).rename(cache / f"{name}.abc.partial")
    (cache / "someone's file").touch()
    told.get(checkpoint)
    assert copies(cache) == sorted([name, "someone's file"])


def test_a_damaged_copy_is_made_again(checkpoint: Checkpoint, cache: Path) -> None:
    told = Told()
    told.get(checkpoint)
    (name,) = copies(cache)
    data = bytearray((cache / name).read_bytes())
    for damaged in (data[:5000], data[:-1] + bytes([data[-1] ^ 1]), b""):
        (cache / name).write_bytes(damaged)
        assert_same(told.get(checkpoint), pack_model(checkpoint, "q4", num_threads=1))
        assert told.sentences[-2] == f"{cache / name}: the copy of the rounded weights is damaged; it is made again now"
    assert told.num_rounded == 4


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    checkpoint: Checkpoint, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    cache.parent.write_text("a file in the way")
    assert_same(told.get(checkpoint), pack_model(checkpoint, "q4", num_threads=1))
    assert "cannot be kept" in told.sentences[-1] and "GEMMA2_CACHE" in told.sentences[-1]
    cache.parent.unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert_same(told.get(checkpoint), pack_model(checkpoint, "q4", num_threads=1))
    assert "No space left on device" in told.sentences[-1]
    assert copies(cache) == []


def test_a_limit_on_files_is_told_with_the_place(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(packed_cache, "write_packed_file", refuse)
    told = Told()
    told.get(checkpoint)
    assert told.sentences[-1].startswith(f"{cache}: File too large; the rounded weights cannot be kept")


def test_a_copy_is_found_where_nothing_can_be_written(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose cache is mounted for reading only: no lock can be had, nor is one needed."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(cache))

    told = Told()
    told.get(checkpoint)
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert_same(told.get(checkpoint), pack_model(checkpoint, "q4", num_threads=1))
    assert told.num_rounded == 1 and len(told.sentences) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
@pytest.mark.parametrize("name", [b"gemma-\xff\xe9", b"x" * 250, "é".encode() * 120], ids=["latin", "long", "cut"])
def test_folders_of_any_name(tmp_path: Path, cache: Path, name: bytes) -> None:
    folder = tmp_path / os.fsdecode(name)
    model = open_checkpoint(write_model(folder, random_tensors(dtype="bfloat16")))
    told = Told()
    for _ in range(2):
        assert_same(told.get(model), pack_model(model, "q4", num_threads=1))
    assert told.num_rounded == 1 and len(copies(cache)) == 1


def test_what_is_not_cached(checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    for weight_format in ("float32", "bfloat16"):
        assert told.get(checkpoint, weight_format).format == weight_format
    monkeypatch.setattr(packed_cache, "SMALL_MODEL_PARAMETERS", 10**9)
    told.get(checkpoint, "q4")
    assert not cache.exists() and told.sentences == [] and told.num_rounded == 3


def test_a_model_with_a_weight_that_is_not_finite_is_refused_and_nothing_is_kept(tmp_path: Path, cache: Path) -> None:
    tensors = random_tensors(dtype="bfloat16")
    tensors["model.layers.0.self_attn.o_proj.weight"][1, 2] = np.inf
    broken = open_checkpoint(write_model(tmp_path / "source", tensors))
    with pytest.raises(CheckpointError, match=r"o_proj.weight holds inf in row 1, column 2"):
        Told().get(broken)
    assert copies(cache) == []


TOGETHER = """
    import sys, time
    sys.path[:0] = {paths!r}
    from gemma2.checkpoints import open_checkpoint, packed_cache, packed_model
    packed_cache.SMALL_MODEL_PARAMETERS = 0
    def progress(done, total):
        time.sleep(0.02)
        if done == total:
            print("rounded")
    checkpoint = open_checkpoint(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    model = packed_model(checkpoint, "q4", num_threads=1, progress=progress, notify=print)
    print(sum(int(tensor.view("uint8").sum()) for tensor in model.tensors.values()))
"""


def test_processes_that_need_the_same_copy_make_it_once(checkpoint: Checkpoint, cache: Path) -> None:
    code = textwrap.dedent(TOGETHER).format(paths=[str(Path(__file__).parents[2] / "src")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(checkpoint.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(0.05)
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [output.count("rounded") for output in outputs] == [1, 0, 0]
    assert all("another process rounds it to q4; waiting" in output[0] for output in outputs[1:])
    assert len({output[-1] for output in outputs}) == 1
    assert len(copies(cache)) == 1


def test_a_process_that_is_killed_leaves_the_next_one_free(checkpoint: Checkpoint, cache: Path) -> None:
    code = textwrap.dedent(TOGETHER).format(paths=[str(Path(__file__).parents[2] / "src")])
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdin is not None and killed.stdout is not None
    killed.stdin.write("\n")
    killed.stdin.flush()
    killed.stdout.readline()
    deadline = time.monotonic() + 30
    while not (cache.is_dir() and any(name.endswith(".partial") for name in os.listdir(cache))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    killed.stdin.close()
    killed.stdout.close()
    assert_same(Told().get(checkpoint), pack_model(checkpoint, "q4", num_threads=1))
    assert len(copies(cache)) == 1
    assert SMALL.num_hidden_layers == 3  # enough steps for the kill to come in between
