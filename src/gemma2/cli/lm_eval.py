"""`gemma2 lm-eval …`: lm-eval's own command line, which then knows `--model gemma2`."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from gemma2.errors import Gemma2Error, MissingDependencyError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.usage = "gemma2 lm-eval run --tasks TASK [--model_args pretrained=FOLDER,weights=q8] [any option of lm-eval]"
    parser.description = (
        "Runs tasks of lm-eval, EleutherAI's Language Model Evaluation Harness, which pip install 'gemma2[eval]'\n"
        "brings. All that follows is lm-eval's own command line (gemma2 lm-eval run --help), but that --model is\n"
        "gemma2 if it does not say. Its --model_args are pretrained (a folder, or a name on the Hub that was pulled;\n"
        "without it, the bundled model), backend, weights, kv_cache, threads, revision, max_length, max_gen_toks."
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="run, ls or validate, and its options")
    parser.epilog = (
        "A task of your own, from mine.yaml in a folder: gemma2 lm-eval run --tasks mine --include_path FOLDER\n"
        "Releases of lm-eval that discover models by entry points (0.4.13 does not) need none of this:\n"
        "lm_eval --model gemma2 --model_args pretrained=FOLDER --tasks …"
    )


def run(args: argparse.Namespace) -> int:
    """Hands the arguments on."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("this needs lm-eval, which is not installed: pip install 'gemma2[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import gemma2.cli.lm_eval_model  # noqa: F401 (registers the model)

    arguments = list(args.arguments)
    is_run = arguments[:1] == ["run"] and not {"-h", "--help"} & set(arguments)
    if is_run and not any(argument.partition("=")[0] in ("--model", "-M", "--config", "-C") for argument in arguments):
        arguments += ["--model", "gemma2"]
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except Gemma2Error:
        raise
    except Exception as error:
        raise Gemma2Error(f"lm-eval ended with {type(error).__name__}: {error} (--debug shows where)") from error
    return 0
