"""Draws the pictures of docs/ from the code that they show; writes PNG files to docs/pictures.

    python docs/draw_pictures.py            all of them
    python docs/draw_pictures.py masks gqa  some of them

Each picture has two functions: one that asks gemma2 for what is drawn, one that draws it. No mask, curve or size is
worked out here a second time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from gemma2.config import PRESETS, Gemma2Config
from gemma2.model.attention import AttentionPlan, plan_attention
from gemma2.model.kv_cache import KVCache
from gemma2.model.modeling import Gemma2Attention, Gemma2DecoderLayer, Gemma2Model, PassContext, soft_cap

FOLDER: Final = Path(__file__).resolve().parent / "pictures"
WIDTH_INCHES: Final = 9.0
DPI: Final = 160

LOCAL, GLOBAL = "#2f6fb7", "#c8641b"
INK, FAINT, GRID = "#222222", "#767676", "#d9d9d9"
MASKED, SKIPPED = "#e4e4e4", "#ffffff"

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


# -- masks -----------------------------------------------------------------------------------------------------------

WINDOW: Final = 4
NUM_TOKENS: Final = 12
QUERY_BLOCK: Final = 4
FIRST_CHUNK: Final = 7
DOCUMENT_LENGTHS: Final = (5, 7)

NOT_COMPUTED, NOT_SEEN, SEEN = 0, 1, 2


def whole_pass(*, local: bool) -> tuple[Ints, Ints, Ints]:
    """One pass over all tokens: query positions, key positions, and what each query does with each key."""
    positions = torch.arange(NUM_TOKENS)[None]
    plan = _plan(positions, None, positions, None, local=local)
    return _as_matrix(plan, positions, positions)


def second_chunk(*, local: bool) -> tuple[Ints, Ints, Ints]:
    """The second pass of a prefill in two chunks: its keys are what the cache kept of the first, and its own."""
    config = _small_config()
    cache = KVCache(config)
    token_ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64)
    with torch.no_grad():
        Gemma2Model(config, dtype=torch.float32, device="cpu")(token_ids[:, :FIRST_CHUNK], past_key_values=cache)
    context = PassContext.prepare(config, token_ids[:, FIRST_CHUNK:], None, None, cache)
    keys, _ = cache.key_positions(local=local)
    plan = _plan(context.position_ids_BL, None, keys, None, local=local)
    return _as_matrix(plan, context.position_ids_BL, keys)


def packed_documents(*, local: bool) -> tuple[Ints, Ints, Ints]:
    """Two documents in one row; their positions begin at 0 each."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])[None]
    segments = torch.cat([torch.full((length,), number) for number, length in enumerate(DOCUMENT_LENGTHS, 1)])[None]
    plan = _plan(positions, segments, positions, segments, local=local)
    return _as_matrix(plan, positions, positions)


def _small_config() -> Gemma2Config:
    return PRESETS["2b"].replace(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=16,
        sliding_window=WINDOW,
    )


def _plan(
    positions_BL: torch.Tensor,
    segments_BL: torch.Tensor | None,
    keys_BS: torch.Tensor,
    key_segments_BS: torch.Tensor | None,
    *,
    local: bool,
) -> AttentionPlan:
    return plan_attention(
        position_ids_BL=positions_BL,
        segment_ids_BL=segments_BL,
        key_position_ids_BS=keys_BS,
        key_segment_ids_BS=key_segments_BS,
        window=WINDOW if local else None,
        has_gaps=False,
        query_block=QUERY_BLOCK,
    )


def _as_matrix(plan: AttentionPlan, positions_BL: torch.Tensor, keys_BS: torch.Tensor) -> tuple[Ints, Ints, Ints]:
    matrix = np.full((positions_BL.shape[1], keys_BS.shape[1]), NOT_COMPUTED)
    for block in plan.blocks:
        seen = True if block.mask_BLS is None else block.mask_BLS[0].numpy()
        matrix[block.first_query : block.last_query, block.first_key : block.last_key] = np.where(seen, SEEN, NOT_SEEN)
    return positions_BL[0].numpy(), keys_BS[0].numpy(), matrix


def draw_masks(figure: Figure) -> None:
    """Local and global masks: one pass, the second chunk of a prefill, and two packed documents."""
    figure.set_size_inches(WIDTH_INCHES, 6.4)
    columns: list[tuple[str, Callable[..., tuple[Ints, Ints, Ints]]]] = [
        (f"{NUM_TOKENS} tokens in one pass", whole_pass),
        (f"second chunk of a prefill, after {FIRST_CHUNK} tokens", second_chunk),
        (f"two documents packed ({DOCUMENT_LENGTHS[0]} + {DOCUMENT_LENGTHS[1]} tokens)", packed_documents),
    ]
    grid = figure.subplots(2, len(columns))
    figure.subplots_adjust(left=0.085, right=0.99, top=0.945, bottom=0.125, wspace=0.16, hspace=0.16)
    for row, (local, color) in enumerate(((True, LOCAL), (False, GLOBAL))):
        for column, (title, ask) in enumerate(columns):
            axes: Axes = grid[row, column]
            _draw_mask(axes, *ask(local=local), color=color)
            if row == 0:
                place = axes.get_position(original=True)
                figure.text((place.x0 + place.x1) / 2, 0.965, title, ha="center", fontsize=9.5, color=INK)
            else:
                axes.set_xlabel("key: position", fontsize=9, color=FAINT)
        name = f"local layer (window {WINDOW})" if local else "global layer"
        grid[row, 0].set_ylabel(f"{name}\nquery: position", fontsize=10, color=color, labelpad=6)
    handles = [
        Patch(facecolor=LOCAL, label="seen, local layer"),
        Patch(facecolor=GLOBAL, label="seen, global layer"),
        Patch(facecolor=MASKED, label="score computed, then masked"),
        Patch(facecolor=SKIPPED, edgecolor=GRID, label="never computed"),
        Patch(facecolor=SKIPPED, edgecolor=GRID, hatch="////", label="no longer in the cache"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=5, frameon=False, fontsize=9, handlelength=1.3)


def _draw_mask(axes: Axes, positions: Ints, keys: Ints, matrix: Ints, *, color: str) -> None:
    num_queries, num_keys = matrix.shape
    axes.set_anchor("S")  # so that the queries of a second chunk stand level with those of the whole pass
    # Columns stand at the right, so that a key has one place in all panels of a column; what is left of them is gone.
    num_dropped = NUM_TOKENS - num_keys
    axes.imshow(
        matrix,
        cmap=ListedColormap([SKIPPED, MASKED, color]),
        vmin=NOT_COMPUTED,
        vmax=SEEN,
        extent=(num_dropped, NUM_TOKENS, num_queries, 0),
        interpolation="nearest",
    )
    if num_dropped:
        dropped = Rectangle((0, 0), num_dropped, num_queries, facecolor="white", edgecolor=GRID, hatch="////", lw=0)
        axes.add_patch(dropped)
    for line in range(NUM_TOKENS + 1):
        axes.plot([line, line], [0, num_queries], color=GRID if line < num_dropped else "white", lw=0.9)
    for line in range(num_queries + 1):
        axes.plot([num_dropped, NUM_TOKENS], [line, line], color="white", lw=0.9)
    all_keys = [*range(num_dropped), *keys.tolist()]
    axes.set_xticks(np.arange(NUM_TOKENS) + 0.5, [str(key) for key in all_keys], fontsize=8)
    axes.set_yticks(np.arange(num_queries) + 0.5, [str(position) for position in positions], fontsize=8)
    axes.tick_params(length=0, colors=FAINT, pad=2)
    axes.set_xlim(0, NUM_TOKENS)
    axes.set_ylim(num_queries, 0)
    for spine in axes.spines.values():
        spine.set_color(GRID)


# -- soft cap --------------------------------------------------------------------------------------------------------


def cap_curve(cap: float, values: Floats) -> tuple[Floats, Floats]:
    """The soft cap of some values, and its derivative by autograd."""
    x = torch.tensor(values, requires_grad=True)
    y = soft_cap(x, cap)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    return y.detach().numpy(), derivative.numpy()


def draw_soft_cap(figure: Figure) -> None:
    """Both caps beside the identity, and their derivatives."""
    figure.set_size_inches(WIDTH_INCHES, 5.2)
    config = PRESETS["2b"]
    assert config.attn_logit_softcapping is not None and config.final_logit_softcapping is not None
    panels = [
        ("attention scores", config.attn_logit_softcapping, LOCAL),
        ("output logits", config.final_logit_softcapping, GLOBAL),
    ]
    grid = figure.subplots(2, 2, height_ratios=[2.4, 1], sharex="col")
    figure.subplots_adjust(left=0.07, right=0.985, top=0.93, bottom=0.095, wspace=0.13, hspace=0.12)
    for column, (title, cap, color) in enumerate(panels):
        x = np.linspace(-3 * cap, 3 * cap, 601)
        y, derivative = cap_curve(cap, x)
        top, bottom = grid[0, column], grid[1, column]
        top.axhline(cap, color=GRID, lw=1)
        top.axhline(-cap, color=GRID, lw=1)
        top.plot(x, x, color=FAINT, lw=1.2, ls=(0, (4, 3)), label="no cap")
        top.plot(x, y, color=color, lw=2.2, label=f"{cap:g} · tanh(x / {cap:g})")
        top.set_ylim(-1.6 * cap, 1.6 * cap)
        top.set_title(f"{title}: cap {cap:g}", fontsize=11, color=INK)
        top.set_yticks([-cap, -cap / 2, 0, cap / 2, cap])
        at = np.array([0.2, 1.0, 1.6]) * cap
        for x_marked, y_marked in zip(at, cap_curve(cap, at)[0], strict=True):
            top.plot(x_marked, y_marked, "o", color=color, ms=4.5)
            top.annotate(
                f"{x_marked:g} → {y_marked:.2f}",
                (x_marked, y_marked),
                xytext=(6, -13),
                textcoords="offset points",
                fontsize=9,
                color=INK,
            )
        top.legend(frameon=False, fontsize=9.5, loc="upper left")
        bottom.plot(x, derivative, color=color, lw=2.2)
        bottom.set_ylim(0, 1.08)
        bottom.set_yticks([0, 0.5, 1])
        bottom.set_xticks(np.arange(-3, 4) * cap)
        bottom.set_xlim(-3 * cap, 3 * cap)
        bottom.set_xlabel("x, before the cap", fontsize=9.5, color=FAINT)
        for axes in (top, bottom):
            _plain(axes)
    grid[0, 0].set_ylabel("after the cap", fontsize=9.5, color=FAINT)
    grid[1, 0].set_ylabel("derivative", fontsize=9.5, color=FAINT)


def _plain(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=FAINT, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


# -- KV cache --------------------------------------------------------------------------------------------------------


def cache_mebibytes(config: Gemma2Config, num_tokens: Sequence[int], *, bounded: bool) -> Floats:
    """Size of one sequence's KV cache in bf16, in MiB."""
    return np.array([config.kv_cache_bytes(num, bounded=bounded) for num in num_tokens]) / 2**20


def draw_kv_cache(figure: Figure) -> None:
    """Memory of one sequence's cache against its length, for the three sizes."""
    figure.set_size_inches(WIDTH_INCHES, 3.9)
    row = figure.subplots(1, len(PRESETS), sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.90, bottom=0.155, wspace=0.08)
    for axes, (name, config) in zip(row, PRESETS.items(), strict=True):
        longest = config.max_position_embeddings
        tokens = np.linspace(0, longest, 257).astype(int)
        whole = cache_mebibytes(config, tokens.tolist(), bounded=False)
        bounded = cache_mebibytes(config, tokens.tolist(), bounded=True)
        axes.fill_between(tokens, bounded, whole, color=LOCAL, alpha=0.10, lw=0)
        axes.plot(tokens, whole, color=FAINT, lw=1.6, ls=(0, (4, 3)), label="all layers whole")
        axes.plot(tokens, bounded, color=LOCAL, lw=2.2, label="local layers bounded")
        axes.axvline(config.sliding_window, color=GRID, lw=1)
        axes.text(
            config.sliding_window - 130, 3230, f"window {config.sliding_window}", ha="right", fontsize=8.5, color=FAINT
        )
        for values, color, offset in ((whole, FAINT, 8), (bounded, LOCAL, -24)):
            axes.plot(longest, values[-1], "o", color=color, ms=4.5, clip_on=False)
            axes.annotate(
                f"{values[-1]:,.0f}",
                (longest, values[-1]),
                xytext=(2, offset),
                textcoords="offset points",
                ha="right",
                fontsize=10,
                color=color,
            )
        axes.set_title(
            f"{name.upper()}: {config.num_hidden_layers} layers, {config.num_key_value_heads} KV heads "
            f"of {config.head_dim}",
            fontsize=9.5,
            color=INK,
        )
        axes.set_xlim(0, longest * 1.03)
        axes.set_ylim(0, 3400)
        axes.set_xticks(range(0, longest + 1, 2048))
        axes.set_xlabel("tokens in the sequence", fontsize=9.5, color=FAINT)
        _plain(axes)
    row[0].legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(0.0, 0.9))
    row[0].set_ylabel("KV cache in bf16, MiB", fontsize=9.5, color=FAINT)


# -- one layer -------------------------------------------------------------------------------------------------------


def layer_modules(config: Gemma2Config) -> dict[str, str]:
    """The modules of one layer by name, each with "inputs → outputs" if it is a linear map."""
    layer = Gemma2DecoderLayer(config, 0, dtype=torch.float32, device="meta")
    return {
        name: f"{module.in_features} → {module.out_features}" if isinstance(module, torch.nn.Linear) else ""
        for name, module in layer.named_modules()
        if name
    }


def draw_layer(figure: Figure) -> None:
    """One layer: the residual stream, what is added to it, and the four norms; beside it the two parts' insides."""
    figure.set_size_inches(WIDTH_INCHES, 7.4)
    config = PRESETS["2b"]
    sizes = layer_modules(config)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, 90)
    axes.set_ylim(0, 74)
    axes.axis("off")
    page = _Page(axes, sizes)

    stream, branch = 5.0, 22.0
    page.text(stream, 1.6, "x, from the layer before", color=FAINT, ha="left")
    page.arrow((stream, 3.2), (stream, 71.0))
    page.text(stream, 72.2, "x, to the layer after", color=FAINT, ha="left")
    page.text(2.6, 37.0, "residual stream", color=FAINT, rotation=90)
    rows = {
        "input_layernorm": 9.0,
        "self_attn": 17.5,
        "post_attention_layernorm": 26.0,
        "pre_feedforward_layernorm": 41.0,
        "mlp": 49.5,
        "post_feedforward_layernorm": 58.0,
    }
    for first, part, last in (tuple(rows)[:3], tuple(rows)[3:]):
        leaves, joins = rows[first] - 4.5, rows[last] + 4.8
        page.line([(stream, leaves), (branch, leaves)])
        page.arrow((branch, leaves), (branch, rows[first] - 2.1))
        page.box(first, branch, rows[first], color="#eeeeee")
        page.arrow((branch, rows[first] + 2.1), (branch, rows[part] - 2.1))
        page.box(part, branch, rows[part], color="#d8e6f5" if part == "self_attn" else "#f9e3d2")
        page.arrow((branch, rows[part] + 2.1), (branch, rows[last] - 2.1))
        page.box(last, branch, rows[last], color="#eeeeee")
        page.line([(branch, rows[last] + 2.1), (branch, joins)])
        page.arrow((branch, joins), (stream + 1.35, joins))
        page.plus(stream, joins)

    # Inside self_attn
    page.frame(40, 3.5, 48, 34.0, "self_attn", color=LOCAL)
    q, k, v = 50.0, 65.0, 80.0
    page.line([(q, 6.4), (v, 6.4)])
    for x, name in ((q, "self_attn.q_proj"), (k, "self_attn.k_proj"), (v, "self_attn.v_proj")):
        page.arrow((x, 6.4), (x, 8.0))
        page.box(name, x, 10.3, width=12.6, height=4.4, show_size=True)
    for x in (q, k):
        page.arrow((x, 12.5), (x, 14.3))
        page.step(x, 15.9, "RoPE", width=12.6)
    page.arrow((q, 17.4), (q, 20.4))
    page.line([(k, 17.4), (k, 22.0)])
    page.arrow((k, 22.0), (q + 7.6, 22.0))
    page.step(q, 22.0, f"q · k ÷ √{config.query_pre_attn_scalar:g}", width=15.0)
    page.arrow((q, 23.5), (q, 25.0))
    page.step(q, 26.6, f"cap {config.attn_logit_softcapping:g}, mask, softmax", width=15.0)
    page.arrow((q + 7.5, 26.6), (k - 4.6, 26.6))
    page.line([(v, 12.5), (v, 26.6)])
    page.arrow((v, 26.6), (k + 4.6, 26.6))
    page.step(k, 26.6, "weights · v", width=9.0)
    page.arrow((k, 28.1), (k, 29.8))
    page.box("self_attn.o_proj", k, 32.0, width=12.6, height=4.4, show_size=True)

    # Inside mlp
    page.frame(40, 42.5, 48, 26.5, "mlp", color=GLOBAL)
    gate, up = 54.0, 76.0
    page.line([(gate, 45.4), (up, 45.4)])
    for x, name in ((gate, "mlp.gate_proj"), (up, "mlp.up_proj")):
        page.arrow((x, 45.4), (x, 47.0))
        page.box(name, x, 49.3, width=15.0, height=4.4, show_size=True)
    page.arrow((gate, 51.5), (gate, 53.2))
    page.step(gate, 54.8, "GELU, tanh form", width=15.0)
    page.line([(gate, 56.3), (gate, 59.0)])
    page.arrow((gate, 59.0), (63.6, 59.0))
    page.line([(up, 51.5), (up, 59.0)])
    page.arrow((up, 59.0), (66.4, 59.0))
    page.plus(65.0, 59.0, sign="×")
    page.arrow((65.0, 60.4), (65.0, 61.9))
    page.box("mlp.down_proj", 65.0, 64.1, width=15.0, height=4.4, show_size=True)
    page.text(89.0, 72.2, "names: modules of gemma2.model; sizes: 2B", color=FAINT, ha="right", size=8.5)


class _Page:
    """Boxes, arrows and words on one axes; a box must bear the name of a module."""

    def __init__(self, axes: Axes, sizes: dict[str, str]) -> None:
        self._axes = axes
        self._sizes = sizes

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        size = options.pop("size", 9.5)
        self._axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK, **options})

    def box(
        self,
        name: str,
        x: float,
        y: float,
        *,
        width: float = 27.0,
        height: float = 4.2,
        color: str = "#f4f4f4",
        show_size: bool = False,
    ) -> None:
        size = self._sizes[name]
        self._rounded(x, y, width, height, color)
        label = name.rpartition(".")[2]
        if show_size:
            self.text(x, y + 0.85, label, family="monospace", size=9)
            self.text(x, y - 1.1, size, color=FAINT, size=8)
        else:
            self.text(x, y, label, family="monospace", size=9)

    def step(self, x: float, y: float, label: str, *, width: float) -> None:
        self._rounded(x, y, width, 3.0, "white")
        self.text(x, y, label, size=8.5)

    def _rounded(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self._axes.add_patch(
            FancyBboxPatch(
                (x - width / 2 + 0.5, y - height / 2 + 0.5),
                width - 1,
                height - 1,
                boxstyle="round,pad=0.5",
                facecolor=color,
                edgecolor="#8a8a8a",
                lw=0.9,
                zorder=3,
            )
        )

    def frame(self, x: float, y: float, width: float, height: float, name: str, *, color: str) -> None:
        assert name in self._sizes
        self._axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=color, lw=1.2))
        self.text(x + 1.0, y + height - 1.5, f"inside {name}", color=color, ha="left", size=9.5, weight="bold")

    def line(self, points: list[tuple[float, float]]) -> None:
        self._axes.plot(*zip(*points, strict=True), color=INK, lw=1.2, solid_capstyle="round", zorder=2)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self._axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=9, color=INK, lw=1.2, shrinkA=0, shrinkB=0, zorder=2
            )
        )

    def plus(self, x: float, y: float, *, sign: str = "+") -> None:
        self._axes.add_patch(Circle((x, y), 1.35, facecolor="white", edgecolor=INK, lw=1.2, zorder=4))
        self.text(x, y - 0.05, sign, size=12, zorder=5)


# -- grouped queries -------------------------------------------------------------------------------------------------


def shared_heads(config: Gemma2Config) -> list[int]:
    """Which key/value head each query head uses, found by silencing one head of q, k or v at a time.

    The heads are made two channels wide, so that this takes no memory; which head meets which does not depend on it.
    """
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    small = config.replace(hidden_size=2 * num_heads, head_dim=2, vocab_size=16)
    attention = Gemma2Attention(small, 0, dtype=torch.float32, device="cpu")
    context = PassContext.prepare(small, torch.zeros((1, 3), dtype=torch.int64), None, None, None)
    rope = attention.rotary_emb(context.position_ids_BL)
    x_BLD = torch.randn(1, 3, small.hidden_size)

    def heads_that_change(projection: torch.nn.Linear, head: int) -> list[int]:
        before = attention(x_BLD, rope, context)
        rows = projection.weight[2 * head : 2 * head + 2]
        kept = rows.clone()
        rows.zero_()
        change = attention(x_BLD, rope, context) - before
        rows.copy_(kept)
        largest = change.view(3, num_heads, 2).abs().amax(dim=(0, 2))
        return torch.nonzero(largest > 1e-6).flatten().tolist()

    uses = [-1] * num_heads
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(2 * num_heads))
        for head in range(num_heads):
            assert heads_that_change(attention.q_proj, head) == [head]
        for kv_head in range(num_kv_heads):
            heads = heads_that_change(attention.v_proj, kv_head)
            assert heads == heads_that_change(attention.k_proj, kv_head)
            for head in heads:
                assert uses[head] == -1, "a query head uses one key/value head"
                uses[head] = kv_head
    return uses


def draw_gqa(figure: Figure) -> None:
    """Query heads above, the key/value heads that they share below, for the three sizes."""
    figure.set_size_inches(WIDTH_INCHES, 4.7)
    column = figure.subplots(len(PRESETS), 1)
    figure.subplots_adjust(left=0.115, right=0.99, top=0.955, bottom=0.02, hspace=0.28)
    most = max(config.num_attention_heads for config in PRESETS.values())
    for axes, (name, config) in zip(column, PRESETS.items(), strict=True):
        uses = shared_heads(config)
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        pitch = min(1.6, most / num_heads)
        group = num_heads / num_kv_heads
        kv_places = [(kv_head + 0.5) * group * pitch for kv_head in range(num_kv_heads)]
        for head, kv_head in enumerate(uses):
            x = (head + 0.5) * pitch
            axes.plot([x, kv_places[kv_head]], [2.0, 0.62], color="#9a9a9a", lw=1.1, zorder=1)
            _head(axes, x, 2.0, str(head), "#f9e3d2", GLOBAL)
        for kv_head, x in enumerate(kv_places):
            _head(axes, x, 0.55, str(kv_head), "#d8e6f5", LOCAL)
        axes.text(-0.4, 2.0, "query head", ha="right", va="center", fontsize=9.5, color=GLOBAL)
        axes.text(-0.4, 0.55, "KV head", ha="right", va="center", fontsize=9.5, color=LOCAL)
        axes.set_title(
            f"{name.upper()}: {num_heads} query heads, {num_kv_heads} key/value heads of {config.head_dim}",
            fontsize=10.5,
            color=INK,
            loc="left",
            pad=3,
        )
        axes.set_xlim(0, most)
        axes.set_ylim(-0.05, 2.6)
        axes.axis("off")


def _head(axes: Axes, x: float, y: float, label: str, face: str, edge: str) -> None:
    axes.plot(x, y, "o", ms=15.5, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=1.1, zorder=2)
    axes.text(x, y - 0.02, label, ha="center", va="center", fontsize=8, color=INK, zorder=3)


# -- all -------------------------------------------------------------------------------------------------------------

PICTURES: Final[dict[str, Callable[[Figure], None]]] = {
    "masks": draw_masks,
    "soft_cap": draw_soft_cap,
    "kv_cache": draw_kv_cache,
    "layer": draw_layer,
    "gqa": draw_gqa,
}


def draw(name: str, folder: Path = FOLDER, *, dpi: int = DPI) -> Path:
    """Draws one picture and returns its file."""
    figure = Figure(facecolor="white")
    FigureCanvasAgg(figure)
    PICTURES[name](figure)
    path = folder / f"{name}.png"
    # Without matplotlib's own version in the file, drawing again with the same code changes nothing.
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    return path


def main(names: Sequence[str]) -> None:
    """Draws the pictures that are named, or all."""
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        sys.exit(f"there is no picture {unknown[0]!r}; they are {', '.join(PICTURES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        path = draw(name)
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main(sys.argv[1:])
