"""`gemma2 pull`: download a model from the Hugging Face Hub."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from gemma2.errors import Gemma2Error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("repo", metavar="REPO", help="such as google/gemma-2-2b-it, or gemma-2-2b-it for short")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--token", help="access token (default: HF_TOKEN, or that of `hf auth login`)")
    parser.add_argument("--to", metavar="FOLDER", type=Path, help="where to put the files (default: the Hub's cache)")
    parser.epilog = (
        "Google's weights are licensed under the Gemma Terms of Use, https://ai.google.dev/gemma/terms; accept them\n"
        "on the model's page at huggingface.co first, and pass a token of that account."
    )


def run(args: argparse.Namespace) -> int:
    """Downloads, and prints the folder on standard output, so that a script can use it."""
    from gemma2.checkpoints import pull
    from gemma2.text import Tokenizer

    folder = pull(args.repo, revision=args.revision, token=args.token, local_dir=args.to)
    # Opened once, so that the first `generate` finds its twin in the cache. What is wrong with it is not pull's to say.
    with contextlib.suppress(Gemma2Error):
        Tokenizer.from_folder(folder)
    print(folder)
    return 0
