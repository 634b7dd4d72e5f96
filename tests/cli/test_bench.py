"""`gemma2 bench`: what it runs, what it counts, and what it prints. Time is a fake one, so that figures are exact."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2.api import BUNDLED_FOLDER
from gemma2.cli import bench_first_token, bench_measure
from gemma2.cli.bench_measure import BATCH_PROMPT_TOKENS, Bench, Ceilings, Row, Work
from gemma2.cli.main import main
from gemma2.config import PRESETS, Gemma2Config
from gemma2.errors import Gemma2Error
from gemma2.memory.running import kv_cache_bytes
from gemma2.step import Logits, StepBatch

SMALL = PRESETS["2b"].replace(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    query_pre_attn_scalar=32,
    vocab_size=320,
    sliding_window=256,
    max_position_embeddings=2048,
)
# q, o: 64 · 64; k, v: 64 · 32; gate, up, down: 64 · 128.
LAYER_WEIGHTS = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
HEAD_WEIGHTS = 320 * 64


class FakeBackend:
    """Takes 10 ms for each token, on a clock of its own, and checks what it is asked for as a real one does."""

    weights = "q4"
    kv_cache = "bfloat16"
    num_threads = 2
    isa = "fake"

    def __init__(self, config: Gemma2Config = SMALL) -> None:
        self.config = config
        self.now = 0.0
        self.lengths: dict[int, int] = {}
        self.steps: list[list[tuple[int, int, int, int]]] = []
        """Of each forward pass: (sequence, position, tokens, logits)."""
        self.freed: list[int] = []
        self.interrupt_at = -1

    def forward(self, batch: StepBatch) -> Logits:
        if len(self.steps) == self.interrupt_at:
            raise KeyboardInterrupt
        self.steps.append([])
        for step in batch.steps:
            assert step.position == self.lengths.get(step.sequence_id, 0)
            assert step.token_ids.dtype == np.int32 and step.token_ids.max() < self.config.vocab_size
            self.lengths[step.sequence_id] = step.position + len(step.token_ids)
            assert self.lengths[step.sequence_id] <= self.config.max_position_embeddings
            self.steps[-1].append((step.sequence_id, step.position, len(step.token_ids), step.num_logits))
            self.now += 0.01 * len(step.token_ids)
        return np.zeros((sum(step.num_logits for step in batch.steps), self.config.vocab_size), np.float32)

    def free(self, sequence_id: int) -> None:
        self.lengths.pop(sequence_id, None)
        self.freed.append(sequence_id)


class FakeMachine:
    """Gives the ceilings of a list, the last one for ever; memory peaks at 10 MB."""

    def __init__(self, *read: float) -> None:
        self.read = list(read) or [1e6]
        self.num_measured = 0

    def ceilings(self) -> Ceilings:
        self.num_measured += 1
        read = self.read.pop(0) if len(self.read) > 1 else self.read[0]
        return Ceilings(read=read, read_best=2 * read, dot=1e8, dot_best=2e8)

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 10_000_000


class Silence:
    def start(self, what: str, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, amount: int) -> None:
        self.done += amount
        assert self.done <= self.total

    def finish(self, row: Row) -> None:
        pass


def make_bench(machine: FakeMachine | None = None, **options: Any) -> tuple[FakeBackend, Bench]:
    backend = FakeBackend()
    bench = Bench(
        backend=backend,
        machine=machine or FakeMachine(),
        watcher=Silence(),
        weight_bytes=1000,
        kv_format="bfloat16",
        clock=lambda: backend.now,
        **options,
    )
    return backend, bench


def work(**changes: Any) -> Work:
    return Work(**{"prefill": (), "contexts": (), "batches": (), "decode_steps": 4, **changes})


def test_prefill_counts_every_token_and_the_head_once() -> None:
    _, bench = make_bench()
    (row,) = bench.run(work(prefill=(600,)))
    assert row.tokens_per_second == pytest.approx(100)
    assert row.operations == 2 * (2 * LAYER_WEIGHTS * 600 + HEAD_WEIGHTS)
    assert row.fraction_of_dot == pytest.approx(row.operations / 6.0 / 1e8)
    assert row.bytes_read == 0


def test_short_prompts_are_read_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_measure, "_PREFILL_SECONDS", 3.0)
    _, bench = make_bench()
    rows = list(bench.run(work(prefill=(10, 100, 400))))
    assert [len(row.seconds) for row in rows] == [5, 3, 1]


def test_prompts_go_in_in_chunks_and_only_their_last_token_has_logits() -> None:
    backend, bench = make_bench()
    list(bench.run(work(prefill=(1100,))))
    assert backend.steps[-3:] == [[(0, 0, 512, 0)], [(0, 512, 512, 0)], [(0, 1024, 76, 1)]]


def test_the_longest_prompt_is_read_once() -> None:
    backend, bench = make_bench()
    rows = list(bench.run(work(contexts=(1000, 20, 700), decode_steps=5)))
    assert [(row.kind, row.context) for row in rows] == [("decode", 20), ("decode", 700), ("decode", 1000)]
    firsts = [step for (step,) in backend.steps if step[1] == 0]
    assert firsts == [(0, 0, 16, 1), (0, 0, 16, 1), (0, 0, 20, 1)]  # twice to warm up, once to measure
    for context in (20, 700, 1000):
        for index in range(5):
            assert [(0, context + index, 1, 1)] in backend.steps


def test_decode_goes_on_from_the_prefill_of_its_length() -> None:
    backend, bench = make_bench()
    rows = list(bench.run(work(prefill=(300,), contexts=(300, 302), decode_steps=8)))
    assert [(row.kind, row.context) for row in rows] == [("prefill", 300), ("decode", 300), ("decode", 302)]
    # The steps at 300 went past 302, so that a new sequence was needed for it.
    assert [steps for steps in backend.steps if steps[0][2] > 16] == [[(0, 0, 300, 1)], [(0, 0, 302, 1)]]


def test_decode_counts_all_weights_and_the_keys_and_values_seen() -> None:
    _, bench = make_bench()
    (row,) = bench.run(work(contexts=(1000,), decode_steps=4))
    # Two bytes for each of keys and values, 32 wide; the local layer sees 256 tokens, the global one all.
    assert row.bytes_read == 1000 + 2 * 2 * 32 * (256 + 1002)
    assert row.bytes_read == 1000 + kv_cache_bytes(SMALL, 1002)
    assert row.seconds == pytest.approx([0.01] * 4)
    assert row.bytes_per_second == pytest.approx(row.bytes_read * 100)
    assert row.operations == 2 * (2 * LAYER_WEIGHTS + HEAD_WEIGHTS)


def test_a_batch_decodes_together_and_leaves_nothing_behind() -> None:
    backend, bench = make_bench()
    (row,) = bench.run(work(batches=(3,), decode_steps=2))
    assert (row.num_tokens, row.context) == (3, BATCH_PROMPT_TOKENS)
    assert row.tokens_per_second == pytest.approx(100)
    last = [(sequence, BATCH_PROMPT_TOKENS + 1, 1, 1) for sequence in range(3)]
    assert backend.steps[-1] == last
    assert row.bytes_read == 1000 + 3 * kv_cache_bytes(SMALL, BATCH_PROMPT_TOKENS + 1)
    assert row.operations == 3 * 2 * (2 * LAYER_WEIGHTS + HEAD_WEIGHTS)
    assert backend.lengths == {}


def test_fractions_are_of_the_higher_ceiling_around_a_row() -> None:
    machine = FakeMachine(1e6, 4e6, 2e6, 5e6, 3e6)
    _, bench = make_bench(machine)
    first, second, third = bench.run(work(prefill=(30,), contexts=(30, 80)))
    assert (first.before.read, first.after.read) == (1e6, 4e6)
    # Nothing ran between the first two rows, so that one measurement is the end of one and the beginning of the other.
    assert (second.before.read, second.after.read) == (4e6, 2e6)
    assert (third.before.read, third.after.read) == (5e6, 3e6)
    assert second.fraction_of_read == pytest.approx(second.bytes_per_second / 4e6)
    assert third.fraction_of_read == pytest.approx(third.bytes_per_second / 5e6)
    assert machine.num_measured == 5


def test_memory_beside_weights_and_cache() -> None:
    _, bench = make_bench(idle_bytes=500)
    long, batch = bench.run(work(contexts=(1000,), batches=(2,)))
    assert long.peak_extra_bytes == 10_000_000 - 1000 - 500 - kv_cache_bytes(SMALL, 1004)
    # The long sequence's cache has been freed, but the process keeps its memory.
    assert batch.peak_extra_bytes == long.peak_extra_bytes


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_size(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[FakeBackend]]:
    """Makes 2b a small model on a fake backend."""
    made: list[FakeBackend] = []

    def make(packed: Any, *, num_threads: int | None, isa: str, kv_cache: str) -> FakeBackend:
        made.append(FakeBackend(packed.config))
        made[-1].weights = packed.format
        made[-1].num_threads = num_threads or 2
        made[-1].isa = "scalar"
        made[-1].kv_cache = "bfloat16" if kv_cache == "auto" else kv_cache
        return made[-1]

    monkeypatch.setattr("gemma2.cpu.CpuBackend", make)
    monkeypatch.setattr("gemma2.cli.bench.PRESETS", {"2b": SMALL})
    monkeypatch.setattr("gemma2.cli.bench_machine._ENOUGH_BYTES", 1 << 20)
    monkeypatch.setattr("gemma2.cli.bench_machine._READ_SECONDS", 0.001)
    monkeypatch.setattr("gemma2.cli.bench_machine._DOT_SECONDS", 0.001)
    return lambda: made


def test_json_for_programs(small_size: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prefill", "40", "--context", "40,90", "--batch", "1,2", "--decode-steps", "3", "--threads", "1"]
    assert main(["bench", "--size", "2b", "--weights", "q8", *options, "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["context"], row["num_tokens"]) for row in values["rows"]] == [
        ("prefill", 40, 40),
        ("decode", 40, 1),
        ("decode", 90, 1),
        ("batch", 32, 1),
        ("batch", 32, 2),
    ]
    assert (values["weights"], values["num_threads"], values["dot_kind"]) == ("q8", 1, "int8")
    for row in values["rows"]:
        assert row["tokens_per_second"] > 0 and row["fraction_of_dot"] > 0
        assert row["before"]["read_best"] >= row["before"]["read"] > 0
    assert values["weight_bytes"] > 8 / 8 * SMALL.count_parameters().total


def test_table_for_people(small_size: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    options = ["--prefill", "40", "--context", "1000", "--batch", "none", "--json", str(file)]
    assert main(["bench", *options]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Gemma 2 2B, random weights: q4, ")
    assert "prefill 40 " in out and "decode at 1,000 " in out and "sequences" not in out
    assert "\x1b" not in out and "─" not in out
    assert "decode at 1,000: " in err  # told while it ran
    assert main(["bench", "--prefill", "none", "--context", "none", "--batch", "1", "--json", "-"]) == 0
    assert "1 sequence …" in capsys.readouterr().err
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_defaults_are_those_that_fit(small_size: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kind"], row["context"]) for row in rows[:2]] == [("prefill", 512), ("decode", 512)]
    assert [row["num_tokens"] for row in rows[2:]] == [1, 4, 16]


def test_ctrl_c_keeps_what_is_done(small_size: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = small_size()

    class Interrupting(FakeBackend):
        def __init__(self, config: Gemma2Config) -> None:
            super().__init__(config)
            self.interrupt_at = 12

    def make(packed: Any, **_: Any) -> FakeBackend:
        made.append(Interrupting(packed.config))
        made[-1].isa = "scalar"
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma2.cpu.CpuBackend", make)
        options = ["--prefill", "40", "--context", "50", "--batch", "1", "--json", "-"]
        assert main(["bench", *options]) == 130
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["kind"] for row in rows] == ["prefill"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill", "4096"], "reads up to 2048 tokens, but --prefill asks for 4096"),
        (["--context", "2040"], "reads up to 2048 tokens, but --context asks for 2040 and 24 steps"),
        (["--isa", "foo"], "--isa must be an instruction set of this processor, "),
        (["--json", "/nosuch/x.json"], "--json /nosuch/x.json: there is no folder /nosuch"),
        (["--json", "/"], "--json /: is a folder"),
        (["--prefill", "none", "--context", "none", "--batch", "none"], "so there is nothing to measure"),
        (["--decode-steps", "0"], "--decode-steps must be at least 1, but is 0"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, small_size: Any, capsys: Any) -> None:
    assert main(["bench", *options]) == 1
    (error,) = capsys.readouterr().err.splitlines()  # and no "random weights …", which take minutes
    assert error.startswith("gemma2: error: ") and message in error


@pytest.mark.parametrize("weights", ["q4", "bfloat16"])
def test_the_engine_itself(weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gemma2.cli.bench.PRESETS", {"2b": SMALL})
    monkeypatch.setattr("gemma2.cli.bench_machine._READ_SECONDS", 0.01)
    monkeypatch.setattr("gemma2.cli.bench_machine._DOT_SECONDS", 0.01)
    options = ["--weights", weights, "--prefill", "300", "--context", "300,600", "--batch", "2", "--decode-steps", "2"]
    assert main(["bench", *options, "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in values["rows"]] == ["prefill", "decode", "decode", "batch"]
    assert values["kv_cache"] == "bfloat16"
    assert main(["bench", *options, "--isa", "sse9"]) == 1
    assert "--isa must be an instruction set of this processor" in capsys.readouterr().err


def test_a_model_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gemma2._kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gemma2.cli.bench_machine._READ_SECONDS", 0.01)
    monkeypatch.setattr("gemma2.cli.bench_machine._DOT_SECONDS", 0.01)
    monkeypatch.setattr("gemma2.cli.bench_first_token._STARTS", 1)
    options = ["--prefill", "64", "--context", "none", "--batch", "none", "--first-token", "--json", "-"]
    assert main(["bench", "--model", str(BUNDLED_FOLDER), "--weights", "q8", *options]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["weights"] == "q8" and values["rows"][0]["tokens_per_second"] > 0
    assert values["first_token"]["prompt_tokens"] in (31, 32, 33)
    assert 0 < values["first_token"]["median_seconds"] < 60


def test_a_second_plane_is_not_counted_as_read(small_size: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prefill", "none", "--context", "40", "--batch", "none", "--decode-steps", "2", "--json", "-"]
    reports = []
    for plane in (["--one-plane"], []):
        assert main(["bench", *options, *plane]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    without, with_plane = reports
    assert with_plane["weight_bytes"] == without["weight_bytes"]
    assert with_plane["rows"][0]["bytes_read"] == without["rows"][0]["bytes_read"]
    assert (without["second_plane_bytes"], with_plane["second_plane_bytes"]) == (0, 320 * 64 * 17 // 32)
    assert main(["bench", "--one-plane", "--weights", "q8"]) == 1
    assert "--one-plane goes with random weights in q4" in capsys.readouterr().err


def test_the_first_token_is_timed_to_the_first_line() -> None:
    program = "import time; time.sleep(0.2); print('{\"usage\": {}}', flush=True); time.sleep(0.5)"
    begin = time.perf_counter()
    seconds, answer = bench_first_token._start([sys.executable, "-c", program], os.environ)
    whole = time.perf_counter() - begin
    assert answer == {"usage": {}}
    assert 0.2 <= seconds < whole - 0.4  # what the process does after its first line is not counted


def test_a_program_that_fails_before_its_first_token_is_quoted() -> None:
    program = "import sys; sys.exit('gemma2: error: no such model')"
    with pytest.raises(Gemma2Error, match="did not come to a first token: gemma2: error: no such model"):
        bench_first_token._start([sys.executable, "-c", program], os.environ)


def test_a_first_token_needs_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--first-token"]) == 1
    assert "name a --model" in capsys.readouterr().err


def test_lists_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "", "5,,6", "-3", "x"):
        with pytest.raises(SystemExit) as exit_:
            main(["bench", f"--prefill={text}"])
        assert exit_.value.code == 2
        assert "whole numbers from 1" in capsys.readouterr().err


def test_too_large_a_model_is_refused_before_anything_is_made(
    small_size: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma2.cli.machine import Place

    place = Place(name="this machine", total_bytes=10**9, free_bytes=10**6)
    monkeypatch.setattr("gemma2.cli.machine.main_memory", lambda: place)
    assert main(["bench", "--prefill", "40"]) == 1
    assert "of memory, but this machine has 977 KiB free; choose smaller" in capsys.readouterr().err
    assert small_size() == []
