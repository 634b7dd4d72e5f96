"""Makes a SentencePiece model of Gemma's `tokenizer.json` that cuts every text into the same ids, or refuses.

Why the two agree, if the JSON is what is checked here. Both libraries start from characters and join neighbours:
tokenizers the pair that comes first in the JSON's list of merges, SentencePiece the pair whose joined piece has the
lowest id; of equals, both take the leftmost. The list is in the order of the joined pieces' ids, and has all the ways
to halve a piece in two others. So both join the same, unless two ways to halve *one* piece stood in a text at once, in
another order in the list than in the text. They cannot: what is joined inside of a piece's characters, up to the last
two parts, does not depend on what stands around them (a join over their edge would leave no such parts). So a piece
has but one last pair.

What else the text may hold:

- Added tokens that are text (runs of tabs and newlines, <table> and its like) are cut out before all joining by both,
  the leftmost first and then the longest. Added tokens that are control tokens are found by neither; tokenizers does
  find them and then ignores them, which hides no other token, as none overlaps with them.
- Runs of 2 to 31 spaces are cut out by SentencePiece; tokenizers joins them before all else, from left to right up to
  the longest, and joins them with nothing.
- Runs of U+2581 in the text itself are added tokens to tokenizers, and spaces to SentencePiece. `TwinLibrary` cuts
  them out.
- Characters that no piece has become bytes.

tests/text/test_tokenizer_twin.py compares the two on many texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from gemma2.text.layout import BOS, BYTE_PIECES, EOS, PAD, RESERVED_PIECES, SPACE, UNK
from gemma2.text.sentencepiece_model import PieceType, build_model

_TAB, _TAB_BYTE = "\t", BYTE_PIECES[ord("\t")]
_TOP_LEVEL: Final = frozenset(
    (
        "version",
        "truncation",
        "padding",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    )
)
_NORMALIZER: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# It splits at spaces, of which the normalizer leaves none.
_PRE_TOKENIZER: Final = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_MODEL: Final = {
    "type": "BPE",
    "dropout": None,
    "unk_token": UNK,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
_ADDED_TOKEN: Final = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_MOST_PIECES: Final = 1 << 24  # up to here, ids are exact as float32 scores


class UnlikeGemmaError(Exception):
    """The JSON is not built as Gemma's is, so that SentencePiece might cut a text otherwise; the message says where."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """What stands for a `tokenizer.json`."""

    model: bytes
    """The contents of a `tokenizer.model`."""
    control_names: tuple[str, ...]
    """The pieces that are no text."""
    longest_run: int
    """Runs of U+2581 are pieces from two to so many."""
    renamed: dict[int, str]
    """Ids whose pieces have another name in the JSON."""


def build_twin(data: bytes) -> Twin:
    """Makes the twin of a `tokenizer.json`.

    Args:
        data: the contents of the file. Takes about as long as tokenizers takes to read it.

    Raises:
        UnlikeGemmaError: it is no such file, or one that is built otherwise than Gemma's.
    """
    try:
        contents = json.loads(data)
        _check_steps(contents)
        model = contents["model"]
        pieces = _pieces(model["vocab"])
        added = _added_tokens(contents["added_tokens"], model["vocab"])
        control = _control_tokens(added)
        text_tokens = added.keys() - control
        renamed = _rename_tab(pieces)
        types = _types(pieces, control, text_tokens)
        longest_run = _longest_run(text_tokens)
        _check_overlaps(control, text_tokens)
        learned = [piece for piece, kind in zip(pieces, types, strict=True) if kind == PieceType.NORMAL]
        _check_learned(learned)
        _check_merges(model["merges"], learned, text_tokens, longest_run)
        built = build_model(pieces, [-float(index) for index in range(len(pieces))], types)
    except UnlikeGemmaError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnlikeGemmaError(f"it is damaged, or not laid out as Gemma's: {type(error).__name__}: {error}") from None
    return Twin(model=built, control_names=tuple(sorted(control)), longest_run=longest_run, renamed=renamed)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UnlikeGemmaError(what)


def _check_steps(contents: Any) -> None:
    """Checks all that happens to a text before and after its characters are joined."""
    _require(contents.keys() <= _TOP_LEVEL, "it has parts that Gemma's has not")
    _require(contents["normalizer"] == _NORMALIZER, "its normalizer is another")
    _require(contents["pre_tokenizer"] in (None, _PRE_TOKENIZER), "its pre-tokenizer is another")
    after = contents["post_processor"]
    if after is not None:
        _require(after["type"] == "TemplateProcessing", "its post-processor is another")
        parts = [part["Sequence"]["id"] for part in after["single"] if "Sequence" in part]
        _require(parts == ["A"], "its post-processor changes the text's ids")
    # Files from before tokenizers 0.20 have no ignore_merges.
    model = {"ignore_merges": False, **contents["model"]}
    settings = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    _require(settings == _MODEL, "its model has other settings")


def _pieces(vocab: dict[str, int]) -> list[str]:
    """Returns the piece of each id."""
    pieces = sorted(vocab, key=vocab.__getitem__)
    _require(len(pieces) < _MOST_PIECES, "it has too many pieces")
    _require([vocab[piece] for piece in pieces] == list(range(len(pieces))), "its ids have gaps")
    _require("" not in vocab, "a piece is empty")
    everything = "".join(pieces)
    _require(" " not in everything and "\0" not in everything, "a piece has a space or NUL in it")
    return pieces


def _added_tokens(listed: list[dict[str, Any]], vocab: dict[str, int]) -> dict[str, bool]:
    """Returns the added tokens, and for each whether the file calls it special."""
    added = {}
    for token in listed:
        content = token["content"]
        settings = {name: value for name, value in token.items() if name not in ("id", "content", "special")}
        _require(settings == _ADDED_TOKEN, f"the added token {content!r} has other settings")
        _require(token["id"] == vocab[content], f"the added token {content!r} has two ids")
        added[content] = token["special"]
    for name in (PAD, EOS, BOS, UNK):
        _require(name in added, f"{name} is no added token")
    return added


def _control_tokens(added: dict[str, bool]) -> set[str]:
    """Chooses the added tokens that are no text, as `TokenizersLibrary` does."""
    control = {name for name, is_special in added.items() if is_special or name in RESERVED_PIECES}
    _require(all(len(name) > 1 for name in control), "a single character is a control token")
    return control


def _rename_tab(pieces: list[str]) -> dict[int, str]:
    """Gives a tab the name that SentencePiece knows it by, and returns its id and name in the JSON."""
    if _TAB not in pieces:
        return {}
    _require(_TAB_BYTE not in pieces, "a tab has two ids")
    index = pieces.index(_TAB)
    pieces[index] = _TAB_BYTE
    return {index: _TAB}


def _types(pieces: list[str], control: set[str], text_tokens: set[str]) -> list[PieceType]:
    kinds = dict.fromkeys(text_tokens, PieceType.USER_DEFINED)
    kinds |= dict.fromkeys(control, PieceType.CONTROL)
    _require(not kinds.keys() & {_TAB, *BYTE_PIECES}, "a byte is an added token")
    kinds |= dict.fromkeys(BYTE_PIECES, PieceType.BYTE)
    kinds[UNK] = PieceType.UNKNOWN
    types = [kinds.get(piece, PieceType.NORMAL) for piece in pieces]
    _require(types.count(PieceType.BYTE) == len(BYTE_PIECES), "a byte has no piece")
    return types


def _longest_run(text_tokens: set[str]) -> int:
    """Returns the length of the longest run of spaces that is an added token; every shorter one must be, down to 2."""
    with_space = {token for token in text_tokens if SPACE in token}
    longest = max(map(len, with_space), default=0)
    runs = {SPACE * length for length in range(2, longest + 1)}
    _require(longest > 1 and with_space == runs, "its runs of spaces are others")
    return longest


def _check_overlaps(control: set[str], text_tokens: set[str]) -> None:
    """tokenizers finds control tokens in text and ignores them, but finds no other token where one of them stands."""
    for name in control:
        for token in text_tokens:
            if token[0] in name or name[0] in token:
                overlaps = _reaches_into(name, token) or _reaches_into(token, name)
                _require(not overlaps, f"the added tokens {name!r} and {token!r} overlap")


def _reaches_into(first: str, second: str) -> bool:
    """Whether `second` can begin inside of `first`."""
    return any(second.startswith(first[at:]) or first.startswith(second, at) for at in range(len(first)))


def _check_learned(learned: list[str]) -> None:
    """Checks that what is joined begins with characters that are pieces."""
    characters = set("".join(learned))
    _require(characters <= set(learned), "it lacks pieces for single characters")
    _require(SPACE in characters, "it has no piece for a space")
    _require(_TAB not in characters, "a tab is part of a piece")


def _check_merges(merges: list[Any], learned: list[str], text_tokens: set[str], longest_run: int) -> None:
    """Checks that all ways to halve a piece in two are listed, in the order of the pieces, and runs of spaces first."""
    if merges and not isinstance(merges[0], str):
        merges = [f"{left} {right}" for left, right in merges]  # written so since tokenizers 0.20
    # What would be an added token was cut out before, and so is never joined.
    cut_out = [merge for merge in merges if merge[0] in "\n\t"]
    _require(all(merge.replace(" ", "") in text_tokens for merge in cut_out), "it joins tabs or newlines to others")
    merges = [merge for merge in merges if merge[0] not in "\n\t"]
    runs = [
        f"{SPACE * left} {SPACE * right}"
        for left in range(longest_run - 1, 0, -1)
        for right in range(longest_run - left, 0, -1)
    ]
    _require(merges[: len(runs)] == runs, "it does not join runs of spaces first")
    known = set(learned)
    listed = iter(merges[len(runs) :])
    for piece in learned:
        for cut in range(len(piece) - 1, 0, -1):
            # In two steps, as few beginnings are pieces: all this is done 1.8 million times.
            left = piece[:cut]
            if left in known:
                right = piece[cut:]
                if right in known and next(listed, None) != f"{left} {right}":
                    raise UnlikeGemmaError(f"its merges for {piece!r} are others")
    _require(next(listed, None) is None, "it has more merges than its pieces have halves")
