"""The forms in which examples come, which of them a source has, and what a record of each says.

messages            messages                    OpenAI's and Hugging Face's: role and content
sharegpt            conversations               the same as from and value, of human and gpt
prompt_completion   prompt, completion          texts, or lists of messages
question_answer     question, answer
alpaca              instruction, output, input  the input may be missing
text                text                        no turns: all of it is learned
preference          chosen, rejected, prompt    answers to the prompt, or conversations with a common beginning
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gemma2.data.examples import Conversation, Example, PlainText, PreferencePair, PromptCompletion, in_turns
from gemma2.data.fields import SYSTEM_COLUMN, Fields
from gemma2.data.records import Record
from gemma2.data.sources import shown_keys
from gemma2.errors import DataError, nearest_name
from gemma2.text.chat import Message

Format = Literal["auto", "messages", "sharegpt", "prompt_completion", "question_answer", "alpaca", "text", "preference"]
"""The name of a form, or "auto" to tell it from the columns."""

NUM_RECORDS_TO_TELL: Final = 16
"""How many of a source's first records tell which form it has."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of examples."""

    name: Format
    needed: tuple[str, ...]
    """Its columns."""
    optional: tuple[str, ...] = ()
    """Columns that a record need not have."""
    read: Callable[[Fields], Example]
    """What a record says. Raises `ExampleError`."""

    @property
    def in_words(self) -> str:
        """Such as "prompt_completion (prompt, completion)"."""
        return f"{self.name} ({', '.join(self.needed)})"


@dataclass(frozen=True, kw_only=True)
class FormChoice:
    """Which form a source has, and why."""

    source: str
    form: Form
    why: str
    """Such as "its columns are 'question', 'answer'"."""

    def __str__(self) -> str:
        return f"{self.source}: {self.form.name}, as {self.why}"


def check_columns(columns: Mapping[str, str], format: Format) -> None:
    """Checks that `columns` names fields of the form, or of any if the form is still to be told.

    Raises:
        DataError: a field is not known.
    """
    forms = [form for form in _FORMS if format in ("auto", form.name)]
    known = list(dict.fromkeys(name for form in forms for name in (*form.needed, *form.optional)))
    for name in columns:
        if name not in known:
            raise DataError(
                f"columns: the format {format!r} has no field {name!r}; it has {', '.join(known)}."
                f"{nearest_name(name, known)}"
            )


def choose_form(records: Sequence[Record], *, format: Format, columns: Mapping[str, str]) -> FormChoice:
    """Says which form a source's records have: the one whose columns the most of them have.

    Args:
        records: the first ones of the source, at least one.
        format: a form that is known, or "auto".
        columns: the source's names of fields; only forms that have all these fields come into question.

    Raises:
        DataError: no form fits, or several do.
    """
    source = records[0].source
    if format != "auto":
        form = next(form for form in _FORMS if form.name == format)
        return FormChoice(source=source, form=form, why="the settings say")
    candidates = [form for form in _FORMS if set(columns) <= {*form.needed, *form.optional}]
    votes = Counter(
        form.name
        for record in records
        for form in candidates
        if all(Fields(record, columns).has(name) for name in form.needed)
    )
    keys = list(records[0].values)
    most = max(votes.values(), default=0)
    best = [form for form in candidates if most and votes[form.name] == most]
    if not best:
        names = [name for form in _FORMS for name in form.needed]
        near = next((text for key in keys if key not in names and (text := nearest_name(key, names))), "")
        raise DataError(
            f"{source}: no form of examples has the columns {shown_keys(keys)}.{near} The forms are "
            f"{', '.join(form.in_words for form in _FORMS)}; if columns have other names, give them, such as "
            "columns: {prompt: my_question, completion: my_answer}"
        )
    if len(best) > 1:
        raise DataError(
            f"{source}: the columns {shown_keys(keys)} fit several forms, "
            f"{' and '.join(form.in_words for form in best)}; set format to the one that is meant"
        )
    found = ", ".join(
        f"{columns[name]!r} for {name!r}" if name in columns else repr(name)
        for name in (*best[0].needed, *(name for name in columns if name in best[0].optional))
    )
    return FormChoice(source=source, form=best[0], why=f"its columns are {found}")


def read_example(record: Record, form: Form, columns: Mapping[str, str]) -> Example:
    """Says what a record says.

    Raises:
        ExampleError: a column is missing or holds what it must not, a turn is empty, or there is no answer.
    """
    return form.read(Fields(record, columns))


def _messages(fields: Fields) -> Conversation:
    return _conversation(fields, fields.system(), fields.messages("messages"))


def _sharegpt(fields: Fields) -> Conversation:
    return _conversation(fields, fields.system(), fields.messages("conversations"))


def _prompt_completion(fields: Fields) -> Conversation | PromptCompletion:
    return _answered(fields, "prompt", "completion")


def _question_answer(fields: Fields) -> Conversation | PromptCompletion:
    return _answered(fields, "question", "answer")


def _alpaca(fields: Fields) -> Conversation | PromptCompletion:
    prompt = fields.text("instruction", may_be_blank=True)
    if fields.has("input") and (context := fields.text("input", may_be_blank=True)).strip():
        prompt = f"{prompt}\n\n{context}" if prompt.strip() else context
    if not prompt.strip():
        raise fields.record.error("empty turn", "'instruction' and 'input' are empty; remove the example or fill them")
    return _with_system(fields.system(), PromptCompletion(prompt=prompt, completion=fields.text("output")))


def _text(fields: Fields) -> PlainText:
    return PlainText(text=fields.text("text"))


def _preference(fields: Fields) -> PreferencePair:
    pair: PreferencePair
    if not fields.has("prompt"):
        for name in ("chosen", "rejected"):
            if not fields.is_messages(name):
                raise fields.record.error(
                    "missing column", f"no column 'prompt', which is needed where {name!r} is no list of messages"
                )
        pair = _parted(fields)
    elif fields.is_messages("chosen") and fields.messages("chosen")[0]["role"] != "model":
        pair = _parted(fields)
        _check_prompt(fields, pair)
    else:
        pair = PreferencePair(
            chosen=_answered(fields, "prompt", "chosen"), rejected=_answered(fields, "prompt", "rejected")
        )
        if type(pair.chosen) is not type(pair.rejected):
            raise fields.record.error("not messages", "'chosen' and 'rejected' must both be texts, or both be messages")
    if pair.chosen == pair.rejected:
        raise fields.record.error("no preference", "'chosen' and 'rejected' are the same; remove the example")
    return pair


def _parted(fields: Fields) -> PreferencePair:
    """A pair from two whole conversations, whose common beginning is the prompt."""
    chosen, rejected = fields.messages("chosen"), fields.messages("rejected")
    num_common = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if not _is_same(ours, theirs):
            break
        num_common += 1
    if not num_common:
        raise fields.record.error("no preference", "'chosen' and 'rejected' must begin alike, with their common prompt")
    if num_common == len(chosen) == len(rejected):
        raise fields.record.error("no preference", "'chosen' and 'rejected' are the same; remove the example")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if num_common == len(messages) or messages[num_common]["role"] != "model":
            raise fields.record.error(
                "no preference", f"'chosen' and 'rejected' must part at an answer, but {name!r} has none there"
            )
    system = fields.system()
    return PreferencePair(
        chosen=_conversation(fields, system, chosen, num_given=num_common),
        rejected=_conversation(fields, system, rejected, num_given=num_common),
    )


def _is_same(ours: Message, theirs: Message) -> bool:
    return bool(ours["role"] == theirs["role"] and ours["content"].strip() == theirs["content"].strip())


def _check_prompt(fields: Fields, pair: PreferencePair) -> None:
    """Where conversations repeat a prompt that also has its own column, checks that it is the same."""
    assert isinstance(pair.chosen, Conversation)
    beginning = [message for message in pair.chosen.messages[: pair.chosen.num_given] if message["role"] != "system"]
    if fields.is_messages("prompt"):
        prompt = [message for message in fields.messages("prompt") if message["role"] != "system"]
        same = len(prompt) == len(beginning) and all(map(_is_same, prompt, beginning))
    else:
        text = fields.text("prompt").strip()
        same = any(message["content"].strip() == text for message in beginning)
    if not same:
        raise fields.record.error(
            "no preference", "'prompt' is not what 'chosen' and 'rejected' begin with; leave one of them out"
        )


def _answered(fields: Fields, prompt_name: str, answer_name: str) -> Conversation | PromptCompletion:
    """A prompt and its answer, each a text or a list of messages."""
    if not fields.is_messages(prompt_name) and not fields.is_messages(answer_name):
        answered = PromptCompletion(prompt=fields.text(prompt_name), completion=fields.text(answer_name))
        return _with_system(fields.system(), answered)
    prompt = _as_messages(fields, prompt_name, "user")
    answer = _as_messages(fields, answer_name, "model")
    return _conversation(fields, fields.system(), (*prompt, *answer), num_given=len(prompt))


def _as_messages(fields: Fields, name: str, role: str) -> tuple[Message, ...]:
    return fields.messages(name) if fields.is_messages(name) else ({"role": role, "content": fields.text(name)},)


def _with_system(system: tuple[Message, ...], answered: PromptCompletion) -> Conversation | PromptCompletion:
    if not system:
        return answered
    return Conversation(messages=(*system, *in_turns(answered)), num_given=2)


def _conversation(
    fields: Fields, system: tuple[Message, ...], messages: tuple[Message, ...], *, num_given: int = 0
) -> Conversation:
    if not any(message["role"] == "model" or message.get("train") for message in messages[num_given:]):
        raise fields.record.error("no answer", "the model says nothing, so that there is nothing to learn")
    return Conversation(messages=(*system, *messages), num_given=len(system) + num_given if num_given else 0)


_FORMS: Final = (
    Form(name="messages", needed=("messages",), optional=(SYSTEM_COLUMN,), read=_messages),
    Form(name="sharegpt", needed=("conversations",), optional=(SYSTEM_COLUMN,), read=_sharegpt),
    Form(
        name="prompt_completion",
        needed=("prompt", "completion"),
        optional=(SYSTEM_COLUMN,),
        read=_prompt_completion,
    ),
    Form(name="question_answer", needed=("question", "answer"), optional=(SYSTEM_COLUMN,), read=_question_answer),
    Form(name="alpaca", needed=("instruction", "output"), optional=("input", SYSTEM_COLUMN), read=_alpaca),
    Form(name="text", needed=("text",), read=_text),
    Form(name="preference", needed=("chosen", "rejected"), optional=("prompt", SYSTEM_COLUMN), read=_preference),
)
