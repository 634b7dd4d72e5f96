"""What docs/ says is so: links and names exist, excerpts are the code's lines, numbers are the code's numbers."""

from __future__ import annotations

import ast
import functools
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gemma2.cli.main import VERBS, main
from gemma2.config import PRESETS, Gemma2Config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ARCHITECTURE = DOCS / "architecture.md"
TOUR = DOCS / "tour.md"

# [`name`](file.py) says that the file defines the name.
NAMED_LINK = re.compile(r"\[`([A-Za-z_][\w.]*)`\]\(([^)#]+\.py)\)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXCERPT = re.compile(r"^```python (\S+)\n(.*?)^```$", re.M | re.S)
PATH_IN_CODE = re.compile(r"`((?:src|tests|docs|examples|scripts|benchmarks)/[^`\s]*)`")


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


# -- names -------------------------------------------------------------------------------------------------------


@functools.cache
def defined_names(file: Path) -> frozenset[str]:
    """Names that a module defines: functions, classes, constants, and `Class.member`."""
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8")).body, prefix=""))


def _names(body: list[ast.stmt], *, prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from _names(node.body, prefix=f"{prefix}{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))


def module_name(file: Path) -> str:
    if not file.is_relative_to(ROOT / "src"):
        return ""
    return ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} is not there"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading"


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_named_code_exists(page: Path) -> None:
    found = NAMED_LINK.findall(page.read_text(encoding="utf-8"))
    assert found
    for name, target in found:
        file = (page.parent / target).resolve()
        known = defined_names(file) | {module_name(file)}
        assert name in known or name == file.name, f"{page.name}: {target} does not define {name}"


def test_paths_in_code_spans_exist(page: Path) -> None:
    for path in PATH_IN_CODE.findall(page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: {path} is not there"


def test_commands_exist(page: Path) -> None:
    for verb in re.findall(r"`gemma2 ([a-z][\w-]*)", page.read_text(encoding="utf-8")):
        assert verb in VERBS, f"{page.name}: there is no verb {verb}"


def test_excerpts_are_lines_of_the_code(page: Path) -> None:
    for path, excerpt in EXCERPT.findall(page.read_text(encoding="utf-8")):
        rest = (ROOT / path).read_text(encoding="utf-8")
        # A line of "..." alone stands for lines that are left out.
        for part in re.split(r"^ *\.\.\.\n", excerpt, flags=re.M):
            before, found, rest = rest.partition(part)
            assert found, f"{page.name}: {path} does not hold, in this order:\n{part}"
            assert before.endswith("\n"), f"{page.name}: {path}: not whole lines:\n{part}"


def test_every_python_block_is_an_excerpt(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(EXCERPT.findall(text)) == len(re.findall(r"^```python", text, re.M))


def test_math_is_what_github_shows(page: Path) -> None:
    blocks = re.findall(r"\$\$\n(.*?)\n\$\$", page.read_text(encoding="utf-8"), re.S)
    for block in blocks:
        # Markdown takes a backslash before a sign away before the formula is set, and GitHub forbids \operatorname.
        assert not re.search(r"\\[^A-Za-z\s]|\\operatorname", block), block
        assert block.count("{") == block.count("}"), block
        assert block.count(r"\left") - block.count(r"\leftarrow") == block.count(r"\right"), block
    assert page.read_text(encoding="utf-8").count("$$") == 2 * len(blocks)


# -- the tour ----------------------------------------------------------------------------------------------------


def test_the_tour_has_all_rooms_in_the_order_of_the_import_rule() -> None:
    layers = re.search(r"^layers = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert layers
    package = ROOT / "src" / "gemma2"
    expected = []
    for layer in ast.literal_eval(layers[1]):
        rooms = [name.strip(" ()") for name in layer.split("|")]
        there = [
            f"{room}/" if (package / room).is_dir() else f"{room}.py"
            for room in rooms
            if (package / room / "__init__.py").exists() or (package / f"{room}.py").exists()
        ]
        if there and there != ["__main__.py"]:
            expected.append(sorted(there))
    table = TOUR.read_text(encoding="utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [sorted(re.findall(r"`([^`]+)`", row)) for row in rows] == expected


def test_the_tour_visits_every_room() -> None:
    text = TOUR.read_text(encoding="utf-8")
    for room in (ROOT / "src" / "gemma2").iterdir():
        if (room / "__init__.py").exists():
            assert re.search(rf"\]\(\.\./src/gemma2/{room.name}/", text), f"the tour shows no file of {room.name}/"


# -- the architecture's numbers ----------------------------------------------------------------------------------


def size_rows() -> list[str]:
    """The rows of the table of sizes, from the code."""
    configs = list(PRESETS.values())
    assert list(PRESETS) == ["2b", "9b", "27b"]
    kib, mib = 2**10, 2**20

    def heads(config: Gemma2Config) -> str:
        return f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}"

    columns: list[tuple[str, list[str]]] = [
        ("width D (`hidden_size`)", [f"{c.hidden_size}" for c in configs]),
        ("layers (`num_hidden_layers`)", [f"{c.num_hidden_layers}" for c in configs]),
        ("MLP width (`intermediate_size`; the report prints twice this)", [f"{c.intermediate_size}" for c in configs]),
        ("query heads N, key/value heads K, head size H", [heads(c) for c in configs]),
        ("`query_pre_attn_scalar`", [f"{c.query_pre_attn_scalar:g}" for c in configs]),
        ("embedding parameters, 256,000 rows", [f"{c.count_parameters().embedding:,}" for c in configs]),
        (
            "embedding parameters, the report's 256,128 rows",
            [f"{c.count_parameters(vocab_size=256_128).embedding:,}" for c in configs],
        ),
        ("parameters outside the embedding", [f"{c.count_parameters().non_embedding:,}" for c in configs]),
        ("all parameters, 256,000 rows", [f"{c.count_parameters().total:,}" for c in configs]),
        ("KV cache of one token, bf16", [f"{c.kv_cache_bytes(1) // kib} KiB" for c in configs]),
        (
            "KV cache of 8192 tokens, all layers whole",
            [f"{c.kv_cache_bytes(8192, bounded=False) // mib} MiB" for c in configs],
        ),
        ("KV cache of 8192 tokens, local layers bounded", [f"{c.kv_cache_bytes(8192) // mib} MiB" for c in configs]),
    ]
    return [f"| {label} | {' | '.join(values)} |" for label, values in columns]


def test_the_table_of_sizes_is_the_codes() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    table = text.partition("| | 2B | 9B | 27B |\n| --- | ---: | ---: | ---: |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == size_rows()


def test_the_plans_for_many_gpus_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `gemma2 (plan [^`]*)` \| ([\d.]+) GiB \|", text, re.M)
    assert len(rows) > 5
    for command, size in rows:
        assert main([*command.split(), "--json"]) == 0
        total = json.loads(capsys.readouterr().out)["training"]["with_checkpointing"]["total"]
        assert f"{total / 2**30:.1f}" == size, command


def test_what_all_sizes_share() -> None:
    text = " ".join(ARCHITECTURE.read_text(encoding="utf-8").split())
    for config in PRESETS.values():
        assert (
            f"window {config.sliding_window}, context {config.max_position_embeddings}, "
            f"attention cap {config.attn_logit_softcapping:g}, final cap {config.final_logit_softcapping:g}, "
            f"RoPE base {config.rope_theta:g}, norm epsilon 1e-6"
        ) in text
        assert config.rms_norm_eps == 1e-6
        assert not config.is_local(config.num_hidden_layers - 1)


def test_the_embeddings_factors() -> None:
    text = " ".join(ARCHITECTURE.read_text(encoding="utf-8").split())
    exact = [config.hidden_size**0.5 for config in PRESETS.values()]
    rounded = [torch.tensor(factor, dtype=torch.bfloat16).item() for factor in exact]
    assert "{:g}, {:g} and {:g}; exact values are".format(*rounded) in text
    assert "exact values are {:.6g}, {:.6g} and {:.6g}".format(*exact) in text


def test_other_numbers() -> None:
    text = " ".join(ARCHITECTURE.read_text(encoding="utf-8").split())
    assert f"{8192 * 256_000 * 4 / 2**30:.1f} GiB" in text
    assert f"1 − tanh², is {1 - math.tanh(1) ** 2:.2f} where the score reaches the cap" in text
    assert f"its largest number is {torch.finfo(torch.float16).max:.0f}" in text
    # Neighbours of 50 in bf16, and how far rounding moves a number between them.
    fifty = torch.tensor(50.0, dtype=torch.bfloat16)
    spacing = float(torch.nextafter(fifty, fifty + 1) - fifty)
    assert f"near 50 has a spacing of {spacing:g}" in text
    assert f"would move by up to {spacing / 2:g}" in text
    assert torch.tensor(8191.0, dtype=torch.bfloat16) == torch.tensor(8192.0, dtype=torch.bfloat16)
    low, high, tiny, largest = math.exp(-50), 8192 * math.exp(50), torch.finfo(torch.float32).tiny, 3.4e38
    for number in (low, high, tiny, largest):
        mantissa, exponent = f"{number:.1e}".split("e")
        assert rf"{mantissa} \cdot 10^{{{int(exponent)}}}" in text


def test_capped_scores_need_no_maximum() -> None:
    """The claim of architecture.md, on the worst scores: float32, no maximum taken out, the keys split in two."""
    rng = np.random.default_rng(0)
    scores = (50 * np.tanh(rng.normal(0, 200, (4, 8192)) / 50)).astype(np.float32)
    scores[1], scores[2] = 50, -50
    values = rng.normal(size=(8192, 3)).astype(np.float32)
    weights = np.exp(scores)
    first, second = slice(0, 5000), slice(5000, 8192)
    numerator = weights[:, first] @ values[first] + weights[:, second] @ values[second]
    denominator = weights[:, first].sum(1) + weights[:, second].sum(1)
    expected = torch.softmax(torch.tensor(scores, dtype=torch.float64), -1) @ torch.tensor(values, dtype=torch.float64)
    np.testing.assert_allclose(numerator / denominator[:, None], expected.numpy(), rtol=1e-4, atol=2e-6)


def test_every_trap_has_its_guard() -> None:
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("## Traps")[2]
    rows = [line for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 20))
    for row in rows:
        guard = row.split("|")[3]
        tests = [(name, target) for name, target in NAMED_LINK.findall(guard) if name.startswith("test_")]
        assert tests or guard.strip().startswith("nothing here"), f"no test and no reason: {row}"


# -- pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_pictures", DOCS / "draw_pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_there_small_and_shown(pictures: ModuleType) -> None:
    shown = {}
    for page in PAGES:
        for alternative, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            shown[(page.parent / target).resolve()] = alternative
    files = {path for path in (DOCS / "pictures").iterdir() if path.suffix in (".png", ".svg")}
    assert {path.stem for path in files} >= set(pictures.PICTURES)
    for name in pictures.PICTURES:
        path = DOCS / "pictures" / f"{name}.png"
        assert path.stat().st_size < 150_000
        assert shown.get(path), f"{path.name} is embedded nowhere, or has no words for those who cannot see it"


def test_pictures_can_be_drawn(pictures: ModuleType, tmp_path: Path) -> None:
    for name in pictures.PICTURES:
        path = pictures.draw(name, tmp_path, dpi=20)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def as_rows(drawn: tuple[Any, Any, Any]) -> list[str]:
    """# where a query sees a key, . where a score is computed and masked, a space where none is."""
    return ["".join(" .#"[cell] for cell in row) for row in drawn[2].tolist()]


LOCAL_MASK = [
    "#...        ",
    "##..        ",
    "###.        ",
    "####        ",
    " ####...    ",
    " .####..    ",
    " ..####.    ",
    " ...####    ",
    "     ####...",
    "     .####..",
    "     ..####.",
    "     ...####",
]


def test_the_masks_that_are_drawn(pictures: ModuleType) -> None:
    assert as_rows(pictures.whole_pass(local=True)) == LOCAL_MASK
    whole = as_rows(pictures.whole_pass(local=False))
    assert [row.rstrip(" .") for row in whole] == ["#" * (query + 1) for query in range(12)]


@pytest.mark.parametrize("local", [True, False])
def test_a_second_chunk_sees_what_one_pass_sees(pictures: ModuleType, local: bool) -> None:
    positions, keys, _ = pictures.second_chunk(local=local)
    assert positions.tolist() == [7, 8, 9, 10, 11]
    assert keys.tolist() == list(range(4 if local else 0, 12))  # position 7 sees 4 to 7, so 0 to 3 are gone
    whole = [row.replace(".", " ") for row in as_rows(pictures.whole_pass(local=local))][7:]
    chunk = [row.replace(".", " ").rjust(12) for row in as_rows(pictures.second_chunk(local=local))]
    assert chunk == whole


@pytest.mark.parametrize("local", [True, False])
def test_packed_documents_do_not_see_each_other(pictures: ModuleType, local: bool) -> None:
    positions, _, matrix = pictures.packed_documents(local=local)
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    for query, key in itertools.product(range(12), range(12)):
        same = (query < 5) == (key < 5)
        sees = same and key <= query and (not local or query - key < 4)
        assert (matrix[query, key] == pictures.SEEN) == sees, (query, key)


def test_the_heads_that_are_drawn(pictures: ModuleType) -> None:
    for config in PRESETS.values():
        assert pictures.shared_heads(config) == [head // 2 for head in range(config.num_attention_heads)]
    multi_head = PRESETS["2b"].replace(num_key_value_heads=8)
    assert pictures.shared_heads(multi_head) == list(range(8))


def test_the_curves_that_are_drawn(pictures: ModuleType) -> None:
    x = np.array([-1000.0, -50.0, 0.0, 10.0, 50.0])
    y, derivative = pictures.cap_curve(50.0, x)
    np.testing.assert_allclose(y, 50 * np.tanh(x / 50))
    np.testing.assert_allclose(derivative, 1 - np.tanh(x / 50) ** 2, atol=1e-12)
    assert pictures.cache_mebibytes(PRESETS["2b"], [4096, 8192], bounded=True).tolist() == [416, 624]
    assert pictures.cache_mebibytes(PRESETS["2b"], [4096, 8192], bounded=False).tolist() == [416, 832]


def test_the_layer_that_is_drawn(pictures: ModuleType) -> None:
    modules = pictures.layer_modules(PRESETS["2b"])
    assert modules["self_attn.q_proj"] == "2304 → 2048"
    assert modules["mlp.down_proj"] == "9216 → 2304"
    assert [name for name in modules if name.endswith("layernorm")] == [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]
