"""Gemma's layout of token ids: which ids mean something to the format, and are not text.

Ids 0 to 107 are the same in every Gemma tokenizer (google/gemma-2-2b/tokenizer.json, `added_tokens`), and
`train_tokenizer` keeps them, so that a small model's tokenizer can be used wherever Gemma's can.
"""

from __future__ import annotations

import re
from typing import Final

SPACE: Final = "▁"
"""U+2581, by which SentencePiece writes a space inside a piece."""

PAD, EOS, BOS, UNK, MASK = "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

CONTROL_PIECES: Final[tuple[str, ...]] = (
    PAD,
    EOS,
    BOS,
    UNK,
    MASK,
    "<2mass>",
    "[@BOS@]",
    *(f"<unused{index}>" for index in range(99)),
    START_OF_TURN,
    END_OF_TURN,
)
"""The pieces of the ids 0 … 107, in order."""

RESERVED_PIECES: Final[frozenset[str]] = frozenset((*CONTROL_PIECES, "[toxicity=0]", "<unused99>"))
"""Every piece that is never text: the ids 0 … 107, and two more near the end of Gemma's own vocabulary."""

BYTE_PIECES: Final[tuple[str, ...]] = tuple(f"<0x{value:02X}>" for value in range(256))
"""The pieces that stand for one byte, for characters that the vocabulary lacks."""

_BYTE_PIECE: Final = re.compile("<0x([0-9A-F]{2})>")


def piece_text(piece: str) -> str | bytes:
    """Returns what a piece writes: its text with spaces for U+2581, or one byte for a byte piece."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ")
