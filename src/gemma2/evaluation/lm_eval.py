"""A loaded model for lm-eval, EleutherAI's Language Model Evaluation Harness.

    import gemma2, lm_eval
    from gemma2.evaluation.lm_eval import HarnessModel
    lm_eval.simple_evaluate(HarnessModel(gemma2.load(...)), tasks=[...])

On a command line, `--model gemma2` means `gemma2.cli.lm_eval_model`, which loads the model too. Importing this module
imports lm-eval, which `pip install 'gemma2[eval]'` brings.

Texts are cut into tokens as lm-eval's own Hugging Face model does, so that scores can be compared. But every sequence
begins with exactly one <bos>: also one that lost its beginning to fit the context, and the later parts of a long text.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from lm_eval.api.model import LM
from tqdm import tqdm

from gemma2.errors import ConfigError, ContextLengthError, nearest_name
from gemma2.generation import ContinuationScore, ScoringTask
from gemma2.sampling import SamplingParams
from gemma2.step import TokenIds
from gemma2.text import Message, render_chat
from gemma2.text.chat import CHAT_TEMPLATE
from gemma2.text.layout import BOS, END_OF_TURN

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from gemma2.api import LLM

DEFAULT_MAX_GEN_TOKS: Final = 256
"""Of an answer whose task does not say; lm-eval's own default."""

_LENGTHS: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING: Final = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
_GENERATION: Final = ("until", "do_sample", "temperature", *_LENGTHS, *_SAMPLING)


class HarnessModel(LM):  # type: ignore[misc]
    """lm-eval's view of a model.

    A context that several continuations share is read once, and short ones share steps of the model, as many as fit;
    lm-eval's `batch_size` has no say in that.

    Args:
        llm: the model. Nothing else may use its engine meanwhile.
        max_length: tokens that it reads at once; all that it can if left out.
        max_gen_toks: the most tokens of an answer whose task does not say.

    Raises:
        ConfigError: `max_length` or `max_gen_toks` is out of range.
    """

    def __init__(self, llm: LLM, *, max_length: int | None = None, max_gen_toks: int = DEFAULT_MAX_GEN_TOKS) -> None:
        super().__init__()
        limit = llm.config.max_position_embeddings
        max_length = limit if max_length is None else max_length
        if not 2 <= max_length <= limit:
            raise ConfigError(f"max_length must be from 2 to {limit}, what the model reads, but is {max_length}")
        if max_gen_toks < 1:
            raise ConfigError(f"max_gen_toks must be at least 1, but is {max_gen_toks}")
        self.max_length = max_length
        self.max_gen_toks = max_gen_toks
        self._llm = llm

    # -- scores -------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Scores continuations of contexts.

        Args:
            requests: their `args` are (context, continuation), two texts. A context that is too long loses its
                beginning, but not its <bos>.
            disable_tqdm: whether to show no progress.

        Returns:
            For each, the sum of the log-probabilities of the continuation's tokens, and whether each is the likeliest.

        Raises:
            ContextLengthError: a continuation alone is longer than the context.
        """
        # One task for each context, in the order in which they first come.
        sharing: dict[bytes, list[int]] = defaultdict(list)
        pairs = [self._shortened_pair(*request.args) for request in requests]
        for index, (context, _) in enumerate(pairs):
            sharing[context.tobytes()].append(index)
        tasks = (
            ScoringTask(context=pairs[indices[0]][0], continuations=tuple(pairs[index][1] for index in indices))
            for indices in sharing.values()
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for indices, scores in zip(sharing.values(), self._llm.engine.score_continuations(tasks), strict=True):
                for index, score in zip(indices, scores, strict=True):
                    answers[index] = (_sum(score), score.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[index].args, answers[index])
                bar.update(len(indices))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, of any length.

        As lm-eval defines it (lm_eval.utils.get_rolling_token_windows), a text that is longer than the context is
        scored in parts as long as the context, each read without those before; only the last, shorter part is read with
        as much text before it as there is room for. Where lm-eval's own model begins a later part with the token
        before it, this one begins it with <bos>. (`gemma2 eval` gives all tokens more context.)

        Args:
            requests: their `args` are (text,).
            disable_tqdm: whether to show no progress.

        Returns:
            For each, the sum of the log-probabilities of all its tokens.
        """
        owners: deque[int] = deque()

        def tasks() -> Iterator[ScoringTask]:
            for index, request in enumerate(requests):
                token_ids = self._encode(request.args[0])
                bos, token_ids = token_ids[:1], token_ids[1:]
                for first in range(0, len(token_ids), self.max_length):
                    last = min(first + self.max_length, len(token_ids))
                    before = token_ids[max(0, last - self.max_length) : first]
                    owners.append(index)
                    yield ScoringTask(context=np.concatenate([bos, before]), continuations=(token_ids[first:last],))

        sums = [0.0] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood_rolling") as bar:
            num_shown = 0
            for (score,) in self._llm.engine.score_continuations(tasks()):
                index = owners.popleft()
                sums[index] += _sum(score)
                bar.update(index - num_shown)
                num_shown = index
            bar.update(len(requests) - num_shown)
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    # -- texts --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues texts.

        Args:
            requests: their `args` are (context, options). Options are `until` (texts that end the answer and are no
                part of it), `max_gen_toks`, `do_sample`, `temperature`, and `top_k`, `top_p`, `min_p`,
                `repetition_penalty` and `seed` as in `SamplingParams`. Without `do_sample` or a temperature the
                likeliest token is taken each time. A context that leaves too little room for the answer loses its
                beginning, but not its <bos> and never more than half of what the model reads.
            disable_tqdm: whether to show no progress.

        Raises:
            ConfigError: an option is not known.
            SamplingError: an option is out of range.
        """
        engine = self._llm.engine
        # All options are checked before the first text is made.
        generations = [self._generation(*request.args, seed=number) for number, request in enumerate(requests)]
        numbers: dict[str, int] = {}
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            try:
                for number, generation in enumerate(generations):
                    numbers[engine.add_request(*generation)] = number
                while numbers:
                    for delta in engine.step():
                        if delta.completion is None or delta.request_id not in numbers:
                            continue
                        number = numbers.pop(delta.request_id)
                        texts[number] = delta.completion.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                        bar.update(1)
            finally:
                for request_id in numbers:
                    engine.abort(request_id)
        return texts

    def _generation(self, context: str, options: Mapping[str, Any], *, seed: int) -> tuple[TokenIds, SamplingParams]:
        for name in options:
            if name not in _GENERATION:
                raise ConfigError(
                    f"the task asks for the generation option {name!r}, but gemma2 knows only "
                    f"{', '.join(_GENERATION)}.{nearest_name(name, _GENERATION)}"
                )
        until = options.get("until") or ()
        do_sample = options.get("do_sample")
        temperature = options.get("temperature")
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        max_gen_toks = next((int(options[name]) for name in _LENGTHS if options.get(name)), self.max_gen_toks)
        token_ids = self._encode(context)
        room = max(self.max_length - max_gen_toks, self.max_length // 2)
        token_ids = _without_beginning(token_ids, room)
        params = self._llm.sampling_params(
            max_tokens=min(max_gen_toks, self.max_length - len(token_ids)),
            temperature=0.0 if do_sample is False else temperature,
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
            **{"seed": seed, **{name: options[name] for name in _SAMPLING if options.get(name) is not None}},
        )
        return token_ids, params

    # -- chat ---------------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Writes messages in Gemma's chat format, <bos> included.

        Args:
            chat_history: the messages; a system message's text goes before the first user's.
            add_generation_prompt: whether to ask for an answer; if not, the last message is one that shall go on.

        Raises:
            ChatFormatError: the format cannot express the messages.
        """
        text = render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        return text if add_generation_prompt else text.removesuffix(f"{END_OF_TURN}\n")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat format as a Jinja template, for lm-eval's log; empty if it is not used.

        Raises:
            ConfigError: another template is asked for.
        """
        if isinstance(chat_template, str):
            raise ConfigError(f"Gemma 2 has one chat format and no template {chat_template!r}; leave the name out")
        return CHAT_TEMPLATE if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm-eval's cache of requests."""
        return self._llm.tokenizer.source.replace("/", "__")

    # -- tokens -------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> TokenIds:
        """Ids with one <bos> first. Control tokens count as such only where `apply_chat_template` made the text."""
        tokenizer = self._llm.tokenizer
        ids = tokenizer.encode_with_control(text) if text.startswith(BOS) else tokenizer.encode(text)
        return np.array(ids, dtype=np.int32)

    def _encode_pair(self, context: str, continuation: str) -> tuple[TokenIds, TokenIds]:
        """Cuts a pair as lm-eval does: as one text, the spaces at the context's end being the continuation's.

        A continuation whose first letters would join the context's last token has that token scored as its own.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        context_ids, whole = self._encode(stripped), self._encode(stripped + continuation)
        if len(whole) <= len(context_ids):
            alike = np.flatnonzero(whole != context_ids[: len(whole)])
            context_ids = whole[: max(1, int(alike[0]) if len(alike) else len(whole) - 1)]
        return context_ids, whole[len(context_ids) :]

    def _shortened_pair(self, context: str, continuation: str) -> tuple[TokenIds, TokenIds]:
        """A pair that fits: the model reads the context and the continuation but for its last token."""
        context_ids, continuation_ids = self._encode_pair(context, continuation)
        if len(continuation_ids) > self.max_length:
            raise ContextLengthError(
                f"a continuation has {len(continuation_ids)} tokens, but the model reads {self.max_length}; it begins "
                f"with {continuation[:60]!r}"
            )
        return _without_beginning(context_ids, self.max_length + 1 - len(continuation_ids)), continuation_ids


def _sum(score: ContinuationScore) -> float:
    return float(score.logprobs.sum(dtype=np.float64))


def _without_beginning(token_ids: TokenIds, room: int) -> TokenIds:
    """<bos>, and of what follows as much of the end as there is room for."""
    if len(token_ids) <= room:
        return token_ids
    return np.concatenate([token_ids[:1], token_ids[len(token_ids) - room + 1 :]])
