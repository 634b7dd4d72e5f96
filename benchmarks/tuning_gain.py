"""What tuning gains: a model tuned on questions and answers, every weight and LoRA, and what it then says.

    python benchmarks/tuning_gain.py runs/tuning --train gsm8k/train.jsonl --valid gsm8k/test.jsonl \\
        --books books-valid.jsonl.xz

The settings are those of examples/tune-gsm8k.yaml for the bundled model, with the rates and epochs of this call. Each
way is measured before and after: perplexity of the answers to questions that it has not seen, how many of its own
answers to them it ends by itself within 200 tokens (greedy, and at temperature 0.7), and bits per byte of the first
books of another file, which tell what was forgotten. The table, samples and the curves are written beside the runs:
tuning.json, tuning.png. Called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

SETTINGS = Path(__file__).parent.parent / "examples" / "tune-gsm8k.yaml"
WAYS = {"every weight": "full", "LoRA, r = 16": "lora"}
COLORS = {"every weight": "#c0392b", "LoRA, r = 16": "#2c6fbb"}
MAX_TOKENS = 200


def main() -> None:
    """Tunes what is missing, asks all, writes table and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the runs")
    parser.add_argument("--train", required=True, help="JSON lines with a question and an answer each")
    parser.add_argument("--valid", required=True, help="others")
    parser.add_argument("--books", required=True, help="JSON lines with a text each")
    parser.add_argument("--book-tokens", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--full-rate", type=float, default=3e-4)
    parser.add_argument("--lora-rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for way, name in WAYS.items():
        folder = args.output / name
        if not (folder / ("adapter" if name == "lora" else "model")).is_dir():
            file = folder.with_suffix(".yaml")
            file.write_text(yaml.safe_dump(_settings(args, name), sort_keys=False), encoding="utf-8")
            print(f"{way}: {file}", flush=True)
            subprocess.run([sys.executable, "-m", "gemma2", "tune", str(file)], check=True)
    found = {"before": _measured(args, [], None)}
    for way, name in WAYS.items():
        folder = args.output / name
        options = ["--adapter", str(folder / "adapter")] if name == "lora" else ["--model", str(folder / "model")]
        found[way] = _measured(args, options, folder)
    found["before"]["perplexity"] = found["every weight"].pop("perplexity_before")
    found["LoRA, r = 16"].pop("perplexity_before")
    (args.output / "tuning.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_table(found)
    _plot(args.output / "tuning.png", {way: _log(args.output / name) for way, name in WAYS.items()})


def _settings(args: argparse.Namespace, name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    values["output"] = str(args.output / name)
    values["data"] |= {"train": [args.train], "validation": [args.valid]}
    values["run"] |= {"num_epochs": args.epochs}
    values["optimizer"]["learning_rate"] = args.lora_rate if name == "lora" else args.full_rate
    if name == "full":
        del values["adapter"]
    return values


def _measured(args: argparse.Namespace, options: list[str], run: Path | None) -> dict[str, Any]:
    import gemma2
    from gemma2.text import encode_chat

    result: dict[str, Any] = {}
    if run is not None:
        validations = [entry for entry in _log(run) if entry["event"] == "validation"]
        result["perplexity"] = min(entry["perplexity"] for entry in validations)
        result["perplexity_before"] = validations[0]["perplexity"]
    command = [sys.executable, "-m", "gemma2", "eval", args.books, *options, "--json", "--quiet"]
    command += ["--max-tokens", str(args.book_tokens)]
    scores = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result["bits_per_byte_of_books"] = scores["models"][0]["bits_per_byte"]
    model = options[1] if options[:1] == ["--model"] else None
    adapter = options[1] if options[:1] == ["--adapter"] else None
    llm = gemma2.load(model, adapter=adapter)
    with open(args.valid, encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line, _ in zip(file, range(args.questions), strict=False)]
    prompts = [encode_chat(llm.tokenizer, [{"role": "user", "content": question}]) for question in questions]
    longest = llm.config.max_position_embeddings - MAX_TOKENS
    prompts = [prompt for prompt in prompts if len(prompt) <= longest]
    for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        answers = llm.generate(prompts, max_tokens=MAX_TOKENS, temperature=temperature, seed=1)
        result[f"ended_{name}"] = sum(answer.finish_reason == "stop" for answer in answers) / len(answers)
        result[f"samples_{name}"] = [
            {"question": question, "answer": answer.text}
            for question, answer in zip(questions[:3], answers, strict=False)
        ]
    return result


def _log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _print_table(found: dict[str, dict[str, Any]]) -> None:
    print("| | perplexity of answers | ended by itself, greedy | at temperature 0.7 | bits per byte of books |")
    print("| --- | --- | --- | --- | --- |")
    for name, result in found.items():
        print(
            f"| {name} | {result['perplexity']:.2f} | {result['ended_greedy']:.0%} | {result['ended_sampled']:.0%} | "
            f"{result['bits_per_byte_of_books']:.4f} |"
        )


def _plot(path: Path, logs: dict[str, list[dict[str, Any]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way, entries in logs.items():
        steps = [entry for entry in entries if entry["event"] == "step"]
        validations = [entry for entry in entries if entry["event"] == "validation"]
        axes.plot(
            [entry["tokens"] / 1e6 for entry in steps],
            [entry["loss"] for entry in steps],
            color=COLORS[way],
            alpha=0.35,
            linewidth=0.8,
        )
        axes.plot(
            [entry["tokens"] / 1e6 for entry in validations],
            [entry["loss"] for entry in validations],
            color=COLORS[way],
            marker="o",
            markersize=4,
            label=f"{way}: validation (last: {validations[-1]['loss']:.3f})",
        )
    axes.set_xlabel("million tokens of answers")
    axes.set_ylabel("loss, nats per token of an answer")
    axes.set_title("The bundled model tuned on questions and answers of GSM8K")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
