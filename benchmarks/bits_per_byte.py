"""Bits per byte and perplexity of a model on text or JSONL files: benchmarks/bits_per_byte.py FILE … [--model M]

Every token of every document is scored once, in windows of the model's context that overlap by half.
"""

from __future__ import annotations

import argparse
import sys
import time

import gemma2
from gemma2.data import expand_files, iter_documents
from gemma2.evaluation import TextScore, score_texts


def main() -> None:
    """Scores each document and prints the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", default=None, help="a folder or a name; the bundled model if left out")
    parser.add_argument("--stride", type=int, default=None, help="tokens scored per window; half the context")
    parser.add_argument("--text-key", default="text", help="the key of JSON lines that holds the text")
    args = parser.parse_args()
    llm = gemma2.load(args.model)
    began = time.monotonic()
    total = TextScore(nats=0.0, num_tokens=0, num_bytes=0)
    for document in iter_documents(expand_files(args.files), text_key=args.text_key):
        score = score_texts(llm.backend, llm.tokenizer, [document.text], stride=args.stride)
        total += score
        print(f"{document.file.name}:{document.line}  {score.bits_per_byte:.4f} bits per byte", flush=True)
    speed = total.num_tokens / (time.monotonic() - began)
    print(
        f"all: {total.bits_per_byte:.4f} bits per byte, perplexity {total.perplexity:.3f}, "
        f"{total.num_tokens:,} tokens, {total.num_bytes:,} bytes ({speed:,.0f} tok/s)"
    )


if __name__ == "__main__":
    sys.exit(main())
