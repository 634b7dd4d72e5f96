"""`gemma2 generate`, with a model that writes what each test tells it to."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import FakeLLM
from cli_terminal import Terminal

import gemma2.api
from gemma2.cli import model_options
from gemma2.cli.main import main
from gemma2.cli.sampling_options import DEFAULTS, SAMPLING_OPTIONS, read_escapes
from gemma2.cpu import KV_CACHE_DTYPES
from gemma2.errors import CheckpointError
from gemma2.sampling import SamplingParams

Install = Callable[[FakeLLM], list[dict[str, Any]]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes `gemma2.load` give a model; returns the list of what it is called with."""

    def put(llm: FakeLLM) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def load(model: str | None = None, **options: Any) -> FakeLLM:
            calls.append({"model": model, **options})
            return llm

        monkeypatch.setattr(gemma2.api, "load", load)
        return calls

    return put


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a wrong command line; returns its one line on standard error."""
    with pytest.raises(SystemExit) as exit_:
        main(["generate", *arguments])
    assert exit_.value.code == 2
    return one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
    return err


# -- the text -------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_only_the_continuation(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM([" there was a king."])
    install(llm)
    assert main(["generate", "Once upon a time"]) == 0
    assert capsys.readouterr() == (" there was a king.\n", "")
    assert llm.prompts == ["<bos>Once upon a time"]


def test_echo_puts_the_prompt_before_it(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(FakeLLM([" there was a king.\n"]))
    assert main(["generate", "--echo", "Once upon a time"]) == 0
    assert capsys.readouterr().out == "Once upon a time there was a king.\n"


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b"Once\nupon", "Once\nupon"),
        (b"Once\n", "Once"),
        (b"Once\r\n", "Once"),
        (b"Once\n\n", "Once\n"),
        (b"\xef\xbb\xbfOnce", "Once"),
        (b"  ", "  "),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_loses_one_line_break(
    install: Install, monkeypatch: pytest.MonkeyPatch, arguments: list[str], data: bytes, prompt: str
) -> None:
    llm = FakeLLM()
    install(llm)
    pipe_in(monkeypatch, data)
    assert main(["generate", *arguments]) == 0
    assert llm.prompts == ["<bos>" + prompt]


def test_text_is_written_as_it_comes(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Pipe(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    pipe = Pipe()
    install(FakeLLM(["abc"]))
    monkeypatch.setattr(sys, "stdout", pipe)
    main(["generate", "x"])
    assert flushed[:3] == ["a", "ab", "abc"]


def test_a_tuned_model_gets_the_chat_format_unless_told_not_to(install: Install) -> None:
    llm = FakeLLM(["yes"], is_chat_tuned=True)
    install(llm)
    for arguments in ([], ["--raw"], ["--system", "Be brief."]):
        assert main(["generate", " Why? ", *arguments]) == 0
    turn = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    assert llm.prompts == [turn.format("Why?"), "<bos> Why? ", turn.format("Be brief.\n\nWhy?")]


def test_chat_for_an_untuned_model_is_said_to_help_little(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM(["yes"])
    install(llm)
    assert main(["generate", "Why?", "--chat"]) == 0
    assert "never tuned for chat" in capsys.readouterr().err
    assert main(["generate", "Why?", "--chat", "--quiet"]) == 0
    assert capsys.readouterr() == ("yes\n", "")
    assert llm.prompts == ["<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"] * 2


def test_a_models_own_stop_tokens_end_its_texts(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = FakeLLM().tokenizer
    install(FakeLLM(["abc.def"], stop_token_ids=tokenizer.encode(".", add_bos=False)))
    assert main(["generate", "x"]) == 0
    assert capsys.readouterr().out == "abc\n"
    assert main(["generate", "x", "--ignore-eos", "--max-tokens", "7"]) == 0
    assert capsys.readouterr().out == "abc.def\n"


def test_several_texts_have_headings_with_their_seeds(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install(FakeLLM(["one", "two", "three", "four"]))
    file = tmp_path / "prompts.txt"
    file.write_text("first\r\n\nsecond\n")
    assert main(["generate", "--prompts", str(file), "-n", "2", "--seed", "7"]) == 0
    assert capsys.readouterr().out == (
        "── 1 of 4, seed 7 ──\none\n\n── 2 of 4, seed 8 ──\ntwo\n\n"
        "── 3 of 4, seed 7 ──\nthree\n\n── 4 of 4, seed 8 ──\nfour\n"
    )


# -- JSON -----------------------------------------------------------------------------------------------------------


def test_json_has_all_that_is_known(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM(["ab. Then"], seconds=0.002)
    install(llm)
    assert main(["generate", "Hi", "--json", "--stop", ". ", "--seed", "5", "--logprobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    ids = llm.tokenizer.encode("ab. ", add_bos=False)
    timings, logprobs = result.pop("timings"), result.pop("logprobs")
    assert result == {
        "prompt": "Hi",
        "text": "ab",
        "token_ids": ids,
        "finish_reason": "stop",
        "stop_reason": ". ",
        "seed": 5,
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }
    assert timings["prompt_tokens_per_second"] == pytest.approx(3 / timings["prompt_seconds"])
    assert timings["decode_tokens_per_second"] == pytest.approx(3 / timings["decode_seconds"])
    assert timings["decode_seconds"] >= 0.006
    assert [(token["token_id"], token["token"]) for token in logprobs] == list(zip(ids, "ab. ", strict=True))
    assert all(len(token["top_logprobs"]) == 2 for token in logprobs)
    assert logprobs[0]["top_logprobs"][0] == {key: logprobs[0][key] for key in ("token_id", "token", "logprob")}


def test_samples_have_seeds_that_make_them_again(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(FakeLLM(None))

    def generate(*arguments: str) -> list[tuple[int, str]]:
        assert main(["generate", "x", "--json", "--max-tokens", "12", *arguments]) == 0
        results = map(json.loads, capsys.readouterr().out.splitlines())
        return [(result["seed"], result["text"]) for result in results]

    samples = generate("-n", "3", "--seed", "40")
    assert [seed for seed, _ in samples] == [40, 41, 42]
    assert len({text for _, text in samples}) == 3
    assert generate("--seed", "41") == samples[1:2]
    # Without a seed one is drawn, and told.
    (drawn,), (other,) = generate(), generate()
    assert drawn != other
    assert generate("--seed", str(drawn[0])) == [drawn]


# -- options --------------------------------------------------------------------------------------------------------


def test_every_option_arrives(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    calls = install(llm)
    seen: list[SamplingParams] = []
    stream = llm.engine.stream

    def watch(prompt: Any, params: Any = None) -> Any:
        seen.append(params)
        return stream(prompt, params)

    monkeypatch.setattr(llm.engine, "stream", watch)
    command = "generate x --json --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 3"
    command += " --max-tokens 9 --stop \\n --stop [ --stop-token-ids 364,365 --ignore-eos --logprobs 0"
    command += " --model folder --backend torch --weights bfloat16 --device cuda:1"
    assert main(command.split()) == 0
    assert seen[-1] == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=3,
        max_tokens=9,
        stop=("\n", "["),
        stop_token_ids=(364, 365),
        ignore_eos=True,
        logprobs=0,
    )
    asked = {"model": "folder", "backend": "torch", "weights": "bfloat16", "device": "cuda:1"}
    assert calls[0].items() >= {**asked, "num_threads": None, "kv_cache": "auto"}.items()

    assert main(["generate", "x", "--seed", "1"]) == 0
    assert seen[-1] == SamplingParams(**DEFAULTS, seed=1, max_tokens=200)
    assert main(["generate", "x", "--seed", "1", "--max-tokens", "none", "--top-k", "none"]) == 0
    assert seen[-1] == SamplingParams(**DEFAULTS, seed=1)
    assert calls[-1].items() >= {"model": None, "backend": "auto", "weights": "auto", "device": None}.items()


def test_the_default_of_max_tokens_gives_way_to_the_context(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(FakeLLM(None, context=60))
    assert main(["generate", "x" * 49, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"] == {
        "prompt_tokens": 50,
        "completion_tokens": 10,
        "total_tokens": 60,
    }
    assert main(["generate", "x" * 49, "--max-tokens", "11"]) == 1
    assert "lower max_tokens to 10" in one_line(capsys)


def test_there_is_an_option_for_every_field_and_choice() -> None:
    assert list(SAMPLING_OPTIONS) == list(SamplingParams.__dataclass_fields__)
    assert model_options.BACKENDS == gemma2.api.BACKENDS
    assert model_options.WEIGHTS == gemma2.api.WEIGHTS
    assert model_options.KV_CACHES == KV_CACHE_DTYPES


def test_escapes() -> None:
    assert read_escapes(r"a\nb\t\\n\u2014\d\u12") == "a\nb\t\\n—\\d\\u12"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from gemma2.cli.main import main\n"
        "for verb in ('generate', 'chat'):\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'numpy', 'torch', 'rich', 'prompt_toolkit', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(gemma2.api.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for default in ("0.8", "0.95", "200"):
        assert f"default: {default}" in shown


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1", "x"], "temperature must be a number of at least 0"),
        (["--temperature", "warm", "x"], "temperature must be a number, but is 'warm'"),
        (["--temperature", "nan", "x"], "temperature must be a number of at least 0"),
        (["--top-k", "1.5", "x"], "top_k must be a whole number, or none, but is '1.5'"),
        (["--top-p", "0", "x"], "top_p must be a number above 0"),
        (["--max-tokens", "0", "x"], "max_tokens must be a whole number of at least 1"),
        (["--seed", "9" * 5000, "x"], "seed must be"),
        (["--stop", "", "x"], "stop must hold no empty string"),
        (["--stop-token-ids", "1;2", "x"], "stop_token_ids must be token ids with commas between"),
        (["--logprobs", "21", "--json", "x"], "logprobs must be a whole number from 0 to 20"),
        (["--logprobs", "2", "x"], "--logprobs goes with --json"),
        (["-n", "0", "x"], "must be a whole number of at least 1"),
        (["--backend", "tpu", "x"], "invalid choice: 'tpu'"),
        (["--echo", "--json", "x"], "--echo goes with plain text"),
        (["--raw", "--chat", "x"], "not allowed with"),
        (["--raw", "--system", "a", "x"], "--system goes with the chat format"),
        (["--system", "a", "x"], "--system goes with the chat format"),
        (["--prompts", "file", "x"], "not both"),
        (["--tempratur", "1", "x"], "Did you mean '--temperature'?"),
        (["Once", "upon"], "a text with spaces needs quotes around it"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    install: Install, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    install(FakeLLM())
    assert message in usage_error(capsys, *arguments)


def test_a_terminal_without_a_prompt_is_asked_for_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "a prompt is needed" in usage_error(capsys)
    monkeypatch.setattr(sys, "stdin", None)
    assert "a prompt is needed" in usage_error(capsys)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "standard input is empty"),
        (b"\n", "standard input is empty"),
        (b"caf\xe9", "standard input: needs to be UTF-8, but byte 3 (0xe9) is not"),
    ],
)
def test_wrong_input_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    pipe_in(monkeypatch, data)
    assert main(["generate"]) == 1
    assert message in one_line(capsys)


def test_other_mistakes_are_one_line(
    install: Install, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = FakeLLM(fail_at=0)
    install(llm)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    long = tmp_path / "long.txt"
    long.write_text("short\n" + "x" * 400)
    for arguments, message in (
        ([""], "the prompt is empty"),
        (["x" * 400], "the prompt has 401 tokens, but the context holds 400"),
        (["a\udce9"], "half a surrogate pair"),
        (["x", "--stop-token-ids", "99999"], "stop_token_ids must be token ids from 0 to"),
        (["--prompts", str(empty)], "has no prompts"),
        (["--prompts", str(tmp_path / "none")], "cannot be read: No such file"),
        (["--prompts", str(long)], "the prompt has 401 tokens"),  # and nothing was written before
        (["x"], "logits are NaN"),
    ):
        assert main(["generate", *arguments]) == 1
        assert message in one_line(capsys), arguments

    def fail(*arguments: Any, **options: Any) -> None:
        raise CheckpointError("folder: has no config.json")

    monkeypatch.setattr(gemma2.api, "load", fail)
    assert main(["generate", "x"]) == 1
    assert one_line(capsys) == "gemma2: error: folder: has no config.json\n"


# -- Ctrl-C and terminals -------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_there_is(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(FakeLLM(["abcdef"], interrupt_at=(2,)))
    assert main(["generate", "x", "-n", "2"]) == 130
    assert capsys.readouterr().out.splitlines()[1:] == ["abc"]


def test_ctrl_c_keeps_what_there_is_in_json(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(FakeLLM(["abcdef"], interrupt_at=(2,)))
    assert main(["generate", "x", "--json"]) == 130
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["finish_reason"], len(result["token_ids"])) == ("abc", "abort", 3)


def test_ctrl_c_before_the_first_word(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    # The prompt is read in three steps, and the first is its last.
    llm = FakeLLM(["abcdef"], context=2000, interrupt_at=(0,))
    install(llm)
    assert main(["generate", "x" * 1200, "--json"]) == 130
    assert llm.fake_backend.num_steps == 1
    assert not llm.engine.has_unfinished_requests()
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["finish_reason"]) == ("", "abort")
    assert result["timings"]["prompt_tokens_per_second"] is None


def test_a_terminal_shows_the_prompt_dimmed_and_the_speed(tmp_path: Path) -> None:
    fake_model = {"answers": [" th\x1b[2Jere was."]}
    with Terminal("generate", "Once", "--seed", "5", fake_model=fake_model, folder=tmp_path) as terminal:
        assert terminal.wait_for_end() == 0
    raw = terminal.raw.decode()
    assert "\x1b[2mOnce\x1b[0m th[2Jere was.\r\n" in raw  # what a model writes cannot clear the screen
    assert raw.rstrip("\r\n").endswith("ended by itself · seed 5\x1b[0m")
    assert "5 prompt tokens at" in raw


def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    fake_model = {"answers": ["abcdefghij" * 20], "seconds": 0.05}
    with Terminal("generate", "Once", "--quiet", fake_model=fake_model, folder=tmp_path) as terminal:
        terminal.wait_for("abc")
        terminal.type("\x03")
        assert terminal.wait_for_end() == 130
    assert b"Traceback" not in terminal.raw
    assert terminal.raw.count(b"j") < 20
    assert terminal.raw.endswith(b"\r\n")
