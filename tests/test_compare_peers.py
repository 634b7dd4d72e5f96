"""benchmarks/compare_peers.py: turns, medians, ratios and the table; no peer is started."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gemma2._kernels")
peer_runs = pytest.importorskip("peer_runs")  # not in a source distribution
compare_peers = pytest.importorskip("compare_peers")
COMPARISONS, Run, RunFailedError = compare_peers.COMPARISONS, peer_runs.Run, peer_runs.RunFailedError


class FakeMachine:
    def __init__(self) -> None:
        self.num_measured = 0

    def ceilings(self) -> Any:
        self.num_measured += 1
        return SimpleNamespace(read=41e9, read_best=42e9, dot=900e9, dot_best=910e9)


def test_sides_take_turns_and_medians_are_compared() -> None:
    order = []
    speeds = {"ours": [30.0, 10.0, 20.0], "theirs": [1.0, 5.0, 4.0]}

    def run(name: str) -> Any:
        def action() -> dict[str, float]:
            order.append(name)
            return {"prefill": speeds[name].pop(0)}

        return Run(name=name, side=name, action=action)

    machine = FakeMachine()
    sitting = compare_peers.measure({"group": [run("ours"), run("theirs")]}, 3, machine)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert machine.num_measured == 7  # before each run and at the end
    line = compare_peers.compare(
        compare_peers.Comparison(
            row="r", group="group", title="t", ours="prefill", theirs="theirs", asked=lambda _: 4.9
        ),
        "ours",
        sitting,
    )
    assert (line["ours"], line["theirs"], line["ratio"], line["is_reached"]) == (20.0, 4.0, 5.0, True)


def test_a_run_that_fails_or_misses_its_files_is_said_in_the_table() -> None:
    def fail() -> dict[str, float]:
        raise RunFailedError("no such | file")

    runs = [
        Run(name="ours", side="ours", action=lambda: {"decode": 12.0}),
        Run(name="llama.cpp Q4_0 512", side="llama.cpp", action=fail),
        Run(name="OpenVINO int4 512", side="OpenVINO", action=fail, missing="--openvino-python"),
    ]
    sitting = compare_peers.measure({"512": runs}, 2, FakeMachine())
    assert len(sitting.figures["ours"]) == 2
    lines = [compare_peers.compare(c, "ours", sitting) for c in COMPARISONS if c.row == "decode-512" and c.theirs]
    table = compare_peers.markdown(lines, sitting, 2)
    assert "| decode, context 512, q4, against llama.cpp Q4_0 | 12.0 tok/s |  |  |  | no such / file |" in table
    assert "needs --openvino-python |" in table


def test_bounds_above_and_below() -> None:
    sitting = compare_peers.Sitting(started="2026-01-01T00:00:00+00:00")
    sitting.ceilings.append({"read": 41e9, "dot": 900e9})
    sitting.figures = {
        "ours": [{"first token": 0.5, "peak MB": 310.0, "prefill of dot": 0.72}],
        "llama.cpp first token": [{"first token": 1.25}],
    }
    rows = {c.title: compare_peers.compare(c, "ours", sitting) for c in COMPARISONS}
    reached = {title.split(",")[0]: line["is_reached"] for title, line in rows.items() if "is_reached" in line}
    assert reached == {"process start to first token": True, "peak memory beside weights": False, "prefill": True}
    table = compare_peers.markdown([line for line in rows.values() if "is_reached" in line], sitting, 1)
    assert "| 0.50 s | 1.25 s | 0.40 × | at most 0.5 × | yes |" in table
    assert "| 310 MB |  |  | at most 300 MB | **no** |" in table
    assert "| 0.72 |  |  | at least 0.72 | yes |" in table


@pytest.mark.parametrize(("read", "asked"), [(20, 1.4), (41, 1.4), (60.5, 1.7), (80, 2.0), (300, 2.0)])
def test_what_is_asked_of_decode_grows_with_memory(read: float, asked: float) -> None:
    assert compare_peers._by_memory({"read GB/s": read}) == pytest.approx(asked)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("x: prefill 8.5 tok/s, decode 1.7 tok/s\nx: prefill 296.0 tok/s, decode 20.1 tok/s", (296.0, 20.1)),
        ("noise\nf: 16 sequences, 80.1 tok/s in all", 80.1),
    ],
)
def test_what_peers_print_is_read(text: str, figures: Any) -> None:
    result = peer_runs.run_peer([sys.executable, "-c", f"print({text!r})"])
    assert result == ({"batch": figures} if isinstance(figures, float) else dict(zip(("prefill", "decode"), figures)))  # noqa: B905


def test_what_peers_say_when_they_fail_is_passed_on() -> None:
    with pytest.raises(RunFailedError, match="no model"):
        peer_runs.run_peer([sys.executable, "-c", "import sys; sys.exit('loading\\nno model')"])
    with pytest.raises(RunFailedError, match="no figures in 'hello'"):
        peer_runs.run_peer([sys.executable, "-c", "print('hello')"])
    with pytest.raises(RunFailedError, match="before the first token"):
        peer_runs.time_to_first_line([sys.executable, "-c", "raise SystemExit(3)"], 2)


def test_every_row_has_its_runs() -> None:
    options = dict.fromkeys(
        [
            "model_q4",
            "model_q8",
            "peers_scripts",
            "llama_python",
            "gguf_q4",
            "gguf_q8",
            "openvino_python",
            "openvino_model",
        ]
    )
    groups = peer_runs.make_runs(SimpleNamespace(**options))
    for comparison in COMPARISONS:
        runs = groups[comparison.group]
        assert runs[0].side == "ours"
        assert not comparison.theirs or comparison.theirs in [run.name for run in runs]
    missing = {run.name: run.missing for runs in groups.values() for run in runs if run.missing}
    assert missing["llama.cpp Q8_0 512"] == "--llama-python and --peers-scripts and --gguf-q8"
