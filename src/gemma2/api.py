"""`gemma2.load(...)`: joins files, backend and tokenizer. The only place that chooses between them.

llm = gemma2.load()                            the bundled model
llm = gemma2.load("google/gemma-2-2b-it")      one that was pulled; or a folder
llm.generate("Once upon a time", max_tokens=64, temperature=0).text
for piece in llm.stream("Once upon a time"): ...
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from gemma2.checkpoints import (
    generation_stop_ids,
    is_packed,
    open_adapter,
    open_checkpoint,
    open_packed,
    packed_model,
    resolve_model,
)
from gemma2.config import Gemma2Config
from gemma2.errors import (
    CheckpointError,
    ConfigError,
    Gemma2Error,
    MissingDependencyError,
    SamplingError,
    nearest_name,
)
from gemma2.generation import Completion, Engine, Prompt, TextDelta
from gemma2.sampling import SamplingParams
from gemma2.step import Backend, Logits
from gemma2.text import Message, Tokenizer, encode_chat

BUNDLED_FOLDER: Final = Path(__file__).parent / "bundled"
BACKENDS: Final = ("auto", "cpu", "torch")
WEIGHTS: Final = ("auto", "float32", "bfloat16", "q8", "q4")
SMALL_MODEL_PARAMETERS: Final = 20_000_000
"""Below this, "auto" computes in float32: it costs little memory, and decodes as fast on a CPU."""


class LLM:
    """A loaded model with its tokenizer. Several threads may use it at once; their texts share steps.

    Attributes:
        config: the architecture.
        tokenizer: text to ids and back.
        backend: what computes; see `gemma2.step.Backend`.
        engine: many requests at once, step by step; see `gemma2.generation.Engine`.
        is_chat_tuned: whether the model was tuned on the chat format. No file says so; it is taken for so if its
            `generation_config.json` (or `config.json`) ends answers at <end_of_turn>, as Google's "-it" models' does,
            or its name ends in "-it". A chat template says nothing: tokenizers carry it before any tuning.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        is_chat_tuned: bool = False,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.engine = Engine(backend, tokenizer)
        self.is_chat_tuned = is_chat_tuned
        self._stop_token_ids = tuple(stop_token_ids)

    @property
    def config(self) -> Gemma2Config:
        """The architecture."""
        return self.backend.config

    @overload
    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Any, params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """Continues a text, or several at once.

        Args:
            prompt: a text, which gets one <bos> in front, or token ids, taken as they are; or a list of either.
            params: how tokens are drawn and when to stop.
            **options: fields of `SamplingParams`, as in ``max_tokens=64, temperature=0``; they go before `params`.

        Returns:
            One completion for one prompt, a list of them for a list.

        Raises:
            SamplingError: an option is unknown or out of range.
            ContextLengthError: a prompt, or a prompt and `max_tokens`, is longer than the context.
        """
        own = self.sampling_params(params, **options)
        if _is_one_prompt(prompt):
            return self.engine.generate([prompt], own)[0]
        return self.engine.generate(prompt, own)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[str]:
        """Continues a text and gives out each piece as soon as it is certain; arguments as `generate`.

        Mistakes are raised here and now, before the first piece is asked for. Closing the iterator ends the request.
        If another thread's step for this text fails, the iterator raises Gemma2Error.
        """
        return _texts(self.engine.stream(prompt, self.sampling_params(params, **options)))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        strict_system: bool = False,
        **options: Any,
    ) -> Completion:
        """Answers a conversation.

        Args:
            messages: ``{"role": "user", "content": "…"}`` and ``{"role": "model", …}`` in turn, the last a user's. A
                "system" message may come first: its text is put in front of the first user turn.
            params: how tokens are drawn and when to stop.
            strict_system: whether to refuse system text, which Gemma 2 has no role for.
            **options: fields of `SamplingParams`.

        Raises:
            ChatFormatError: the format cannot express the messages.
            SamplingError, ContextLengthError: as `generate`.
        """
        token_ids = encode_chat(self.tokenizer, messages, strict_system=strict_system)
        return self.engine.generate([token_ids], self.sampling_params(params, **options))[0]

    def logits(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> Logits:
        """Computes the logits after each token of one sequence.

        Args:
            token_ids: (n,) ids, n from 1 to the context's length; none is added.

        Returns:
            (n, vocabulary) float32, final cap applied. For 8192 tokens over 256,000 words that is 7.8 GiB.

        Raises:
            ContextLengthError: there are more tokens than the context holds.
            Gemma2Error: there are no tokens, or one is not in the vocabulary.
        """
        return self.engine.logits(token_ids)

    def sampling_params(self, params: SamplingParams | None = None, **options: Any) -> SamplingParams:
        """Merges options into `params` and adds the tokens at which this model's own files end an answer.

        `generate`, `stream` and `chat` do so themselves; it is for those who talk to `engine`.

        Raises:
            SamplingError: an option is unknown or out of range.
        """
        if params is not None and not isinstance(params, SamplingParams):
            raise SamplingError(
                f"params must be a SamplingParams, but is {params!r:.80}; options go by name, as in max_tokens=64"
            )
        own = (SamplingParams() if params is None else params).replace(**options)
        if self._stop_token_ids and not own.ignore_eos:
            own = own.replace(stop_token_ids=(*own.stop_token_ids, *self._stop_token_ids))
        return own


def load(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    weights: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    num_threads: int | None = None,
    kv_cache: str = "auto",
    kv_cache_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> LLM:
    """Loads a model, which several threads may use at once.

    Args:
        model: a folder with config.json, safetensors and a tokenizer; one that `gemma2 quantize` wrote; the name of a
            model on the Hugging Face Hub that `gemma2 pull` has fetched; None for the bundled model.
        adapter: the folder of a LoRA adapter in PEFT's format, such as `gemma2 tune` writes. The CPU engine adds it to
            the weights as they run; in torch it is folded into them.
        backend: "cpu" for the compiled engine; "torch" for PyTorch; "auto" for torch where there is a CUDA device,
            else cpu.
        weights: "float32", "bfloat16", "q8" or "q4" (the last two in the CPU engine only). "auto": the format of a
            quantized folder; float32 for a model of under 20 million parameters; for others q4 in the CPU engine, and
            what the files hold in torch. The first time that a folder is quantized, the result is kept in a cache.
        device: "cpu", "cuda", "cuda:1", …; None or "auto" for the best there is.
        revision: branch, tag or commit, for a model from the hub.
        num_threads: threads of the CPU engine; None for one on each physical core.
        kv_cache: what the CPU engine keeps keys and values in: "float32", "bfloat16", "int8", or "auto": float32
            beside float32 weights, else bfloat16.
        kv_cache_bytes: the most memory that keys and values of the CPU engine may take; None for half of what the
            machine, or its container, has.
        progress: while weights are quantized, called with (bytes done, bytes in all).
        notify: given a sentence where something takes its time or is not as it seems: that a folder is quantized, and
            where that is kept; that packed weights lie unused beside others. None writes them to standard error.

    Raises:
        CheckpointError: there is no such model, or its files are incomplete or damaged.
        TokenizerError: its tokenizer is missing, damaged, or does not fit the model.
        ConfigError: an argument is out of range, or asks for what this machine or this version does not have.
        MissingDependencyError: PyTorch is asked for, and is not installed.
    """
    _refuse_unknown("backend", backend, BACKENDS)
    _refuse_unknown("weights", weights, WEIGHTS)
    if model is None and revision is not None:
        raise ConfigError(f"the bundled model has no revision {revision!r}; name a model on the hub, or leave it out")
    if model is None and not BUNDLED_FOLDER.is_dir():
        raise CheckpointError(f"{BUNDLED_FOLDER}: this installation has no bundled model; name a folder or a model")
    backend = _choose_backend(backend, weights=weights, device=device)
    if backend == "torch" and (num_threads is not None or kv_cache != "auto" or kv_cache_bytes is not None):
        raise ConfigError(
            "num_threads, kv_cache and kv_cache_bytes are settings of the CPU engine, but torch is to run the model"
        )
    folder = BUNDLED_FOLDER if model is None else resolve_model(model, revision=revision)
    # Reading a tokenizer takes as long as all the rest, and leaves Python free meanwhile.
    with ThreadPoolExecutor(max_workers=1) as executor:
        coming_tokenizer = executor.submit(Tokenizer.from_folder, folder)
        if backend == "torch":
            runner = _torch_backend(folder, adapter, weights, device)
        else:
            runner = _cpu_backend(
                folder,
                adapter,
                weights=weights,
                num_threads=num_threads,
                kv_cache=kv_cache,
                kv_cache_bytes=kv_cache_bytes,
                progress=progress,
                notify=notify or _write_to_stderr,
            )
        tokenizer = coming_tokenizer.result()
    tokenizer.check_fits(runner.config)
    stop_token_ids = generation_stop_ids(folder, runner.config)
    if adapter is not None:
        stop_token_ids |= generation_stop_ids(Path(adapter).expanduser(), runner.config)
    return LLM(
        runner,
        tokenizer,
        is_chat_tuned=tokenizer.end_of_turn_id in stop_token_ids or str(model or "").rstrip("/").endswith("-it"),
        stop_token_ids=sorted(stop_token_ids - tokenizer.stop_ids),
    )


def _choose_backend(backend: str, *, weights: str, device: str | None) -> str:
    """Resolves "auto", and refuses what does not go together."""
    wants_cpu = device in (None, "auto", "cpu")
    is_quantized = weights in ("q8", "q4")
    if backend == "auto":
        runs_on_cpu = is_quantized or device == "cpu" or (wants_cpu and not _has_cuda())
        backend = "cpu" if runs_on_cpu else "torch"
    if backend == "cpu" and not wants_cpu:
        raise ConfigError(
            f"device={device!r} is one of torch's, but the CPU engine is to run the model"
            + (f", as weights={weights!r} need it" if is_quantized else "")
            + "; leave the device out, or let torch run bfloat16 weights"
        )
    if backend == "torch" and is_quantized:
        raise ConfigError(f"weights={weights!r} run in the CPU engine only; torch takes float32 and bfloat16")
    return backend


def _has_cuda() -> bool:
    # Asking torch itself would load it, which takes seconds; most machines without a GPU have no driver either.
    if importlib.util.find_spec("torch") is None or not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


def _cpu_backend(
    folder: Path,
    adapter: str | Path | None,
    *,
    weights: str,
    num_threads: int | None,
    kv_cache: str,
    kv_cache_bytes: int | None,
    progress: Callable[[int, int], None] | None,
    notify: Callable[[str], None],
) -> Backend:
    from gemma2.cpu import CpuBackend, check_kv_cache, resolve_num_threads

    num_threads = resolve_num_threads(num_threads)
    check_kv_cache(kv_cache, kv_cache_bytes)  # not only after minutes of rounding
    if is_packed(folder):
        file = open_packed(folder)
        if weights not in ("auto", file.format):
            raise ConfigError(
                f"{folder}: its weights are {file.format}, and {weights} cannot be made of them; leave weights out, or "
                "quantize the original model"
            )
        added = None if adapter is None else open_adapter(adapter, file.config)
        packed = file.load(num_threads=num_threads)
    else:
        checkpoint = open_checkpoint(folder)
        added = None if adapter is None else open_adapter(adapter, checkpoint.config)  # before what takes a minute
        if weights == "auto":
            weights = "float32" if _is_small(checkpoint.config) else "q4"
        packed = packed_model(checkpoint, weights, num_threads=num_threads, progress=progress, notify=notify)
    return CpuBackend(packed, num_threads=num_threads, kv_cache=kv_cache, kv_cache_bytes=kv_cache_bytes, adapter=added)


def _torch_backend(folder: Path, adapter: str | Path | None, weights: str, device: str | None) -> Backend:
    if is_packed(folder):
        raise ConfigError(
            f"{folder}: holds weights for the CPU engine, which torch cannot run; name the original model"
        )
    checkpoint = open_checkpoint(folder)
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(
            "the torch backend needs PyTorch, which is not installed; install it with: pip install 'gemma2[torch]'"
        )
    from gemma2.model import TorchBackend, fold_adapter, load_model, pack_linear_layers
    from gemma2.model.device import choose_device

    if weights == "auto" and _is_small(checkpoint.config):
        weights = "float32"
    loaded = load_model(checkpoint, dtype=weights, device=choose_device(device or "auto", setting="device"))
    if adapter is not None:
        fold_adapter(loaded, open_adapter(adapter, checkpoint.config))
    pack_linear_layers(loaded)  # it will only be run
    return TorchBackend(loaded)


def _write_to_stderr(sentence: str) -> None:
    print(f"gemma2: {sentence}", file=sys.stderr, flush=True)


def _is_small(config: Gemma2Config) -> bool:
    return config.count_parameters().total < SMALL_MODEL_PARAMETERS


def _refuse_unknown(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"{name} must be one of {', '.join(known)}, but is {value!r}.{nearest_name(str(value), known)}"
        )


def _texts(deltas: Iterator[TextDelta]) -> Iterator[str]:
    for delta in deltas:
        if delta.text:
            yield delta.text
        if delta.finish_reason == "abort":
            raise Gemma2Error("the text was ended from outside: it was aborted, or a step that it shared failed")


def _is_one_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence | np.ndarray) and len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
