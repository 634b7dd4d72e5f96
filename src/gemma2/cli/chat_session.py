"""A chat: the conversation, the settings, and the turns that the model takes in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from gemma2.cli.conversation import Conversation, Exchange, View, chat_view, text_view
from gemma2.cli.sampling_options import DEFAULT_MAX_TOKENS, DEFAULTS
from gemma2.cli.streaming import DIM, Answer, TextWriter, stream_answer
from gemma2.errors import Gemma2Error

if TYPE_CHECKING:
    from gemma2.api import LLM
    from gemma2.sampling import SamplingParams

WITHOUT: Final = ("logprobs",)
"""The sampling options that a chat has no place to show."""


class Screen(Protocol):
    """Where a chat is typed and shown: a terminal, or plain pipes."""

    is_interactive: bool
    """Whether a person is there, who can be asked."""

    def read(self) -> str | None:
        """Returns the next message or command; None when there are no more."""
        ...

    def confirm(self, question: str) -> bool:
        """Asks a person for yes or no."""
        ...

    def answer(self) -> TextWriter:
        """Returns what writes the model's text."""
        ...

    def say(self, text: str) -> None:
        """Shows what a command was asked for."""
        ...

    def notice(self, text: str) -> None:
        """Shows what nobody asked for, but may want to know."""
        ...

    def error(self, text: str) -> None:
        """Shows what went wrong."""
        ...


class ChatSession:
    """What commands and messages change.

    Args:
        llm: the model.
        model_name: what to call it in saved files.
        screen: where to show answers.
        settings: sampling options that differ from the defaults.
        system: the system text.
    """

    def __init__(
        self, llm: LLM, *, model_name: str, screen: Screen, settings: Mapping[str, Any], system: str = ""
    ) -> None:
        from gemma2.sampling import SamplingParams

        self.llm = llm
        self.model_name = model_name
        self.screen = screen
        self.conversation = Conversation(system=system)
        self.was_interrupted = False
        """Whether the last answer was stopped by Ctrl-C."""
        default_max_tokens = None if llm.is_chat_tuned else DEFAULT_MAX_TOKENS
        self.params: SamplingParams = SamplingParams(**{**DEFAULTS, "max_tokens": default_max_tokens, **settings})
        self._num_retries = 0
        self._view = View(token_ids=[])

    @property
    def context(self) -> int:
        """How many tokens the model's context holds."""
        return self.llm.config.max_position_embeddings

    def send(self, message: str) -> None:
        """Sends a message and shows the answer.

        Raises:
            Gemma2Error: it does not fit the context, or the model failed; the conversation is as it was before.
        """
        self._num_retries = 0
        # The words of a model bring the space before them along; after another one it would hardly find a word.
        self._take_turn(Exchange(user=message if self.llm.is_chat_tuned else message.rstrip(" ")))

    def go_on(self) -> None:
        """Lets the model go on where it stopped.

        Raises:
            Gemma2Error: there is nothing to go on from, or no room for it.
        """
        self._num_retries = 0
        if not self.llm.is_chat_tuned:
            if not self.conversation.exchanges and not self.conversation.system:
                raise Gemma2Error("there is no text yet to go on from; type how it begins")
            self._take_turn(Exchange(user=""))
            return
        self._take_turn(self._last("go on with"), replaces_last=True)

    def retry(self) -> None:
        """Drops the last answer and asks for another one.

        Raises:
            Gemma2Error: there is none, or the model failed; then the answer stays.
        """
        last = self._last("try again")
        if self.params.is_greedy:
            self.screen.notice("at temperature 0 the answer stays the same; /set temperature 0.8 lets it differ")
        self._num_retries += 1
        self._take_turn(Exchange(user=last.user), replaces_last=True)

    def undo(self) -> Exchange:
        """Drops the last exchange and returns it.

        Raises:
            Gemma2Error: there is none.
        """
        last = self._last("undo")
        self.replace_conversation(
            Conversation(system=self.conversation.system, exchanges=self.conversation.exchanges[:-1])
        )
        return last

    def replace_conversation(self, conversation: Conversation) -> None:
        """Goes on with another conversation."""
        self.conversation = conversation
        self._num_retries = 0
        self._view = View(token_ids=[])

    def _last(self, what: str) -> Exchange:
        if not self.conversation.exchanges:
            raise Gemma2Error(f"there is no answer yet to {what}")
        return self.conversation.exchanges[-1]

    def _take_turn(self, pending: Exchange, *, replaces_last: bool = False) -> None:
        """Lets the model write the answer of `pending`, after what it may have already, and keeps the exchange."""
        earlier = self.conversation.exchanges[: -1 if replaces_last else None]
        view, params = self._prepare(Conversation(system=self.conversation.system, exchanges=earlier), pending)
        self._tell_what_is_hidden(view)
        writer = self.screen.answer()
        try:
            answer = stream_answer(self.llm, view.token_ids, params, writer.write)
            if answer.is_interrupted and self.screen.is_interactive:
                writer.write(" [stopped]", DIM)
        finally:
            writer.end()
        self._view = view
        self.was_interrupted = answer.is_interrupted
        if answer.is_interrupted and not answer.text:
            self.screen.notice("stopped before the first word, so nothing was added to the conversation")
            return
        exchange = Exchange(
            user=pending.user, answer=pending.answer + answer.text, is_interrupted=answer.is_interrupted
        )
        self.conversation.exchanges = [*earlier, exchange]
        self.screen.notice(self._describe(answer))

    def _prepare(self, conversation: Conversation, pending: Exchange) -> tuple[View, SamplingParams]:
        max_tokens = self.params.max_tokens
        # What the conversation must leave free: the answer asked for, but it keeps at least half of the context.
        reserved = self.context // 4 if max_tokens is None else min(max_tokens, self.context // 2)
        show = chat_view if self.llm.is_chat_tuned else text_view
        view = show(self.llm.tokenizer, conversation, pending, limit=self.context - reserved, context=self.context)
        room = self.context - len(view.token_ids)
        params = self.params.replace(max_tokens=room if max_tokens is None else min(max_tokens, room))
        if params.seed is not None:
            params = params.replace(seed=params.seed + self._num_retries)
        return view, params

    def _tell_what_is_hidden(self, view: View) -> None:
        full = f"the context of {self.context:,} tokens is full"
        keeping = "; the system text stays" if self.conversation.system else ""
        if view.num_hidden_exchanges > self._view.num_hidden_exchanges:
            number = view.num_hidden_exchanges
            which = "oldest exchange" if number == 1 else f"{number} oldest exchanges"
            self.screen.notice(f"{full}: the model no longer sees the {which}{keeping}")
        if view.num_hidden_tokens and not self._view.num_hidden_tokens:
            self.screen.notice(f"{full}: from now on the model no longer sees the beginning of the text{keeping}")

    def _describe(self, answer: Answer) -> str:
        used = answer.num_prompt_tokens + len(answer.token_ids)
        parts = [answer.describe_speed(), f"context {used:,} of {self.context:,}"]
        if not answer.text:
            parts.append("the model ended here without a word")
        elif answer.finish_reason == "length" and self.llm.is_chat_tuned:
            parts.append("cut off; /more goes on")
        return " · ".join(parts)
