"""What the tests of examples share: the same example in every form, and files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpus import random_text, write_bytes

QUESTION, ANSWER = "How many legs\nhas a spider? 🕷", "Eight. <end_of_turn> is plain text here."

TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "question_answer": {"question": QUESTION, "answer": ANSWER},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
}
"""Each says the same."""


def write_records(file: Path, records: Sequence[object]) -> Path:
    """JSON lines."""
    return write_bytes(file, "".join(json.dumps(record) + "\n" for record in records).encode())


def random_chats(*, seed: int, count: int, longest: int) -> list[dict[str, Any]]:
    """Conversations of one to three answers, no two alike."""
    generator = random.Random(seed)

    def turn(role: str, number: int) -> dict[str, str]:
        return {"role": role, "content": f"{number} " + random_text(generator, generator.randint(0, longest))}

    return [
        {"messages": [turn(role, number) for role in ["user", "assistant"] * generator.randint(1, 3)]}
        for number in range(count)
    ]


def random_pairs(*, seed: int, count: int, longest: int) -> list[dict[str, Any]]:
    """Preference pairs of texts, no two alike."""
    generator = random.Random(seed)

    def text(number: int) -> str:
        return f"{number} " + random_text(generator, generator.randint(0, longest))

    return [
        {"prompt": text(number), "chosen": "yes " + text(number), "rejected": "no " + text(number)}
        for number in range(count)
    ]
