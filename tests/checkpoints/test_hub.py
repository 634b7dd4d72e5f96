from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import COMMIT, OLD_COMMIT, FakeHub, Repository
from small_checkpoints import SMALL, random_tensors, write_model, write_sharded_model

from gemma2.checkpoints import open_checkpoint, pull, resolve_model
from gemma2.errors import CheckpointError, DownloadError

REPO = "google/gemma-2-2b-it"
SHARDS = [f"model-{index}-of-00003.safetensors" for index in ("00001", "00002", "00003")]
Q = "model.layers.1.self_attn.q_proj.weight"
TOKEN = "hf_aSecretThatNoMessageMayShow"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, no cache and no settings of whoever runs the tests; and no waiting between attempts."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    files = contents(write_sharded_model(tmp_path / "made", random_tensors(dtype="bfloat16")))
    files |= {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "README.md": b"# Gemma", "LICENSE": b"terms"}
    files |= {
        "original/model.safetensors": b"another format",
        "pytorch_model.bin": b"pickle",
        "gemma-2-2b-it.gguf": b"GGUF",
        "model.safetensors.bak": b"",
    }
    hub.repositories[REPO] = Repository(
        files=files, old_files=contents(write_model(tmp_path / "old", random_tensors(seed=1)))
    )
    yield hub
    hub.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(DownloadError) as caught:
        pull(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


# -- Fetching ---------------------------------------------------------------------------------------------------


def test_a_model_comes_whole_and_without_what_is_not_needed(hub: FakeHub, cache: Path) -> None:
    folder = pull(REPO, cache_dir=cache)
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        *SHARDS,
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tensors = random_tensors(dtype="bfloat16")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == SMALL
    assert all(array.tobytes() == tensors[name].tobytes() for name, array in checkpoint.arrays())


def test_a_second_pull_fetches_nothing_again(hub: FakeHub, cache: Path) -> None:
    folder = pull(REPO, cache_dir=cache)
    assert len(hub.delivered(".safetensors")) == 3
    assert pull(REPO, cache_dir=cache) == folder
    assert len(hub.delivered(".safetensors")) == 3
    assert len(hub.delivered("tokenizer.json")) == 1


def test_a_folder_of_ones_own(hub: FakeHub, tmp_path: Path, cache: Path) -> None:
    folder = pull(REPO, local_dir=tmp_path / "mine", cache_dir=cache)
    assert folder == tmp_path / "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
    open_checkpoint(folder)
    pull(REPO, local_dir=tmp_path / "mine", cache_dir=cache)
    assert len(hub.delivered(".safetensors")) == 3


@pytest.mark.parametrize("revision", ["v1", OLD_COMMIT])
def test_a_revision(hub: FakeHub, cache: Path, revision: str) -> None:
    folder = pull(REPO, revision=revision, cache_dir=cache)
    assert np.array_equal(open_checkpoint(folder).tensors[Q].numpy(), random_tensors(seed=1)[Q])
    assert resolve_model(REPO, revision=revision, cache_dir=cache) == folder
    with pytest.raises(CheckpointError):
        resolve_model(REPO, cache_dir=cache)


def test_a_new_commit_is_fetched(hub: FakeHub, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(REPO, cache_dir=cache)
    pull(REPO, cache_dir=cache, local_dir=tmp_path / "mine")
    hub.repositories[REPO].files = contents(write_sharded_model(tmp_path / "new", random_tensors(seed=2)))
    monkeypatch.setattr("fake_hub.COMMIT", "beef" * 10)
    for folder in (pull(REPO, cache_dir=cache), pull(REPO, cache_dir=cache, local_dir=tmp_path / "mine")):
        assert np.array_equal(open_checkpoint(folder).tensors[Q].numpy(), random_tensors(seed=2)[Q])
    assert resolve_model(REPO, cache_dir=cache).name == "beef" * 10


def test_a_short_name(hub: FakeHub, cache: Path) -> None:
    folder = pull("gemma-2-2b-it", cache_dir=cache)
    assert resolve_model("gemma-2-2b-it", cache_dir=cache) == resolve_model(REPO, cache_dir=cache) == folder


def test_the_environment_is_read_as_by_other_programs(hub: FakeHub, tmp_path: Path) -> None:
    hub.tokens = hub.repositories[REPO].readers = {TOKEN}
    hub.repositories[REPO].gated = True
    source = str(Path(__file__).parents[2] / "src")
    variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", f"from gemma2.checkpoints import pull; print(pull({REPO!r}))"],
        env={**os.environ, **variables, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home" / "hub")
    open_checkpoint(folder)


# -- Breaking off and going on ----------------------------------------------------------------------------------


def test_a_broken_connection_is_resumed_within_the_file(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)  # what is less than this is lost
    hub.cuts[SHARDS[1]] = [1000, 500]
    folder = pull(REPO, cache_dir=cache)
    assert [request.range for request in hub.delivered(SHARDS[1])] == [None, "bytes=1000-", "bytes=1500-"]
    assert (folder / SHARDS[1]).read_bytes() == hub.repositories[REPO].files[SHARDS[1]]


def test_a_connection_that_stays_broken(hub: FakeHub, cache: Path) -> None:
    hub.cuts[SHARDS[1]] = [0] * 50
    assert "connection broke again and again; run the same again, finished files are kept" in refusal(
        REPO, cache_dir=cache
    )
    with pytest.raises(CheckpointError, match=f"gemma2 pull {REPO}"):
        resolve_model(REPO, cache_dir=cache)
    hub.cuts.clear()
    open_checkpoint(pull(REPO, cache_dir=cache))
    assert len(hub.delivered(SHARDS[0])) == 1


def test_ctrl_c_says_how_to_go_on(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    original = huggingface_hub.hf_hub_download

    def download(repo_id: str, name: str, **options: Any) -> Any:
        if name == SHARDS[1]:
            raise KeyboardInterrupt
        return original(repo_id, name, **options)

    with monkeypatch.context() as context:
        context.setattr("huggingface_hub.hf_hub_download", download)
        with pytest.raises(KeyboardInterrupt, match="finished files are kept, run the same again to go on"):
            pull(REPO, cache_dir=cache)
    open_checkpoint(pull(REPO, cache_dir=cache))
    assert len(hub.delivered(SHARDS[0])) == 1


@pytest.mark.parametrize("local", [False, True])
def test_a_file_cut_off_on_disk_is_fetched_again(hub: FakeHub, tmp_path: Path, cache: Path, local: bool) -> None:
    where: dict[str, Any] = {"cache_dir": cache, "local_dir": tmp_path / "mine" if local else None}
    file = pull(REPO, **where) / SHARDS[1]
    file.resolve().write_bytes(file.read_bytes()[:-10])
    if not local:
        with pytest.raises(CheckpointError, match=r"not whole: .* is truncated"):
            resolve_model(REPO, cache_dir=cache)
    open_checkpoint(pull(REPO, **where))
    assert len(hub.delivered(SHARDS[0])) == 1


# -- Refusals ---------------------------------------------------------------------------------------------------


def test_a_gated_model_without_a_token(hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    hub.repositories[REPO].gated = True
    message = refusal(REPO, cache_dir=cache)
    assert (
        f"{REPO}: is only for those who accepted its terms, and no token was sent. Open {hub.address}/{REPO}" in message
    )
    assert "`hf auth login`, HF_TOKEN or --token" in message
    refusal(REPO, local_dir=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_gated_model_with_a_token_without_access(hub: FakeHub, cache: Path) -> None:
    hub.repositories[REPO].gated = True
    hub.tokens = {TOKEN}
    message = refusal(REPO, token=TOKEN, cache_dir=cache)
    assert "the account of this token has not been given access" in message
    assert "accept the terms" in message


def test_a_gated_model_with_access(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens = hub.repositories[REPO].readers = {TOKEN}
    hub.repositories[REPO].gated = True
    open_checkpoint(pull(REPO, token=f" {TOKEN}\n", cache_dir=cache))
    assert all(request.token == (None if "/store/" in request.path else TOKEN) for request in hub.requests)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    open_checkpoint(pull(REPO, cache_dir=cache))


def test_a_wrong_token(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the hub does not know the token that was sent" in refusal(REPO, token=TOKEN, cache_dir=cache)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "mistyped, expired or revoked" in refusal(REPO, cache_dir=cache)
    refusal(REPO, token="hf_ü" + TOKEN, cache_dir=cache)


def test_an_unknown_or_private_repository(hub: FakeHub, cache: Path) -> None:
    message = refusal("google/gemma-2-2b-iit", cache_dir=cache)
    assert f"there is no such repository at {hub.address}, or it is private and it needs a token" in message
    assert f"Did you mean '{REPO}'?" in message
    hub.tokens = {TOKEN}
    assert "or it is private and this token may not see it" in refusal("me/secret", token=TOKEN, cache_dir=cache)


def test_an_unknown_revision(hub: FakeHub, cache: Path) -> None:
    assert f"has no revision 'v2'; see {hub.address}/{REPO}/commits" in refusal(REPO, revision="v2", cache_dir=cache)


@pytest.mark.parametrize("name", ["", "gemma", "a/b/c", "../x", "https://huggingface.co/google/gemma-2-2b", "a b/c"])
def test_what_is_no_repository(name: str) -> None:
    assert f"{name!r} is no repository; those are called owner/name" in refusal(name)


def test_a_misspelt_short_name() -> None:
    assert "Did you mean 'gemma-2-2b-it'?" in refusal("gemma2-2b-it")


@pytest.mark.parametrize(
    ("status", "message"), [(500, "has trouble (500)"), (503, "later"), (429, "slow down"), (403, "may not read it")]
)
def test_a_hub_in_trouble(hub: FakeHub, cache: Path, status: int, message: str) -> None:
    hub.status = status
    assert message in refusal(REPO, cache_dir=cache)


def test_a_hub_that_cannot_be_reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = FakeHub()
    gone.close()
    monkeypatch.setenv("HF_ENDPOINT", gone.address)
    message = refusal(REPO, cache_dir=cache)
    assert message.startswith(f"{REPO}: cannot reach {gone.address} (")
    assert "see to the network and run the same again" in message


def test_a_disk_without_room(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 30_000})())
    message = refusal(REPO, cache_dir=cache)
    assert "needs 4" in message and f"kB more, but {cache} has 30.0 kB free" in message
    assert not hub.delivered(".safetensors")


def test_a_disk_that_fills_up(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert "the disk is full; make room" in refusal(REPO, cache_dir=cache)


def test_a_target_that_cannot_be_written(hub: FakeHub, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write to" in refusal(REPO, local_dir=tmp_path / "file", cache_dir=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "model_type must be 'gemma2', but is 'llama'"),
        ({"config.json": b"<html>"}, "is not a Gemma 2 that can be read"),
        ({"config.json": None}, "has no config.json"),
        ({"model.safetensors.index.json": b"{}"}, "must have a weight_map"),
        ({"model.safetensors.index.json": None}, "holds GGUF weights"),
        ({"model.safetensors.index.json": None, "gemma-2-2b-it.gguf": None}, "holds PyTorch pickles"),
        ({"model.safetensors.index.json": None, "adapter_config.json": b"{}"}, "holds an adapter"),
        ({SHARDS[1]: None}, f"names {SHARDS[1]}, which the repository does not have"),
    ],
)
def test_a_repository_that_is_no_gemma_2_is_refused_early(
    hub: FakeHub, tmp_path: Path, change: dict[str, bytes | None], message: str
) -> None:
    files: dict[str, bytes | None] = {**hub.repositories[REPO].files, **change}
    hub.repositories[REPO].files = {name: data for name, data in files.items() if data is not None}
    assert message in refusal(REPO, local_dir=tmp_path / "mine")
    assert not hub.delivered(".safetensors")
    assert not (tmp_path / "mine").exists()


def test_a_repository_whose_weights_are_damaged(hub: FakeHub, cache: Path) -> None:
    hub.repositories[REPO].files[SHARDS[1]] += b"more"
    assert "came as the hub has it, but cannot be opened: " in refusal(REPO, cache_dir=cache)


# -- Without a network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(hub: FakeHub, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert "cannot be fetched, as HF_HUB_OFFLINE is set" in refusal(REPO, cache_dir=cache)
    monkeypatch.delenv(variable)
    folder = pull(REPO, cache_dir=cache)
    monkeypatch.setenv(variable, "true")
    hub.requests.clear()
    assert pull(REPO, cache_dir=cache) == resolve_model(REPO, cache_dir=cache) == folder
    assert "cannot be fetched" in refusal(REPO, cache_dir=cache, local_dir=tmp_path / "mine")
    (folder / SHARDS[2]).unlink()
    assert "the copy on this machine is not whole" in refusal(REPO, cache_dir=cache)
    assert not hub.requests


def test_progress_bars_are_as_before_afterwards(hub: FakeHub, cache: Path) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    assert not are_progress_bars_disabled()
    pull(REPO, cache_dir=cache, progress=False)
    assert not are_progress_bars_disabled()


def test_the_commit_names_the_folder(hub: FakeHub, cache: Path) -> None:
    assert pull(REPO, cache_dir=cache).name == COMMIT
