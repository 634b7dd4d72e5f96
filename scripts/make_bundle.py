"""Puts a trained model into the package as the bundled model, with its card and the curves of its runs.

    python scripts/make_bundle.py runs/books runs/bundled --score books-valid.jsonl.xz

The runs are those that the model went through, one after the other: `gemma2 pretrain`, then perhaps `gemma2 distill`.
The last one's model is bundled. The card's figures come from the runs' own logs and from scoring the files given, all
of their text, with a window that slides over it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml

import gemma2
from gemma2.data import iter_documents
from gemma2.evaluation import TextScore, score_texts

BUNDLE = Path(gemma2.__file__).parent / "bundled"
LARGEST_BYTES = 20_000_000
SAMPLE_PROMPTS = ("It was a dark night, and", "The old man looked at her and said,", "In the beginning of the year")


def main() -> None:
    """Copies the model and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, the last one's model is bundled")
    parser.add_argument("--score", nargs="+", required=True, help="held-out JSONL or text files")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="for the card")
    parser.add_argument("--note", default="", help="sentences on the training, for the card")
    args = parser.parse_args()
    model = args.runs[-1] / "model"
    if not model.is_dir():
        raise SystemExit(f"{model} is not there: the run has not ended")
    # Built beside, and put in place of the old bundle when it is whole and was judged.
    beside = BUNDLE.with_name("bundled.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(model, beside)
    for run in args.runs:
        shutil.copy(run / "loss.png", beside / f"{_verb(_settings(run))}.png")
    llm = gemma2.load(beside)
    total = TextScore(nats=0.0, num_tokens=0, num_bytes=0)
    for document in iter_documents(args.score):
        score = score_texts(llm.backend, llm.tokenizer, [document.text])
        total += score
        print(f"{document.file.name}:{document.line}  {score.bits_per_byte:.4f} bits per byte", flush=True)
    samples = [
        (prompt, seed, llm.generate(prompt, max_tokens=80, temperature=0.8, top_p=0.95, seed=seed).text)
        for prompt in SAMPLE_PROMPTS
        for seed in (1, 2)
    ]
    (beside / "MODEL_CARD.md").write_text(_card(args, llm.config, total, samples), encoding="utf-8")
    size = sum(path.stat().st_size for path in beside.iterdir())
    if size > LARGEST_BYTES:
        raise SystemExit(f"{beside}: {size:,} bytes are more than the {LARGEST_BYTES:,} that a bundle may have")
    shutil.rmtree(BUNDLE, ignore_errors=True)
    beside.rename(BUNDLE)
    print(f"{BUNDLE}: {size:,} bytes, {total.bits_per_byte:.4f} bits per byte")


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run, with the names of files in place of their paths."""
    settings: dict[str, Any] = yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
    text = settings["data" if "data" in settings else "text"]
    for key in ("train", "validation"):
        text[key] = [Path(name).name for name in text[key]]
    settings["output"] = Path(settings["output"]).name
    for section in ("teacher", "student"):
        if settings.get(section, {}).get("name"):
            settings[section]["name"] = "/".join(Path(settings[section]["name"]).parts[-2:])
    return settings


def _verb(settings: dict[str, Any]) -> str:
    return "distill" if "teacher" in settings else "pretrain"


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry for entry in entries if entry["event"] == kind]


def _run_section(run: Path) -> str:
    settings = _settings(run)
    curve = "\n".join(
        f"| {entry['step']:,} | {entry['tokens']:,} | {entry['loss']:.4f} | {entry['bits_per_byte']:.4f} |"
        for entry in _events(run, "validation")
    )
    return f"""## `gemma2 {_verb(settings)}`

![training and validation loss]({_verb(settings)}.png)

On the first {settings["data" if "data" in settings else "text"]["validation_max_tokens"]:,} tokens of the held-out
books, in windows that do not overlap:

| step | tokens | loss, nats per token | bits per byte |
| ---: | ---: | ---: | ---: |
{curve}

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```"""


def _card(args: argparse.Namespace, config: Any, total: TextScore, samples: list[tuple[str, int, str]]) -> str:
    count = config.count_parameters()
    architecture = (
        f"{config.num_hidden_layers} layers, local and global in turn; window {config.sliding_window} of "
        f"{config.max_position_embeddings} tokens; caps {config.attn_logit_softcapping:g} and "
        f"{config.final_logit_softcapping:g}; {config.num_attention_heads} query and {config.num_key_value_heads} "
        f"key/value heads of {config.head_dim}; width {config.hidden_size}, MLP {config.intermediate_size}"
    )
    score = (
        f"**{total.bits_per_byte:.4f} bits per byte**, perplexity {total.perplexity:.2f} a token "
        f"({total.num_tokens:,} tokens, {total.num_bytes:,} bytes; windows of {config.max_position_embeddings} that "
        f"overlap by half)"
    )
    seen = "\n".join(
        f"| `gemma2 {_verb(_settings(run))}` | {last['tokens']:,} tokens in {last['step']:,} steps, "
        f"{last['seconds'] / 60:.0f} minutes on {args.machine} |"
        for run, last in ((run, _events(run, "step")[-1]) for run in args.runs)
    )
    texts = "\n\n".join(
        f"> **{prompt}**{text}\n>\n> (seed {seed})".replace("\r\n", "\n").replace("\n\n", "\n>\n> ")
        for prompt, seed, text in samples
    )
    sections = "\n\n".join(_run_section(run) for run in args.runs)
    return f"""# The bundled model

A Gemma 2 of {count.total:,} parameters ({count.embedding:,} of them in the tied embedding), trained by this program
from nothing. It is here so that there is something to run, test and explain at once. It continues English prose in the
manner of old books. It knows no facts, follows no instructions and was never tuned for chat; it repeats the prejudices
of its sources. No weights of Google's are in it.

| | |
| --- | --- |
| architecture | {architecture} |
| vocabulary | {config.vocab_size:,}, byte-pair pieces trained on the same books, Gemma's control tokens |
| data | 365 public-domain books in English, 140 MB of text |
{seen}
| stored as | bfloat16 |
| held-out books | {score} |
{args.note and chr(10) + args.note + chr(10)}
## Samples, unedited

Temperature 0.8, top-p 0.95, at most 80 tokens.

{texts}

{sections}

## Licence

Apache-2.0, as the program. The books are in the public domain.
"""


if __name__ == "__main__":
    main()
