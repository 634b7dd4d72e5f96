"""`gemma2 lm-eval …`: lm-eval's own command line, which then knows `--model gemma2`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from gemma2.errors import Gemma2Error, MissingDependencyError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.usage = "gemma2 lm-eval run --tasks TASK [--model_args pretrained=FOLDER,weights=q8] [any option of lm-eval]"
    parser.description = (
        "Runs tasks of lm-eval, EleutherAI's Language Model Evaluation Harness, which pip install 'gemma2[eval]'\n"
        "brings. All that follows is lm-eval's own command line (gemma2 lm-eval run --help), but that --model is\n"
        "gemma2 if it does not say. Its --model_args are pretrained (a folder, or a name on the Hub that was pulled;\n"
        "without it, the bundled model), adapter, backend, weights, kv_cache, threads, revision, max_length,\n"
        "max_gen_toks."
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="run, ls or validate, and its options")
    parser.epilog = (
        "A task of your own, from mine.yaml in a folder: gemma2 lm-eval run --tasks mine --include_path FOLDER\n"
        "Releases of lm-eval that discover models by entry points (0.4.13 does not) need none of this:\n"
        "lm_eval --model gemma2 --model_args pretrained=FOLDER --tasks …"
    )


def _names_a_model(arguments: Sequence[str]) -> bool:
    """Whether options, or the file of settings that they name, say which model; the file's errors are lm-eval's."""
    import yaml

    for index, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in ("--model", "-M"):
            return True
        if option in ("--config", "-C"):
            path = value or "".join(arguments[index + 1 : index + 2])
            try:
                settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                return True
            if not isinstance(settings, dict) or settings.get("model"):
                return True
    return False


def run(args: argparse.Namespace) -> int:
    """Hands the arguments on."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("this needs lm-eval, which is not installed: pip install 'gemma2[eval]'")
    from lm_eval.__main__ import cli_evaluate

    import gemma2.cli.lm_eval_model  # noqa: F401 (registers the model)

    arguments = list(args.arguments)
    is_run = arguments[:1] == ["run"] and not {"-h", "--help"} & set(arguments)
    if is_run and not _names_a_model(arguments):
        arguments += ["--model", "gemma2"]
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except Gemma2Error:
        raise
    except Exception as error:
        raise Gemma2Error(f"lm-eval ended with {type(error).__name__}: {error} (--debug shows where)") from error
    return 0
