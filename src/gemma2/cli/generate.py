"""`gemma2 generate PROMPT`: continue a text, or have a question answered."""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2.cli.model_options import add_model_arguments, load_model
from gemma2.cli.sampling_options import DEFAULT_MAX_TOKENS, DEFAULTS, add_sampling_arguments, given_sampling
from gemma2.cli.streaming import DIM, Answer, TextWriter, is_terminal, paint, stream_answer
from gemma2.errors import Gemma2Error

if TYPE_CHECKING:
    from gemma2.api import LLM
    from gemma2.sampling import SampledToken, SamplingParams

_STANDARD_INPUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.description = (
        "Continues a text. A model that was tuned for chat gets the prompt as a user's message and answers it; any\n"
        "other one, like the bundled model, goes on where the prompt ends. --raw and --chat choose otherwise."
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="left out, or -: standard input, less one line break at its end",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line, instead of PROMPT")
    parser.add_argument("-n", type=_positive, default=1, metavar="N", help="samples of each prompt (default: 1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat", action="store_true", help="put the prompt into the chat format, as one user turn")
    form.add_argument("--raw", action="store_true", help="let the model continue the prompt itself")
    parser.add_argument("--system", metavar="TEXT", help="instructions, in the chat format put before the user's turn")
    parser.add_argument(
        "--echo",
        action=argparse.BooleanOptionalAction,
        help="write the prompt before its continuation (default: in a terminal, if it is continued and not answered)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="write one JSON object for each text, on one line: text, token_ids, finish_reason, stop_reason, seed, "
        "usage, timings and, if asked for, logprobs",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="write nothing but the text: no speed, no notices")
    add_model_arguments(parser)
    add_sampling_arguments(
        parser,
        default_max_tokens=f"{DEFAULT_MAX_TOKENS} for a continuation, none for an answer, which ends by itself",
    )
    parser.epilog = (
        "The N samples have the seeds S, S + 1, … of --seed S, so each can be made again by itself. Ctrl-C ends the\n"
        'text; what is there stays, and the exit status is 130. "\\n" in --stop is a line break.'
    )
    # So that `run` can refuse combinations of options as argparse refuses single ones.
    parser.set_defaults(usage_error=parser.error)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One text to generate."""

    prompt: str
    token_ids: list[int]
    params: SamplingParams


def run(args: argparse.Namespace) -> int:
    """Generates, and returns 0, or 130 after Ctrl-C."""
    _check_combinations(args)
    prompts = _read_prompts(args)
    llm = load_model(args, quiet=args.quiet)
    is_chat = args.chat or (llm.is_chat_tuned and not args.raw)
    if args.system is not None and not is_chat:
        args.usage_error(
            "--system goes with the chat format, but this model continues texts: add --chat, or put it in the prompt"
        )
    if args.chat and not llm.is_chat_tuned and not args.quiet:
        _notice("this model was never tuned for chat; expect no answer of it, but some continuation")
    jobs = _make_jobs(args, llm, prompts, is_chat)
    show_prompt = (is_terminal(sys.stdout) and not is_chat) if args.echo is None else args.echo
    for index, job in enumerate(jobs):
        if args.json:
            answer = stream_answer(llm, job.token_ids, job.params, lambda text: None)
            _print_json(llm, job, answer)
        else:
            if len(jobs) > 1:
                _print_heading(index, len(jobs), job)
            answer = _print_text(llm, job, show_prompt=show_prompt)
        if is_terminal(sys.stderr) and not args.quiet:
            _print_speed(job, answer)
        if answer.is_interrupted:
            return 130
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return number


def _check_combinations(args: argparse.Namespace) -> None:
    if args.prompts is not None and args.prompt is not None:
        args.usage_error("give either PROMPT or --prompts FILE, not both")
    if args.raw and args.system is not None:
        args.usage_error("--system goes with the chat format and --raw is without it; leave one of them out")
    if args.json and args.echo:
        args.usage_error("--echo goes with plain text; with --json the prompt has a field of its own")
    if not args.json and "logprobs" in given_sampling(args):
        args.usage_error("--logprobs goes with --json, where they are written")
    if args.prompt is None and args.prompts is None and (sys.stdin is None or is_terminal(sys.stdin)):
        args.usage_error('a prompt is needed, like "Once upon a time"; or pipe one in')


def _read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts, none of them empty."""
    if args.prompts is not None:
        try:
            data = args.prompts.read_bytes()
        except OSError as error:
            raise Gemma2Error(f"{args.prompts}: cannot be read: {error.strerror or error}") from None
        lines = [line.removesuffix("\r") for line in _decode(data, str(args.prompts)).split("\n")]
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise Gemma2Error(f"{args.prompts}: has no prompts; one a line is needed")
        return prompts
    if args.prompt in (None, _STANDARD_INPUT):
        prompt = _decode(sys.stdin.buffer.read(), "standard input")
        # `echo "Once upon a time" |` means the words and not the line break, after which a model would go on elsewhere.
        prompt = prompt.removesuffix("\n").removesuffix("\r")
        source = "standard input"
    else:
        prompt, source = args.prompt, "the prompt"
    if not prompt:
        raise Gemma2Error(f'{source} is empty; give some words to go on from, like "Once upon a time"')
    return [prompt]


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Gemma2Error(
            f"{source}: needs to be UTF-8, but byte {error.start} (0x{data[error.start]:02x}) is not; convert it, "
            "as with iconv"
        ) from None


def _make_jobs(args: argparse.Namespace, llm: LLM, prompts: list[str], is_chat: bool) -> list[Job]:
    """Makes every text's request, and checks them all before the first one runs."""
    from gemma2.sampling import SamplingParams
    from gemma2.text import encode_chat

    given = given_sampling(args)
    first_seed = given.get("seed")
    if first_seed is None:
        first_seed = secrets.randbits(32)  # drawn here and not by the sampler, so that it can be told
    jobs = []
    for prompt in prompts:
        if is_chat:
            messages = [{"role": "user", "content": prompt}]
            if args.system:
                messages.insert(0, {"role": "system", "content": args.system})
            token_ids = encode_chat(llm.tokenizer, messages)
        else:
            token_ids = llm.tokenizer.encode(prompt)
        values = {"max_tokens": None if is_chat else DEFAULT_MAX_TOKENS, **DEFAULTS, **given}
        room = llm.config.max_position_embeddings - len(token_ids)
        if "max_tokens" not in given and not is_chat and 1 <= room < DEFAULT_MAX_TOKENS:
            values["max_tokens"] = room
        for seed in range(first_seed, first_seed + args.n):
            params = SamplingParams(**{**values, "seed": seed})
            llm.engine.stream(token_ids, params).close()  # it checks when it is made, and runs when it is read
            jobs.append(Job(prompt=prompt, token_ids=token_ids, params=params))
    return jobs


def _print_heading(index: int, number: int, job: Job) -> None:
    blank = "\n" if index else ""
    print(paint(f"{blank}── {index + 1} of {number}, seed {job.params.seed} ──", DIM, sys.stdout), flush=True)


def _print_text(llm: LLM, job: Job, *, show_prompt: bool) -> Answer:
    writer = TextWriter(sys.stdout)
    if show_prompt:
        writer.write(job.prompt, DIM)
    try:
        return stream_answer(llm, job.token_ids, job.params, writer.write)
    finally:
        writer.end()


def _print_json(llm: LLM, job: Job, answer: Answer) -> None:
    result: dict[str, Any] = {
        "prompt": job.prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "seed": job.params.seed,
        "usage": {
            "prompt_tokens": answer.num_prompt_tokens,
            "completion_tokens": len(answer.token_ids),
            "total_tokens": answer.num_prompt_tokens + len(answer.token_ids),
        },
        "timings": {
            "prompt_seconds": answer.prompt_seconds,
            "prompt_tokens_per_second": answer.prompt_tokens_per_second,
            "decode_seconds": answer.decode_seconds,
            "decode_tokens_per_second": answer.decode_tokens_per_second,
        },
    }
    if answer.logprobs is not None:
        result["logprobs"] = [_describe_token(llm, token) for token in answer.logprobs]
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(result, ensure_ascii=not is_utf8, allow_nan=False), flush=True)


def _describe_token(llm: LLM, token: SampledToken) -> dict[str, Any]:
    def describe(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = llm.tokenizer.decode([token_id], skip_control=False)
        finite = logprob if logprob is not None and math.isfinite(logprob) else None  # JSON has no infinity
        return {"token_id": token_id, "token": text, "logprob": finite}

    top = [describe(alternative.token_id, alternative.logprob) for alternative in token.top_logprobs]
    return {**describe(token.token_id, token.logprob), "top_logprobs": top}


def _print_speed(job: Job, answer: Answer) -> None:
    end = {"stop": "ended by itself", "length": "cut at max_tokens", "abort": "stopped"}[answer.finish_reason]
    _notice(f"{answer.describe_speed()} · {end} · seed {job.params.seed}")


def _notice(text: str) -> None:
    print(paint(text, DIM, sys.stderr), file=sys.stderr)
