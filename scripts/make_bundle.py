"""Puts a finished pretraining run into the package as the bundled model, with its card and its curve.

    python scripts/make_bundle.py runs/books --score books-valid.jsonl.xz

The card's figures come from the run's own log and from scoring the files given, all of their text, with a window that
slides over it.
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
    parser.add_argument("run", type=Path, help="folder of a finished `gemma2 pretrain`")
    parser.add_argument("--score", nargs="+", required=True, help="held-out JSONL or text files")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="for the card")
    parser.add_argument("--note", default="", help="a sentence for the card's section on training")
    args = parser.parse_args()
    model = args.run / "model"
    if not model.is_dir():
        raise SystemExit(f"{model} is not there: the run has not ended")
    # Built beside, and put in place of the old bundle when it is whole and was judged.
    beside = BUNDLE.with_name("bundled.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(model, beside)
    shutil.copy(args.run / "loss.png", beside / "loss.png")
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


def _card(args: argparse.Namespace, config: Any, total: TextScore, samples: list[tuple[str, int, str]]) -> str:
    settings = yaml.safe_load((args.run / "settings.yaml").read_text(encoding="utf-8"))
    settings["data"]["train"] = [Path(name).name for name in settings["data"]["train"]]
    settings["data"]["validation"] = [Path(name).name for name in settings["data"]["validation"]]
    settings["output"] = Path(settings["output"]).name
    entries = [json.loads(line) for line in (args.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [entry for entry in entries if entry["event"] == "step"][-1]
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
    validated = settings["data"]["validation_max_tokens"]
    curve = "\n".join(
        f"| {entry['step']:,} | {entry['tokens']:,} | {entry['loss']:.4f} | {entry['bits_per_byte']:.4f} |"
        for entry in entries
        if entry["event"] == "validation"
    )
    texts = "\n\n".join(
        f"> **{prompt}**{text}\n>\n> (seed {seed})".replace("\n\n", "\n>\n> ") for prompt, seed, text in samples
    )
    return f"""# The bundled model

A Gemma 2 of {count.total:,} parameters ({count.embedding:,} of them in the tied embedding), trained from scratch by
`gemma2 pretrain` with `examples/pretrain-books.yaml`. It is here so that the program has something to run, test and
explain at once. It continues English prose in the manner of old books. It knows no facts, follows no instructions and
was never tuned for chat; it repeats the prejudices of its sources. No weights of Google's are in it.

| | |
| --- | --- |
| architecture | {architecture} |
| vocabulary | {config.vocab_size:,}, byte-pair pieces trained on the same books, Gemma's control tokens |
| data | 365 public-domain books in English, 140 MB of text |
| tokens seen | {last["tokens"]:,} in {last["step"]:,} steps |
| time | {last["seconds"] / 60:.0f} minutes on {args.machine} |
| stored as | bfloat16 |
| held-out books | {score} |
{args.note and chr(10) + args.note + chr(10)}
## Curve

![training and validation loss](loss.png)

During training, on the first {validated:,} tokens of the held-out books, in windows that do not overlap:

| step | tokens | loss, nats per token | bits per byte |
| ---: | ---: | ---: | ---: |
{curve}

## Samples, unedited

Temperature 0.8, top-p 0.95, at most 80 tokens.

{texts}

## Settings

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```

## Licence

Apache-2.0, as the program. The books are in the public domain.
"""


if __name__ == "__main__":
    main()
