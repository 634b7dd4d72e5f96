"""What a request asks of the sampler and of the loop: `SamplingParams`, with vLLM's names and meanings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final

from gemma2.errors import SamplingError, nearest_name

MAX_LOGPROBS: Final = 20
"""The most alternatives a request may ask for; OpenAI's and vLLM's limit."""
SEED_RANGE: Final = (-(2**63), 2**63 - 1)
"""A seed is a signed 64-bit number, since that is what OpenAI's wire format carries."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends.

    Names and meanings are those of vLLM's `SamplingParams`, but what is switched off is None and not -1 or 0, and
    `max_tokens` left out means "up to the context's end" and not 16. Numbers of numpy are taken as well.

    Raises:
        SamplingError: a field is out of range; names the field, the range and what came.
    """

    temperature: float = 1.0
    """Logits are divided by this. 0 is greedy: always the likeliest token."""
    top_k: int | None = None
    """Draw from the `top_k` likeliest tokens only. None: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities sum to at least this; above 0, 1 is off."""
    min_p: float = 0.0
    """Draw only tokens at least this fraction as likely as the likeliest one; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token of the prompt and of the answer less likely to come again; 1 is off."""
    seed: int | None = None
    """The same seed gives the same text. None: fresh entropy for every request."""
    max_tokens: int | None = None
    """The most tokens to generate, a final stop token included. None: up to the context's end."""
    stop: Sequence[str] = ()
    """Strings that end the text; they are not part of it. One string may come without a list around it."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the text, besides the model's own."""
    ignore_eos: bool = False
    """Go on after the model's own stop tokens (<eos>, <end_of_turn>). `stop_token_ids` still stop."""
    logprobs: int | None = None
    """None: report no log-probabilities. n: report those of the drawn token and of the n likeliest, 0 to 20."""

    def __post_init__(self) -> None:
        self._set_number("temperature", at_least=0.0)
        self._set_whole_number("top_k", 1, hint=" (None switches it off)")
        self._set_number("top_p", above=0.0, at_most=1.0, hint=" (1 switches it off)")
        self._set_number("min_p", at_least=0.0, at_most=1.0, hint=" (0 switches it off)")
        self._set_number("repetition_penalty", above=0.0, hint=" (1 switches it off)")
        self._set_whole_number("seed", *SEED_RANGE)
        self._set_whole_number("max_tokens", 1, hint=", or none to go on to the context's end")
        self._set_whole_number("logprobs", 0, MAX_LOGPROBS, hint=" (None switches it off)")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos must be true or false, but is {self.ignore_eos!r}")
        self._set_stop()
        self._set_stop_token_ids()

    def _set_number(
        self,
        name: str,
        *,
        at_least: float = -math.inf,
        above: float = -math.inf,
        at_most: float = math.inf,
        hint: str = "",
    ) -> None:
        value = getattr(self, name)
        number = _as_float(value)
        if not at_least <= number <= at_most or number <= above or not math.isfinite(number):
            lower = f"above {above:g}" if above > -math.inf else f"of at least {at_least:g}"
            upper = f" and at most {at_most:g}" if at_most < math.inf else ""
            raise SamplingError(f"{name} must be a number {lower}{upper}{hint}, but is {value!r}")
        object.__setattr__(self, name, number)

    def _set_whole_number(self, name: str, lowest: int, highest: int | None = None, *, hint: str = "") -> None:
        value = getattr(self, name)
        if value is None:
            return
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or value < lowest or (highest is not None and value > highest):
            span = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise SamplingError(f"{name} must be a whole number {span}{hint}, but is {value!r}")
        object.__setattr__(self, name, int(value))

    def _set_stop(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Iterable):
            raise SamplingError(f"stop must be a string or a list of strings, but is {self.stop!r}")
        stop = tuple(stop)
        for text in stop:
            if not isinstance(text, str):
                raise SamplingError(f"stop must be a string or a list of strings, but holds {text!r}")
            if not text:
                raise SamplingError("stop must hold no empty string, since that would end every text before it begins")
        object.__setattr__(self, "stop", stop)

    def _set_stop_token_ids(self) -> None:
        expected = "stop_token_ids must be a list of token ids (whole numbers of at least 0)"
        if not isinstance(self.stop_token_ids, Iterable) or isinstance(self.stop_token_ids, (str, bytes)):
            raise SamplingError(f"{expected}, but is {self.stop_token_ids!r}")
        token_ids = tuple(self.stop_token_ids)
        for token_id in token_ids:
            if not isinstance(token_id, Integral) or isinstance(token_id, bool) or token_id < 0:
                raise SamplingError(f"{expected}, but holds {token_id!r}")
        object.__setattr__(self, "stop_token_ids", tuple(int(token_id) for token_id in token_ids))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken and nothing is drawn."""
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Builds the parameters from names and values, such as a JSON object.

        Args:
            values: field names and their values. None stands for "not given", as JSON clients send null.

        Raises:
            SamplingError: a name is not a field (the nearest is offered), or a value is out of range.
        """
        _refuse_unknown(values)
        return cls(**{name: value for name, value in values.items() if value is not None})

    def replace(self, **changes: Any) -> SamplingParams:
        """Returns a copy with some fields changed; here None is a value like any other.

        Raises:
            SamplingError: a name is not a field (the nearest is offered), or a value is out of range.
        """
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)


def _as_float(value: object) -> float:
    """Returns a number as a float, and NaN for all that is no number or too large for a float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _refuse_unknown(names: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in names:
        if name not in known:
            raise SamplingError(
                f"{name!r} is not a sampling parameter; they are {', '.join(known)}.{nearest_name(str(name), known)}"
            )
