"""What rounding to 8 and 4 bits costs: benchmarks/quantization_quality.py [FILE …] [--model M]

Without files: the error of outputs, ‖x·(W - Ŵ)ᵀ‖ / ‖x·Wᵀ‖, for matrices of the shapes of Gemma 2 2B and ways to round
them: the scale of a group by its largest weight or searched for the least squared error, the values of 4 bits on a
uniform grid or in the codebook of the CPU engine, and groups of 32, 64 and 128. The engine has only the ways that are
marked; the others are computed in numpy. Weights are normal, or of heavy tails (Student's t with 5 degrees of freedom);
inputs are normal, or of heavy tails with a few inputs that are 20 times as large, as activations have them.

With text or JSONL files: a model in each of the CPU engine's formats beside the same model in float32, on the first
tokens of each document: the mean Kullback-Leibler divergence of the next token's distribution in nats, its 99th
percentile, how often the likeliest token is another one, and the perplexity.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gemma2 import _kernels as kernels
from gemma2.api import BUNDLED_FOLDER, LLM
from gemma2.checkpoints import Checkpoint, open_checkpoint, resolve_model
from gemma2.checkpoints.packing import pack_model
from gemma2.cpu import CpuBackend
from gemma2.cpu.calibration import CalibrationRun, cut, random_words
from gemma2.data import expand_files, iter_documents
from gemma2.text import Tokenizer

Floats = npt.NDArray[np.float32]

SHAPES = {"q, k, v": (4096, 2304), "o": (2304, 2048), "gate, up": (18432, 2304), "down": (2304, 9216)}
NUM_ROWS = 256
"""Rows of a matrix that are looked at: all are alike, so a few tell the error of all to the third digit."""
NUM_INPUTS = 32
CALIBRATION_TOKENS = 16_384


# -- Matrices ---------------------------------------------------------------------------------------------------------


def round_groups(weights: Floats, values: Floats, group: int, factors: npt.NDArray[np.float64]) -> Floats:
    """Rounds in numpy: each group to `values` times the best of its scales, largest weight / (127 · factor)."""
    groups = weights.reshape(len(weights), -1, group)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    middles = (values[1:] + values[:-1]) / 2
    best, least = np.zeros_like(groups), np.full(largest.shape, np.inf, np.float32)
    for factor in factors:
        codes = np.searchsorted(middles, groups / largest * np.float32(factor * 127))
        v = values[codes]
        # The scale that suits these codes best, as a half; and the codes that suit it.
        scale = (groups * v).sum(axis=2, keepdims=True) / (v * v).sum(axis=2, keepdims=True)
        scale = scale.astype(np.float16).astype(np.float32)
        rounded = values[np.searchsorted(middles, groups / scale)] * scale
        error = ((groups - rounded) ** 2).sum(axis=2, keepdims=True)
        best = np.where(error < least, rounded, best)
        least = np.minimum(error, least)
    return best.reshape(weights.shape)


def by_largest(weights: Floats, values: Floats, group: int) -> Floats:
    """Rounds in numpy: the largest weight of each group is given the largest value."""
    groups = weights.reshape(len(weights), -1, group)
    scale = np.abs(groups).max(axis=2, keepdims=True) / np.abs(values).max()
    scale = scale.astype(np.float16).astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    return (values[np.searchsorted(middles, groups / scale)] * scale).reshape(weights.shape)


def round_in_engine(weights: Floats, weight_format: str) -> Floats:
    """Rounds with the engine's kernels."""
    runtime = kernels.Runtime(1)
    outputs, inputs = weights.shape
    size = kernels.matrix_bytes(weight_format, outputs, inputs)
    memory = np.empty(size + 64, np.uint8)
    packed = memory[-memory.ctypes.data % 64 :][:size]
    kernels.pack_matrix(runtime, weights, weight_format, packed)
    return kernels.unpack_matrix(runtime, kernels.Matrix(weight_format, outputs, inputs, packed))


def ways() -> dict[str, tuple[float, Callable[[Floats], Floats]]]:
    """The ways to round: bits per weight, and what does it."""
    uniform4 = np.arange(-8, 8).astype(np.float32) * (127 / 8)
    codebook = np.array(kernels.Q4_CODEBOOK, np.float32)
    uniform8 = np.arange(-127, 128).astype(np.float32)
    wide = np.concatenate([sign * np.linspace(0.7, 1.3, 20) for sign in (1, -1)])
    narrow = np.linspace(0.98, 1.05, 12)
    found: dict[str, tuple[float, Callable[[Floats], Floats]]] = {
        "8 bits, group 64, largest": (8.25, lambda w: by_largest(w, uniform8, 64)),
        "8 bits, group 64, searched: q8": (8.25, lambda w: round_in_engine(w, "q8")),
        "8 bits, group 32, searched": (8.5, lambda w: round_groups(w, uniform8, 32, narrow)),
        "4 bits, uniform, group 64, largest": (4.25, lambda w: by_largest(w, uniform4, 64)),
        "4 bits, uniform, group 64, searched": (4.25, lambda w: round_groups(w, uniform4, 64, wide)),
        "4 bits, codebook, group 64, largest": (4.25, lambda w: by_largest(w, codebook, 64)),
        "4 bits, codebook, group 64, searched: q4": (4.25, lambda w: round_in_engine(w, "q4")),
        "4 bits, codebook, group 32, searched": (4.5, lambda w: round_groups(w, codebook, 32, wide)),
        "4 bits, codebook, group 128, searched": (4.125, lambda w: round_groups(w, codebook, 128, wide)),
    }
    return found


def compare_matrices() -> None:
    """Prints the table of output errors."""
    random = np.random.default_rng(0)
    kinds = ("normal", "heavy tails")
    print(f"{'':42}  bits  " + "  ".join(f"{f'w {w}, x {x}':>26}" for w, x in itertools.product(kinds, kinds)))
    for name, (bits, rounding) in ways().items():
        cells = []
        for weight_kind, input_kind in itertools.product(kinds, kinds):
            errors = [output_error(random, inputs, rounding, weight_kind, input_kind) for _, inputs in SHAPES.values()]
            cells.append(" ".join(f"{100 * error:6.3f}" for error in errors).rjust(26))
        print(f"{name:42} {bits:5.3f}  " + "  ".join(cells), flush=True)
    print(f"\nPercent, for the shapes of {'; '.join(SHAPES)}.")


def output_error(
    random: np.random.Generator, inputs: int, rounding: Callable[[Floats], Floats], weight_kind: str, input_kind: str
) -> float:
    """The relative root mean square error of x·Wᵀ."""
    shape = (NUM_ROWS, inputs)
    weights = random.normal(size=shape) if weight_kind == "normal" else random.standard_t(5, size=shape)
    weights = (weights * inputs**-0.5).astype(np.float32)
    x = random.normal(size=(NUM_INPUTS, inputs)) if input_kind == "normal" else heavy(random, inputs)
    exact = x @ weights.T
    return float(np.linalg.norm(x @ rounding(weights).T - exact) / np.linalg.norm(exact))


def heavy(random: np.random.Generator, inputs: int) -> npt.NDArray[np.float64]:
    """Inputs of heavy tails, some of which are always large."""
    x = random.standard_t(3, size=(NUM_INPUTS, inputs))
    x[:, random.choice(inputs, inputs // 500, replace=False)] *= 20
    return x


# -- Models -----------------------------------------------------------------------------------------------------------


def variants(
    checkpoint: Checkpoint, tokenizer: Tokenizer, calibration: list[str], num_threads: int
) -> Iterator[tuple[str, CpuBackend]]:
    """The model in float32, then in each other way that the engine can run it."""
    for weight_format in ("float32", "bfloat16", "q8"):
        packed = pack_model(checkpoint, weight_format, num_threads=num_threads)
        yield weight_format, CpuBackend(packed, num_threads=num_threads)
    packed = pack_model(checkpoint, "q4", num_threads=num_threads, second_plane=False)
    yield "q4, one plane", CpuBackend(packed, num_threads=num_threads)
    packed = pack_model(checkpoint, "q4", num_threads=num_threads)
    vocabulary = checkpoint.config.vocab_size
    yield "q4, both planes for all", CpuBackend(packed, num_threads=num_threads, head_candidates=vocabulary)
    yield "q4", CpuBackend(packed, num_threads=num_threads)
    yield "q4, 64 candidates", CpuBackend(packed, num_threads=num_threads, head_candidates=64)
    options = {"num_tokens": CALIBRATION_TOKENS, "bos_id": tokenizer.bos_id}
    sequences = {"random words": random_words(checkpoint.config, **options)}
    if calibration:
        documents = iter_documents(expand_files(calibration), text_key="text")
        texts = (tokenizer.encode(document.text) for document in documents)
        sequences["text"] = cut(texts, checkpoint.config, **options)
    for kind, tokens in sequences.items():
        for weight_format in ("q8", "q4"):
            run = CalibrationRun(checkpoint, tokens, num_threads=num_threads)
            packed = pack_model(checkpoint, weight_format, num_threads=num_threads, calibration=run)
            yield f"{weight_format}, calibrated on {kind}", CpuBackend(packed, num_threads=num_threads)


def compare_models(
    folder: Path, files: list[str], calibration: list[str], *, num_tokens: int, num_documents: int, num_threads: int
) -> None:
    """Prints the table of divergences."""
    checkpoint, tokenizer = open_checkpoint(folder), Tokenizer.from_folder(folder)
    documents = itertools.islice(iter_documents(expand_files(files), text_key="text"), num_documents)
    texts = [tokenizer.encode(document.text[: 10 * num_tokens])[:num_tokens] for document in documents]
    reference: list[Floats] = []
    print(f"{folder}: {sum(map(len, texts)):,} tokens")
    print(f"{'weights':32}{'mean KL':>12}{'99% KL':>12}{'other best':>12}{'perplexity':>12}")
    for name, backend in variants(checkpoint, tokenizer, calibration, num_threads):
        llm = LLM(backend, tokenizer)
        logs = [log_probabilities(llm.logits(ids)) for ids in texts]
        reference = reference or logs
        divergence = np.concatenate([(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(reference, logs, strict=True)])
        other = np.concatenate([p.argmax(1) != q.argmax(1) for p, q in zip(reference, logs, strict=True)])
        losses = [-q[range(len(ids) - 1), ids[1:]] for q, ids in zip(logs, texts, strict=True)]
        print(
            f"{name:32}{divergence.mean():12.6f}{np.quantile(divergence, 0.99):12.6f}{100 * other.mean():11.2f}%"
            f"{np.exp(np.concatenate(losses).mean()):12.3f}",
            flush=True,
        )


def log_probabilities(logits: Floats) -> Floats:
    """Log softmax of each row."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--model", default=None, help="a folder or a name; the bundled model if left out")
    parser.add_argument("--calibration", nargs="*", default=[], metavar="FILE", help="other text, to calibrate on")
    parser.add_argument("--tokens", type=int, default=512, help="of each document (default: 512)")
    parser.add_argument("--documents", type=int, default=32, help="at most so many (default: 32)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.files:
        compare_matrices()
        return
    folder = BUNDLED_FOLDER if args.model is None else resolve_model(args.model)
    compare_models(
        folder,
        args.files,
        args.calibration,
        num_tokens=args.tokens,
        num_documents=args.documents,
        num_threads=args.threads,
    )


if __name__ == "__main__":
    sys.exit(main())
