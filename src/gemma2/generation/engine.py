"""`Engine`: the loop that turns prompts into text. It joins scheduler, backend, sampler and detokenizer."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from numbers import Integral
from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from gemma2.config import Gemma2Config
from gemma2.errors import ContextLengthError, Gemma2Error, SamplingError
from gemma2.generation.request import Completion, Request, TextDelta
from gemma2.generation.scheduler import Schedule, Scheduler
from gemma2.generation.scoring import ContinuationScore, ScoringTask, score, score_continuations
from gemma2.generation.turns import Turns
from gemma2.sampling import SamplingParams
from gemma2.step import Backend, Logits, SequenceStep, StepBatch, TokenIds
from gemma2.text import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer]
"""A text, which gets one <bos> in front, or token ids, which are taken as they are."""

DEFAULT_MAX_NUM_SEQS: Final = 32
DEFAULT_MAX_NUM_BATCHED_TOKENS: Final = 512
"""Long enough that a prompt's products are bound by arithmetic, short enough that neighbours decode without a gap."""


class Engine:
    """Runs many requests through one backend at once.

    A request's tokens do not depend on its neighbours (as far as the backend's arithmetic does not), and with a seed
    they are the same every time. One engine may use a backend, since the ids of sequences are the engine's.

    Several threads may use an engine. They take turns: whichever has one runs a step for the requests of all, so that
    these share it. An error in a step, Ctrl-C too, ends all requests of that step, whoever made them.

    Args:
        backend: the model.
        tokenizer: the one the model was trained with.
        max_num_seqs: the most requests that run at once; each has a cache in the backend, the others wait.
        max_num_batched_tokens: the most tokens of one step; longer prompts are read in chunks.

    Raises:
        TokenizerError: the tokenizer does not fit the model.
        ConfigError: a limit is out of range.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS,
    ) -> None:
        tokenizer.check_fits(backend.config)
        self._backend = backend
        self._tokenizer = tokenizer
        self._max_num_batched_tokens = max_num_batched_tokens
        self._scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            free_sequence=backend.free,
        )
        # A model may have more rows than there are words (Gemma's JAX checkpoints: 256128). Those are never drawn.
        self._vocab_size = tokenizer.vocab_size
        self._numbers = itertools.count()
        self._requests: dict[str, Request] = {}  # the unfinished ones
        # Deltas for `generate` and `stream`, which know what they wait for, and those for whoever calls `step`. So
        # several streams and `step` can take turns, and none takes what another waits for.
        self._inboxes: dict[str, deque[TextDelta]] = {}
        self._unclaimed: list[TextDelta] = []
        # Requests to end, and whether their inboxes go too. They are ended by whoever holds the turn: a generator may
        # be dropped anywhere, by the collector of garbage even amid a step of its own thread, and cannot wait for it.
        self._to_end: deque[tuple[Request, bool]] = deque()
        self._turns = Turns(after=self._end_requests)
        """Held while requests are changed or the backend is used; never while a caller has the word."""
        self._backend_by_turns = _ByTurns(backend, self._turns)

    # -- whole texts --------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completes prompts, as many at once as `max_num_seqs` allows.

        Args:
            prompts: one prompt or several, each a text or token ids.
            params: one for all, or one for each; left out, the defaults.

        Returns:
            One completion for each prompt, in order.

        Raises:
            ContextLengthError: a prompt, or a prompt and its `max_tokens`, is longer than the context.
            Gemma2Error: a prompt is empty or holds an unknown token; there are not as many params as prompts.
            RuntimeError: a step that another thread ran for these prompts too failed; Gemma2Error if that did.
        """
        listed = _as_list(prompts)
        each = _for_each(params, len(listed))
        # All are checked before the first one runs.
        requests = [self._new_request(prompt, own) for prompt, own in zip(listed, each, strict=True)]
        inbox: deque[TextDelta] = deque()
        completions: dict[str, Completion] = {}
        try:
            for request in requests:
                self._add(request, inbox)
            while len(completions) < len(requests):
                self._run_step_unless(inbox)
                while inbox:
                    delta = inbox.popleft()
                    if delta.completion is not None:
                        completions[delta.request_id] = delta.completion
            for request in requests:
                if request.error is not None:
                    raise _retold(request.error) from request.error
        finally:
            for request in requests:
                self._discard(request)
        return [completions[request.request_id] for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TextDelta, None, None]:
        """Completes a prompt and gives out each part of the text as soon as it is certain.

        The last delta has the completion. Closing the generator early, or dropping it, ends the request. If a step
        fails that another thread, or another generator, ran for this request too, its finish reason is "abort".

        Args:
            prompt: a text or token ids.
            params: left out, the defaults.

        Raises:
            ContextLengthError: the prompt, or the prompt and its `max_tokens`, is longer than the context.
            Gemma2Error: the prompt is empty or holds an unknown token.
        """
        # Checked here and now; the generator's own body would run only when the first delta is asked for.
        return self._stream(self._new_request(prompt, params))

    def _stream(self, request: Request) -> Generator[TextDelta, None, None]:
        inbox: deque[TextDelta] = deque()
        self._add(request, inbox)
        try:
            while True:
                while not inbox:
                    self._run_step_unless(inbox)
                delta = inbox.popleft()
                yield delta
                if delta.completion is not None:
                    return
        finally:
            self._discard(request)

    def score(self, tokens: Prompt) -> npt.NDArray[np.float32]:
        """Computes the log-probability of each token after the first, given those before it.

        Args:
            tokens: a text or token ids, n in all; at most as many as the context holds.

        Returns:
            (n - 1,) float32, base e. Logits are made and dropped in chunks, never for the whole text.

        Raises:
            ContextLengthError: the text is longer than the context.
            Gemma2Error: there are no tokens, or one is unknown.
        """
        token_ids = self._token_ids(tokens)
        self._refuse_more_than_the_context(token_ids, "score it in parts")
        return score(
            self._backend_by_turns,
            token_ids,
            sequence_id=self._scheduler.new_sequence_id(),
            vocab_size=self._vocab_size,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def score_continuations(self, tasks: Iterable[ScoringTask]) -> Generator[tuple[ContinuationScore, ...], None, None]:
        """Scores continuations of contexts, many at once; see `gemma2.generation.score_continuations`.

        Args:
            tasks: taken one by one as there is room for them. A context and its longest continuation have at most one
                token more than the context holds, as the last one is never read.

        Yields:
            For each task, in order, a score for each of its continuations.
        """
        return score_continuations(
            self._backend_by_turns,
            tasks,
            new_sequence_id=self._scheduler.new_sequence_id,
            vocab_size=self._vocab_size,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def logits(self, tokens: Prompt) -> Logits:
        """Computes the logits after each token of one sequence.

        Args:
            tokens: a text or token ids, n in all; at most as many as the context holds.

        Returns:
            (n, vocabulary) float32, final cap applied. For 8192 tokens over 256,000 words that is 7.8 GiB.

        Raises:
            ContextLengthError: the text is longer than the context.
            Gemma2Error: there are no tokens, or one is unknown.
        """
        token_ids = self._token_ids(tokens)
        self._refuse_more_than_the_context(token_ids, "ask for the logits of a part")
        sequence_id = self._scheduler.new_sequence_id()
        step = SequenceStep(sequence_id=sequence_id, token_ids=token_ids, position=0, num_logits=len(token_ids))
        try:
            return self._backend_by_turns.forward(StepBatch(steps=(step,)))
        finally:
            self._backend_by_turns.free(sequence_id)

    def _refuse_more_than_the_context(self, token_ids: TokenIds, what_to_do: str) -> None:
        limit = self._backend.config.max_position_embeddings
        if len(token_ids) > limit:
            raise ContextLengthError(
                f"the text has {len(token_ids)} tokens, but the context holds {limit} (max_position_embeddings); "
                f"{what_to_do}"
            )

    # -- step by step, for a server -----------------------------------------------------------------------------

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queues a request, whose deltas `step` will return.

        Args:
            prompt: a text or token ids.
            params: left out, the defaults.
            request_id: a name that no unfinished request has; left out, one is made.

        Returns:
            The request's id.

        Raises:
            ContextLengthError: the prompt, or the prompt and its `max_tokens`, is longer than the context.
            Gemma2Error: the prompt is empty or holds an unknown token, or the id is taken.
        """
        request = self._new_request(prompt, params, request_id)
        self._add(request, None)
        return request.request_id

    def step(self) -> list[TextDelta]:
        """Runs one batch.

        Returns:
            What it added to requests that came by `add_request`, at most one delta each; empty while prompts are
            still being read. Deltas of requests that were aborted since the last step come as well.

        Raises:
            SamplingError: logits hold NaN or infinity. Then, as after any error of the backend, the requests of this
                batch are aborted, since their caches are in no known state; the others go on.
        """
        with self._turns:
            self._run_step()
            deltas, self._unclaimed = self._unclaimed, []
        return deltas

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its cache; its last delta, with finish reason "abort", goes where the others went.

        An id that is not known, or no longer, is no error: the request may just have finished.
        """
        with self._turns:
            request = self._requests.get(request_id)
            if request is not None and self._turns.depth > 1:  # called by a signal's handler, amid a step
                self._to_end.append((request, False))
            elif request is not None:
                self._end(request)

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to run or to return."""
        return bool(self._requests or self._unclaimed)

    @property
    def num_waiting(self) -> int:
        """How many requests wait for their first step."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """How many requests have a cache in the backend."""
        return self._scheduler.num_running

    # -- the loop's body ----------------------------------------------------------------------------------------

    def _run_step_unless(self, inbox: deque[TextDelta]) -> None:
        """Waits for a turn, and runs a step if until then nobody's has brought anything."""
        with self._turns:
            if not inbox:
                self._run_step()

    def _run_step(self) -> None:
        schedule = self._scheduler.schedule()
        if schedule is None:
            return
        try:
            self._run(schedule)
        except BaseException as error:  # Ctrl-C as well
            for request in schedule.requests:
                if not request.is_finished:
                    request.error = error
                    self._end(request)
            raise

    def _run(self, schedule: Schedule) -> None:
        logits = self._backend.forward(schedule.batch)
        num_rows = sum(step.num_logits for step in schedule.batch.steps)
        assert logits.shape == (num_rows, self._backend.config.vocab_size), f"the backend gave logits {logits.shape}"
        self._scheduler.mark_computed(schedule)
        rows = iter(logits)
        for request, step in zip(schedule.requests, schedule.batch.steps, strict=True):
            if step.num_logits:
                self._deliver(request, request.draw(next(rows)[: self._vocab_size]))

    def _add(self, request: Request, inbox: deque[TextDelta] | None) -> None:
        with self._turns:
            if request.request_id in self._requests:
                raise Gemma2Error(
                    f"request_id {request.request_id!r} is taken by an unfinished request; give another one"
                )
            self._requests[request.request_id] = request
            if inbox is not None:
                self._inboxes[request.request_id] = inbox
            self._scheduler.add(request)

    def _deliver(self, request: Request, delta: TextDelta) -> None:
        if request.is_finished:
            del self._requests[request.request_id]
            self._scheduler.remove(request)
        inbox = self._inboxes.get(request.request_id)
        (self._unclaimed if inbox is None else inbox).append(delta)

    def _end(self, request: Request) -> None:
        """Aborts a request, if it was added and has not ended."""
        if self._requests.get(request.request_id) is request:
            self._deliver(request, request.abort())

    def _discard(self, request: Request) -> None:
        """Ends a request of `generate` or `stream` that nobody waits for any more."""
        self._to_end.append((request, True))
        self._end_requests()

    def _end_requests(self) -> None:
        """Ends what is in `_to_end`; if a turn is held, that is done after it."""
        while self._to_end and self._turns.take_if_free():
            try:
                while self._to_end:
                    request, drops_inbox = self._to_end.popleft()
                    self._end(request)
                    if drops_inbox:
                        self._inboxes.pop(request.request_id, None)
            finally:
                self._turns.give_back()

    # -- what comes in ------------------------------------------------------------------------------------------

    def _new_request(self, prompt: Prompt, params: SamplingParams | None, request_id: str | None = None) -> Request:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise Gemma2Error(
                f"params must be a SamplingParams, but is a {type(params).__name__}; SamplingParams.from_dict makes "
                "one of names and values"
            )
        for token_id in params.stop_token_ids:
            if token_id >= self._vocab_size:
                raise SamplingError(
                    f"stop_token_ids must be token ids from 0 to {self._vocab_size - 1}, but holds {token_id}"
                )
        token_ids = self._token_ids(prompt)
        return Request(
            request_id=self._new_id() if request_id is None else request_id,
            prompt_token_ids=token_ids,
            params=params,
            tokenizer=self._tokenizer,
            max_tokens=self._max_tokens(len(token_ids), params),
        )

    def _new_id(self) -> str:
        return next(name for number in self._numbers if (name := f"request-{number}") not in self._requests)

    def _token_ids(self, prompt: Prompt) -> TokenIds:
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, add_bos=True)
        try:
            token_ids = np.asarray(prompt)
        except ValueError:  # lists of unlike lengths
            token_ids = np.asarray(None)
        if token_ids.size == 0:
            raise Gemma2Error("a prompt needs at least one token, but has none; begin it with <bos>")
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise Gemma2Error(
                f"a prompt must be a text or a flat list of token ids (whole numbers), but is {_shortened(prompt)}"
            )
        outside = np.flatnonzero((token_ids < 0) | (token_ids >= self._vocab_size))
        if len(outside):
            raise Gemma2Error(
                f"token ids go from 0 to {self._vocab_size - 1}, but the prompt's token at position {outside[0]} "
                f"is {token_ids[outside[0]]}"
            )
        return token_ids.astype(np.int32)

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        limit = self._backend.config.max_position_embeddings
        room = limit - num_prompt_tokens
        context = f"the context holds {limit} (max_position_embeddings)"
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {num_prompt_tokens} tokens, but {context}, the answer included; "
                f"shorten the prompt to at most {limit - 1} tokens"
            )
        if params.max_tokens is None:
            return room
        if params.max_tokens > room:
            raise ContextLengthError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens is {params.max_tokens}, together "
                f"{num_prompt_tokens + params.max_tokens}, but {context}; lower max_tokens to {room} or less, leave it "
                f"out to go on to the context's end, or shorten the prompt"
            )
        return params.max_tokens


class _ByTurns(Backend):
    """A backend of which each use waits for a turn."""

    def __init__(self, backend: Backend, turns: Turns) -> None:
        self._backend = backend
        self._turns = turns

    @property
    def config(self) -> Gemma2Config:
        return self._backend.config

    @property
    def weights(self) -> str:
        return self._backend.weights

    def forward(self, batch: StepBatch) -> Logits:
        with self._turns:
            return self._backend.forward(batch)

    def fork(self, parent_id: int, child_id: int) -> None:
        with self._turns:
            self._backend.fork(parent_id, child_id)

    def free(self, sequence_id: int) -> None:
        with self._turns:
            self._backend.free(sequence_id)


def _retold(error: BaseException) -> Exception:
    """What to raise for an error that was another thread's."""
    if isinstance(error, Gemma2Error):
        return type(error)(str(error))
    return RuntimeError(f"a step that these prompts shared with others failed: {error!r}")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Makes a list of prompts of one prompt or several."""
    if isinstance(prompts, str) or not isinstance(prompts, (Sequence, np.ndarray)):
        return [prompts]
    is_one = prompts.ndim == 1 if isinstance(prompts, np.ndarray) else any(isinstance(p, Integral) for p in prompts[:1])
    return cast("Sequence[Prompt]", [prompts] if is_one else prompts)


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> Sequence[SamplingParams]:
    """Makes one SamplingParams for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise Gemma2Error(
            f"params must be one SamplingParams for all prompts or one for each, but there are {num_prompts} prompts "
            f"and {len(params)} params"
        )
    return params


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
