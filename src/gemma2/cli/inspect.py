"""`gemma2 inspect`: what a model is made of."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2.cli.module_tree import module_tree
from gemma2.cli.terminal import format_bytes, heading, make_console, make_table
from gemma2.config import PRESETS, Gemma2Config
from gemma2.errors import TokenizerError

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2.checkpoints import Checkpoint, PackedFile
    from gemma2.text import Tokenizer

REPORT_ROWS = 256_128
"""Rows of the embedding that the report's table 2 counts; 128 of them are padding."""
_SAMPLE = "The quick brown fox jumps over the lazy dog."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"{', '.join(PRESETS)} (the published sizes, no files needed), a model's folder, or its name on the Hub "
        "if it was pulled; left out, the bundled model",
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and dtype")
    parser.add_argument("--json", action="store_true", help="write one JSON object, for programs")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is inspected: a published architecture, or the files of a model."""

    name: str
    config: Gemma2Config
    shapes: Mapping[str, tuple[int, ...]]
    stored: Checkpoint | PackedFile | None
    tokenizer: Tokenizer | None
    tokenizer_problem: str
    """Why a model with files has no tokenizer; empty if it has one, or has no files."""


def run(args: argparse.Namespace) -> int:
    """Prints what the model is made of."""
    subject = _find_subject(args.model)
    if args.json:
        print(json.dumps(describe(subject, with_tensors=args.tensors), indent=2, ensure_ascii=False))
        return 0
    console = make_console()
    if args.tensors:
        _print_tensors(console, subject)
        return 0
    _print_tree(console, subject)
    _print_layers(console, subject.config)
    _print_facts(console, subject.config)
    _print_parameters(console, subject)
    if subject.stored is not None:
        _print_files(console, subject, subject.stored)
        _print_tokenizer(console, subject)
    return 0


def _find_subject(name: str | None) -> Subject:
    from gemma2.checkpoints import expected_tensors, is_packed, open_checkpoint, open_packed
    from gemma2.cli.source import find_folder

    if name is not None and name in PRESETS:
        config = PRESETS[name]
        return Subject(
            name=f"Gemma 2 {name.upper()}",
            config=config,
            shapes=expected_tensors(config),
            stored=None,
            tokenizer=None,
            tokenizer_problem="",
        )
    folder = find_folder(name)
    stored = open_packed(folder) if is_packed(folder) else open_checkpoint(folder)
    tokenizer, problem = _open_tokenizer(folder, stored.config)
    return Subject(
        name=str(folder),
        config=stored.config,
        shapes=expected_tensors(stored.config),
        stored=stored,
        tokenizer=tokenizer,
        tokenizer_problem=problem,
    )


def _open_tokenizer(folder: Path, config: Gemma2Config) -> tuple[Tokenizer | None, str]:
    from gemma2.text import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.check_fits(config)
    except TokenizerError as error:
        return None, str(error)
    return tokenizer, ""


# -- for programs ---------------------------------------------------------------------------------------------------


def describe(subject: Subject, *, with_tensors: bool) -> dict[str, Any]:
    """Returns what `--json` prints."""
    config = subject.config
    count = config.count_parameters()
    report = config.count_parameters(REPORT_ROWS)
    values: dict[str, Any] = {
        "name": subject.name,
        "config": config.to_dict(),
        "parameters": {
            "embedding": count.embedding,
            "non_embedding": count.non_embedding,
            "total": count.total,
        },
        "query_scale": config.query_scale,
        "layers": [
            {"index": index, "type": layer_type, "window": config.sliding_window if config.is_local(index) else None}
            for index, layer_type in enumerate(config.layer_types)
        ],
    }
    if config in PRESETS.values():
        values["parameters_in_report"] = {
            "embedding_rows": REPORT_ROWS,
            "embedding": report.embedding,
            "non_embedding": report.non_embedding,
            "total": report.total,
        }
    stored, tokenizer = subject.stored, subject.tokenizer
    if stored is not None:
        values["files"] = [{"name": path.name, "bytes": path.stat().st_size} for path in _files(stored)]
        values["dtypes"] = dict(Counter(dtype for _, dtype in _tensors(subject).values()))
        values["tensor_bytes"] = stored.num_bytes
        values["packed"] = _packed_values(stored)
        values["tokenizer"] = None
        if tokenizer is not None:
            values["tokenizer"] = {
                "file": Path(tokenizer.source).name,
                "vocab_size": tokenizer.vocab_size,
                "pad_id": tokenizer.pad_id,
                "eos_id": tokenizer.eos_id,
                "bos_id": tokenizer.bos_id,
                "unk_id": tokenizer.unk_id,
                "stop_ids": sorted(tokenizer.stop_ids),
            }
        if subject.tokenizer_problem:
            values["tokenizer_problem"] = subject.tokenizer_problem
    if with_tensors:
        values["tensors"] = [
            {"name": name, "shape": list(shape), "dtype": dtype or None}
            for name, (shape, dtype) in _tensors(subject).items()
        ]
    return values


def _packed_values(stored: Checkpoint | PackedFile) -> dict[str, Any] | None:
    from gemma2.checkpoints import PackedFile

    if not isinstance(stored, PackedFile):
        return None
    return {"format": stored.format, "second_plane": stored.has_second_plane, "calibrated": stored.is_calibrated}


def _tensors(subject: Subject) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and dtype of each tensor as it is stored; a format where it is packed, nothing where no file is."""
    from gemma2.checkpoints import PackedFile

    stored = subject.stored
    if stored is None:
        return {name: (shape, "") for name, shape in subject.shapes.items()}
    if isinstance(stored, PackedFile):
        return {name: (shape, stored.format if len(shape) == 2 else "F32") for name, shape in stored.shapes.items()}
    return {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()}


# -- for people -----------------------------------------------------------------------------------------------------


def _print_tree(console: Console, subject: Subject) -> None:
    console.print(subject.name, style="bold")
    console.print()
    console.print(module_tree(subject.config), soft_wrap=True)


def _print_layers(console: Console, config: Gemma2Config) -> None:
    from rich.text import Text

    local = [index for index in range(config.num_hidden_layers) if config.is_local(index)]
    heading(console, "Layers")
    width = 10 * max(1, min(60, console.width - 8) // 10)
    for first in range(0, config.num_hidden_layers, width):
        indices = range(first, min(first + width, config.num_hidden_layers))
        line = Text(f"{first:>4}  ", style="dim")
        for index in indices:
            gap = " " if index > first and index % 10 == 0 else ""
            style = "cyan" if config.is_local(index) else "bold yellow"
            line.append(gap).append("L" if config.is_local(index) else "G", style=style)
        console.print(line)
    console.print(
        f"      L local: {len(local)} layers, a query sees the last {config.sliding_window:,} tokens, itself included"
    )
    console.print(
        f"      G global: {config.num_hidden_layers - len(local)} layers, a query sees all of up to "
        f"{config.max_position_embeddings:,} tokens"
    )


def _print_facts(console: Console, config: Gemma2Config) -> None:
    def cap(value: float | None) -> str:
        return "none" if value is None else f"{value:g} · tanh(x / {value:g})"

    context = config.max_position_embeddings
    bounded, whole = (format_bytes(config.kv_cache_bytes(context, bounded=bounded)) for bounded in (True, False))
    sharing = config.num_queries_per_kv
    heads = f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value heads of {config.head_dim}"
    shared = "one for each query head: multi-head attention" if sharing == 1 else f"one for {sharing} query heads"
    facts = {
        "width": f"{config.hidden_size:,}",
        "MLP width": f"{config.intermediate_size:,} (the report prints {2 * config.intermediate_size:,}: gate and up)",
        "heads": f"{heads} ({shared})",
        "query scale": f"1 / √{config.query_pre_attn_scalar:g} = {config.query_scale:.6g}",
        "cap on scores": cap(config.attn_logit_softcapping),
        "cap on logits": cap(config.final_logit_softcapping),
        "activation": "GELU, tanh approximation, gated (GeGLU)",
        "RMSNorm": f"x̂ · (1 + weight), epsilon {config.rms_norm_eps:g}",
        "RoPE": f"base {config.rope_theta:,.0f}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "vocabulary": f"{config.vocab_size:,} rows; the embedding is also the head",
        "KV cache": f"{bounded} for a whole context in bf16, local layers bounded ({whole} if they were not)",
    }
    heading(console, "Architecture")
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"  {name:<{width}}  {value}")


def _print_parameters(console: Console, subject: Subject) -> None:
    config = subject.config
    count = config.count_parameters()
    heading(console, "Parameters")
    table = make_table(console, "in a layer", "shape", "per layer", f"all {config.num_hidden_layers} layers", "share")
    layer = {name: shape for name, shape in subject.shapes.items() if name.startswith("model.layers.0.")}

    def add(name: str, shape: tuple[int, ...], copies: int, *, per_layer: bool = True) -> None:
        size = math.prod(shape)
        share = f"{100 * size * copies / count.total:.1f}%" if size * copies * 1000 > count.total else ""
        sizes = " × ".join(f"{length:,}" for length in shape)
        table.add_row(name, sizes, f"{size:,}" if per_layer else "", f"{size * copies:,}", share)

    for name, shape in layer.items():
        add(name.removeprefix("model.layers.0.").removesuffix(".weight"), shape, config.num_hidden_layers)
    add("norm (the last one)", (config.hidden_size,), 1, per_layer=False)
    table.add_section()
    share = 100 * count.non_embedding / count.total
    in_layer = (count.non_embedding - config.hidden_size) // config.num_hidden_layers
    table.add_row("outside the embedding", "", f"{in_layer:,}", f"{count.non_embedding:,}", f"{share:.1f}%")
    rows = f"{config.vocab_size:,} × {config.hidden_size:,}"
    table.add_row("embedding, which is the head", rows, "", f"{count.embedding:,}", f"{100 - share:.1f}%")
    table.add_row("total", "", "", f"{count.total:,}", "")
    console.print(table)
    if config in PRESETS.values():
        report = config.count_parameters(REPORT_ROWS)
        console.print(
            f"The report's table 2 counts {REPORT_ROWS:,} rows, of which 128 are padding: "
            f"{report.embedding:,} in the embedding and {report.non_embedding:,} outside."
        )


def _print_files(console: Console, subject: Subject, stored: Checkpoint | PackedFile) -> None:
    from gemma2.checkpoints import PackedFile, unused_packed_files

    heading(console, f"Files in {stored.folder}")
    table = make_table(console, "file", "holds", "size", left=2)
    tensors, unused = _tensors(subject), unused_packed_files(stored.folder)
    for path in _files(stored):
        if isinstance(stored, PackedFile):
            dtypes = Counter(dtype for _, dtype in tensors.values() if path == stored.file)
        else:
            dtypes = Counter(tensor.dtype for tensor in stored.tensors.values() if tensor.file == path)
        holds = ", ".join(f"{number} tensors in {dtype}" for dtype, number in dtypes.items())
        if path in unused:
            holds = "packed weights, not used beside the others"
        table.add_row(path.name, holds, format_bytes(path.stat().st_size))
    console.print(table)
    if isinstance(stored, PackedFile):
        number = "two planes" if stored.has_second_plane else "one plane"
        planes = f", the embedding in {number} of 4 bits" if stored.format == "q4" else ""
        calibrated = ", calibrated" if stored.is_calibrated else ""
        bits = 8 * stored.num_bytes / stored.config.count_parameters().total
        console.print(
            f"Packed for the CPU engine: {stored.format}{calibrated}{planes}, {bits:.2f} bits per weight in all"
        )


def _print_tokenizer(console: Console, subject: Subject) -> None:
    tokenizer = subject.tokenizer
    heading(console, "Tokenizer")
    if tokenizer is None:
        console.print(f"  none that can be used: {subject.tokenizer_problem}", style="red")
        return
    pieces = [tokenizer.id_to_piece(token_id).replace("▁", " ") for token_id in tokenizer.encode(_SAMPLE)]
    stops = ", ".join(f"{token_id} {tokenizer.id_to_piece(token_id)}" for token_id in sorted(tokenizer.stop_ids))
    spare = subject.config.vocab_size - tokenizer.vocab_size
    console.print(f"  file        {Path(tokenizer.source).name}")
    console.print(f"  vocabulary  {tokenizer.vocab_size:,} pieces" + (f", {spare:,} rows spare" if spare else ""))
    console.print(
        f"  special     pad {tokenizer.pad_id}, eos {tokenizer.eos_id}, bos {tokenizer.bos_id}, unk {tokenizer.unk_id};"
        f" an answer stops at {stops}"
    )
    console.print(f"  a sentence  {'|'.join(pieces)}  ({len(pieces)} tokens)")


def _print_tensors(console: Console, subject: Subject) -> None:
    table = make_table(console, "tensor", "shape", "dtype", left=3)
    for name, (shape, dtype) in _tensors(subject).items():
        table.add_row(name, " × ".join(map(str, shape)), dtype)
    console.print(table)


def _files(stored: Checkpoint | PackedFile) -> list[Path]:
    """The model's files: config, weights, tokenizer, and what else explains it."""
    from gemma2.checkpoints import unused_packed_files

    others = ("config.json", "generation_config.json", "model.safetensors.index.json", "MODEL_CARD.md", "README.md")
    named = [stored.folder / name for name in others]
    files = [path for path in named if path.is_file()]
    unused = unused_packed_files(stored.folder)
    return list(dict.fromkeys([*stored.files, *unused, *files, *stored.tokenizer_files]))
