"""Trains a small tokenizer with Gemma's layout of ids and Gemma's way of cutting text into pieces.

Like Gemma's (report, section 2.1 and 2.2: a SentencePiece tokenizer with split digits, preserved whitespace and
byte-level encodings): byte-pair encoding, every digit alone, whitespace kept, bytes for rare characters, and no
space put before the text. Two files with the same ids are written: `tokenizer.model` (SentencePiece) and
`tokenizer.json` (Hugging Face's tokenizers).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma2.errors import TokenizerError
from gemma2.text.chat import CHAT_TEMPLATE
from gemma2.text.layout import BOS, BYTE_PIECES, CONTROL_PIECES, EOS, MASK, PAD, SPACE, UNK
from gemma2.text.sentencepiece_model import PieceType, build_model

if TYPE_CHECKING:
    import sentencepiece

WHITESPACE_PIECES: Final[tuple[str, ...]] = (
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    "\t",
    *(SPACE * length for length in range(2, 17)),
)
"""Runs of whitespace that are one token wherever they stand. Gemma has up to 31 of each; text rarely does."""

_ALWAYS: Final = SPACE + "".join(map(chr, range(0x21, 0x7F)))
"""Characters that are pieces of their own, whatever the text: without U+2581 no space could be written."""

_NEVER: Final = "\t\0\u2585"
"""Characters that never are, like halves of surrogate pairs: the tab is a piece already, and SentencePiece keeps the
other two for itself."""

_SMALLEST_VOCAB_SIZE: Final = len(CONTROL_PIECES) + len(WHITESPACE_PIECES) + len(BYTE_PIECES) + len(_ALWAYS)


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    folder: str | Path,
    character_coverage: float = 0.9999,
    max_sentence_bytes: int = 16384,
    num_threads: int | None = None,
) -> None:
    """Trains a byte-pair tokenizer and writes `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`.

    The same texts in the same order give the same files, whatever the number of threads. All of the text is held in
    memory and used; take a sample of a large corpus first (tens of MB are plenty for ten thousand pieces).

    Args:
        texts: documents; pieces never reach over a line's end.
        vocab_size: number of ids, with the 108 control pieces, the runs of whitespace and the 256 bytes.
        folder: where the files go; made if it is not there.
        character_coverage: share of the characters of `texts`, from 0 to 1, that must be pieces of their own, the
            commonest first; rarer ones become bytes. The space and printable ASCII always are pieces.
        max_sentence_bytes: lines longer than this many bytes of UTF-8 are cut, where possible before a space.
        num_threads: threads of the trainer; by default the machine's, at most 8.

    Raises:
        TokenizerError: there is no text, or `vocab_size` is too small or more than the text can fill.
    """
    import sentencepiece  # not above: whoever only reads a tokenizer.json does without

    if vocab_size < _SMALLEST_VOCAB_SIZE:
        raise TokenizerError(
            f"vocab_size must be at least {_SMALLEST_VOCAB_SIZE}: the control, whitespace and byte pieces and "
            f"ASCII take as many, but it is {vocab_size}"
        )
    if max_sentence_bytes < 64:
        raise TokenizerError(f"max_sentence_bytes must be at least 64, but is {max_sentence_bytes}")
    if not 0 <= character_coverage <= 1:
        raise TokenizerError(f"character_coverage must be from 0 to 1, but is {character_coverage}")
    lines = [line for text in texts for line in text.replace("\r\n", "\n").split("\n") if line]
    if not lines:
        raise TokenizerError("a tokenizer needs text to be trained on, but the texts are empty")
    counts = Counter(character for line in lines for character in line.replace(" ", SPACE))
    alphabet = _alphabet(counts, character_coverage)
    if vocab_size < _SMALLEST_VOCAB_SIZE + len(alphabet) - len(_ALWAYS):
        raise TokenizerError(
            f"vocab_size must be at least {_SMALLEST_VOCAB_SIZE + len(alphabet) - len(_ALWAYS)} for the "
            f"{len(alphabet)} characters of this text, but it is {vocab_size}; raise it, or lower character_coverage"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(lines, counts, alphabet, max_sentence_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # The alphabet is chosen here, see _sentences.
            character_coverage=1.0,
            required_chars="".join(sorted(alphabet)),
            max_sentence_length=max_sentence_bytes,
            num_threads=num_threads or min(8, os.cpu_count() or 1),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece=PAD,
            eos_piece=EOS,
            bos_piece=BOS,
            unk_piece=UNK,
            control_symbols=list(CONTROL_PIECES[4:]),
            user_defined_symbols=list(WHITESPACE_PIECES),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]  # without the place in SentencePiece's source
        raise TokenizerError(f"the tokenizer could not be trained with vocab_size {vocab_size}: {reason}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.model", _sentencepiece_file(processor, pieces))
    _write(folder / "tokenizer.json", _to_json(_tokenizers_file(pieces)))
    _write(folder / "tokenizer_config.json", _to_json(_config_file()))


def _alphabet(counts: Counter[str], coverage: float) -> set[str]:
    """Chooses the characters that get a piece of their own."""
    alphabet = set(_ALWAYS)
    needed = coverage * counts.total()
    covered = sum(counts[character] for character in alphabet)
    # By count and then by character, so that the order of the text does not matter.
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= needed:
            break
        if character not in alphabet and character not in _NEVER and not "\ud800" <= character <= "\udfff":
            alphabet.add(character)
            covered += count
    return alphabet


def _sentences(lines: list[str], counts: Counter[str], alphabet: set[str], max_bytes: int) -> Iterator[str]:
    """Cuts lines at rare characters, and long ones into parts, as the trainer passes over what is longer."""
    # The trainer leaves out characters of its required_chars that it has not seen, once all that it has seen are
    # covered (`coverage` in LoadSentences of its trainer_interface.cc, in float32). It counts tabs, but never covers
    # them: a few tabs, more than float32 can round away, keep it going.
    yield "\t" * (8 + counts.total() // 2**20)
    rare = counts.keys() - alphabet
    at_rare = re.compile("[" + "".join(map(re.escape, sorted(rare))) + "]") if rare else None
    for line in lines:
        for part in at_rare.split(line) if at_rare else (line,):
            while part:
                cut = len(part)
                if len(part.encode()) > max_bytes:
                    cut = max_bytes // 4  # no character takes more than four bytes
                    cut = max(part.rfind(" ", 1, cut), 0) or cut
                yield part[:cut]
                part = part[cut:]


def _sentencepiece_file(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> bytes:
    """Writes the trained model anew, as the trainer's own file also records how it was run (its threads)."""
    types = [_piece_type(processor, index) for index in range(len(pieces))]
    return build_model(pieces, [processor.get_score(index) for index in range(len(pieces))], types)


def _piece_type(processor: sentencepiece.SentencePieceProcessor, index: int) -> PieceType:
    if processor.is_unknown(index):
        return PieceType.UNKNOWN
    if processor.is_control(index):
        return PieceType.CONTROL
    if processor.is_byte(index):
        return PieceType.BYTE
    is_whitespace = 0 <= index - len(CONTROL_PIECES) < len(WHITESPACE_PIECES)
    return PieceType.USER_DEFINED if is_whitespace else PieceType.NORMAL


def _tokenizers_file(pieces: list[str]) -> dict[str, Any]:
    """Writes the pieces in the format of Hugging Face's tokenizers."""
    vocab = {piece: index for index, piece in enumerate(pieces)}
    learned = set(pieces[len(CONTROL_PIECES) + len(WHITESPACE_PIECES) + len(BYTE_PIECES) :])
    # SentencePiece joins any two neighbours whose join is a piece, the piece of lowest id first; tokenizers joins
    # only listed pairs, in their order. So every way to halve a piece is listed, in the order of the pieces.
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in pieces
        if piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in learned and piece[cut:] in learned
    ]
    # normalized=True: tokenizers then looks for runs of U+2581 after it has put U+2581 for each space, as
    # SentencePiece does. Gemma's own file says False, and so misses runs of spaces there.
    added = [_added_token(vocab[piece], piece, special=True) for piece in CONTROL_PIECES]
    added += [_added_token(vocab[piece], piece, special=False) for piece in WHITESPACE_PIECES]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_template("SpecialToken", BOS, 0), _template("Sequence", "A", 0)],
            "pair": [
                _template("SpecialToken", BOS, 0),
                _template("Sequence", "A", 0),
                _template("SpecialToken", BOS, 1),
                _template("Sequence", "B", 1),
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [vocab[BOS]], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _added_token(index: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def _template(kind: str, name: str, type_id: int) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": type_id}}


def _config_file() -> dict[str, Any]:
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "mask_token": MASK,
        "model_max_length": 8192,
        "pad_token": PAD,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": UNK,
    }


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(data)
    beside.replace(path)
