"""Text to token ids and back: Gemma's tokenizer, over either of its two files.

A model folder has `tokenizer.json`, `tokenizer.model`, or both. They cut text alike, which the tests check on Gemma's
own vocabulary: also long runs of spaces (up to 31 are one token, the longest first), on which conversions of Gemma's
file have disagreed. Two differences remain:

- Two or more literal U+2581 ("▁", by which pieces write a space) beside spaces. SentencePiece sees one run of spaces,
  tokenizers two: "▁▁ a" is "▁▁▁", "a" to the one and "▁▁", "▁a" to the other. Both decode it as spaces.
  (In tokenizers that are trained here there is no such difference.)
- In Gemma's files the piece of id 226, a tab, is called "<0x09>" in the one and "\\t" in the other.

A `tokenizer.json` as large as Gemma's is opened by its twin (see `twin`), twenty times as fast; with the twin all is
as with the JSON itself, the two differences too.

Control tokens inside a text stay text, whoever typed them: `encode("<end_of_turn>")` gives the pieces of those 13
characters. That goes for every reserved piece, <mask> and <unused0> … <unused99> too. Pieces which *are* text, though
Gemma lists them beside the control tokens, are found: runs of newlines, tabs and spaces, and HTML tags like <table>.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from gemma2.config import Gemma2Config
from gemma2.errors import TokenizerError, nearest_name
from gemma2.text.detokenizer import StreamDetokenizer
from gemma2.text.layout import BOS, CONTROL_PIECES, END_OF_TURN, EOS, PAD, START_OF_TURN, UNK, piece_text
from gemma2.text.libraries import Library, SentencePieceLibrary, read_sentencepiece, refuse_pointer
from gemma2.text.sentencepiece_model import PieceType, build_model
from gemma2.text.twin import open_json

_JSON_FILE, _MODEL_FILE = "tokenizer.json", "tokenizer.model"
_PROBE = "  Gemma 2:\n\n\tit's a\r\n é🤗 test "


class Tokenizer:
    """Gemma's tokenizer. Made by `from_folder`, `from_file` or `from_pieces`; never changes; safe to share by threads.

    Args:
        library: what reads the file.

    Raises:
        TokenizerError: the vocabulary lacks Gemma's control tokens, or does not keep text as it is.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        missing = [
            piece for piece in (PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN) if library.token_id(piece) is None
        ]
        if missing:
            raise TokenizerError(
                f"{library.source}: a Gemma tokenizer has the piece {missing[0]}, but this one does not; "
                "it belongs to another model"
            )
        self._texts: dict[int, str | bytes] = {}
        self._control_ids = frozenset(
            token_id for name in library.control_names if (token_id := library.token_id(name)) is not None
        )
        back = self.decode(library.encode(_PROBE))
        if back != _PROBE:
            raise TokenizerError(
                f"{library.source}: a Gemma tokenizer gives a text back as it was, but this one makes {back!r} "
                f"of {_PROBE!r}; it belongs to another model"
            )

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Opens the tokenizer of a model folder: its `tokenizer.json`, or without one its `tokenizer.model`.

        Raises:
            TokenizerError: the folder has neither, or the file is damaged or no Gemma tokenizer.
        """
        path = Path(path)
        if not path.is_dir():
            if path.exists():
                raise TokenizerError(f"{path}: is a file, not a folder; open one file with Tokenizer.from_file")
            raise TokenizerError(f"{path}: there is no such folder")
        for name in (_JSON_FILE, _MODEL_FILE):
            if (path / name).exists():
                return cls.from_file(path / name)
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
        raise TokenizerError(
            f"{path}: needs a {_JSON_FILE} or a {_MODEL_FILE}, but has neither (it has: {found or 'nothing'})"
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Opens one file, a `tokenizer.json` or a `tokenizer.model` by any name; its contents tell which it is.

        Raises:
            TokenizerError: the file is missing, damaged or no Gemma tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            raise TokenizerError(f"{path}: is a folder, not a file; open a folder with Tokenizer.from_folder")
        try:
            with path.open("rb") as file:
                start = file.read(64)
        except FileNotFoundError:
            raise TokenizerError(f"{path}: there is no such file") from None
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not start:
            raise TokenizerError(f"{path}: is empty; fetch it again")
        refuse_pointer(path, start)
        # A SentencePiece model begins with a newline, the key of its first field; so may JSON, but not "{".
        is_json = start.lstrip()[:1] == b"{" or path.suffix == ".json"
        return cls(open_json(path) if is_json else read_sentencepiece(path))

    @classmethod
    def from_pieces(
        cls, pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, source: str
    ) -> Tokenizer:
        """Makes a tokenizer of the vocabulary that another file carries, such as a GGUF's `tokenizer.ggml` arrays.

        Args:
            pieces: the piece of each id; a space is written U+2581.
            scores: of two neighbouring pairs, the one whose joined piece scores higher is joined first.
            types: SentencePiece's and GGUF's numbers: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
            source: what to call the vocabulary in errors.

        Raises:
            TokenizerError: the lengths differ, a type is unknown, or it is no Gemma tokenizer.
        """
        if not len(pieces) == len(scores) == len(types):
            raise TokenizerError(
                f"{source}: needs one score and one type for each piece, but has {len(pieces)} pieces, "
                f"{len(scores)} scores and {len(types)} types"
            )
        unknown = set(types) - set(PieceType)
        if unknown:
            raise TokenizerError(f"{source}: the types of pieces are 1 to 6, but one is {min(unknown)}")
        for piece in (UNK, BOS, EOS, PAD):
            if piece not in pieces:
                raise TokenizerError(f"{source}: a Gemma tokenizer has the piece {piece}, but this one does not")
        return cls(SentencePieceLibrary(build_model(pieces, scores, types), source))

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, vocab_size={self.vocab_size})"

    # -- ids ------------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The file that was opened."""
        return self._library.source

    @property
    def vocab_size(self) -> int:
        """Number of ids. A model may have more rows: Gemma's JAX checkpoints pad 256000 to 256128."""
        return self._library.vocab_size

    @cached_property
    def pad_id(self) -> int:
        """Id of <pad>."""
        return self.piece_to_id(PAD)

    @cached_property
    def eos_id(self) -> int:
        """Id of <eos>."""
        return self.piece_to_id(EOS)

    @cached_property
    def bos_id(self) -> int:
        """Id of <bos>."""
        return self.piece_to_id(BOS)

    @cached_property
    def unk_id(self) -> int:
        """Id of <unk>; no text is ever encoded to it, as bytes stand for what the vocabulary lacks."""
        return self.piece_to_id(UNK)

    @cached_property
    def start_of_turn_id(self) -> int:
        """Id of <start_of_turn>."""
        return self.piece_to_id(START_OF_TURN)

    @cached_property
    def end_of_turn_id(self) -> int:
        """Id of <end_of_turn>."""
        return self.piece_to_id(END_OF_TURN)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens after which an answer is over: <eos> and <end_of_turn>."""
        return frozenset((self.eos_id, self.end_of_turn_id))

    @property
    def control_ids(self) -> frozenset[int]:
        """All tokens that are no text, the unused ones too."""
        return self._control_ids

    def is_control(self, token_id: int) -> bool:
        """Whether the token is no text."""
        return token_id in self._control_ids

    def id_to_piece(self, token_id: int) -> str:
        """Returns a token's piece as the vocabulary writes it: U+2581 for a space, <0xE2> for a byte.

        Raises:
            TokenizerError: there is no such id.
        """
        token_id = int(token_id)
        piece = self._library.piece(token_id) if token_id >= 0 else None
        if piece is None:
            raise TokenizerError(f"{self.source}: token ids go from 0 to {self.vocab_size - 1}, but one is {token_id}")
        return piece

    def piece_to_id(self, piece: str) -> int:
        """Returns the id of a piece, written as in `id_to_piece`.

        Raises:
            TokenizerError: the vocabulary has no such piece.
        """
        token_id = self._library.token_id(piece)
        if token_id is None:
            raise TokenizerError(
                f"{self.source}: the vocabulary has no piece {piece!r}.{nearest_name(piece, CONTROL_PIECES)}"
            )
        return token_id

    def token_text(self, token_id: int) -> str | bytes:
        """Returns what a token writes: its text (a control token's is its name), or the one byte of a byte piece.

        Raises:
            TokenizerError: there is no such id.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[int(token_id)] = piece_text(self.id_to_piece(token_id))
        return text

    def check_fits(self, config: Gemma2Config) -> None:
        """Checks that a model can read what this tokenizer writes.

        Args:
            config: the model's architecture. It may have more rows than there are tokens (padding), but not fewer.

        Raises:
            TokenizerError: an id has no row in the model, or the two disagree on <pad>, <eos> or <bos>.
        """
        if self.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{self.source}: has {self.vocab_size} token ids, but the model has rows for only {config.vocab_size} "
                "(vocab_size); the tokenizer belongs to another model"
            )
        for piece, ours, theirs in (
            (PAD, self.pad_id, config.pad_token_id),
            (EOS, self.eos_id, config.eos_token_id),
            (BOS, self.bos_id, config.bos_token_id),
        ):
            if ours != theirs:
                name = f"{piece.strip('<>')}_token_id"
                raise TokenizerError(
                    f"{self.source}: {piece} is token {ours}, but the model's {name} is {theirs}; "
                    "the tokenizer belongs to another model, or its config.json is wrong"
                )

    # -- text -----------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Cuts a text into token ids. Control tokens in it stay text.

        So a text that begins with the literal "<bos>" gets one <bos> from here, and then the pieces of these five
        characters. Text in which control tokens are meant, as `render_chat` makes, is for `encode_with_control`.

        Args:
            text: any text, kept as it is: no trimming, no Unicode normalization.
            add_bos: whether to put <bos> first. The model needs exactly one, at the start of every sequence.

        Raises:
            TokenizerError: the text is no `str`, or holds half a surrogate pair, which no UTF-8 can carry.
        """
        ids = self._encode_text(text)
        return [self.bos_id, *ids] if add_bos else ids

    def encode_with_control(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Cuts a text in which control tokens are meant as such. Never for what a user typed.

        Args:
            text: as in `encode`.
            add_bos: whether <bos> must come first; a text that begins with "<bos>" does not get a second one.

        Raises:
            TokenizerError: as `encode`.
        """
        ids: list[int] = []
        for index, part in enumerate(self._control_pattern.split(text)):
            if index % 2:
                ids.append(self.piece_to_id(part))
            elif part:
                ids += self._encode_text(part)
        if add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """Returns the text of token ids; that of `encode(text)` is `text` again, but for U+2581, which is a space.

        Args:
            ids: token ids.
            skip_control: whether control tokens write nothing, or their names.

        Raises:
            TokenizerError: an id is not in the vocabulary.
        """
        stream = StreamDetokenizer(self, skip_control=skip_control)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        names = (self.id_to_piece(token_id) for token_id in self._control_ids)
        return re.compile("(" + "|".join(sorted(map(re.escape, names))) + ")")

    def _encode_text(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TokenizerError(f"a text to encode must be a str, but is a {type(text).__name__}")
        try:
            return self._library.encode(text)
        except (TypeError, UnicodeError, RuntimeError) as error:
            try:
                text.encode()
            except UnicodeEncodeError as reason:
                raise TokenizerError(
                    f"the character at position {reason.start} of the text, {text[reason.start]!r}, is half a "
                    "surrogate pair and no text; replace it, as with text.encode(errors='replace').decode()"
                ) from None
            raise TokenizerError(f"{self.source}: the text cannot be encoded: {error}") from error
