"""The two libraries that cut text into tokens, behind one small protocol.

`TokenizersLibrary` reads `tokenizer.json` (Hugging Face's tokenizers), `SentencePieceLibrary` reads `tokenizer.model`.
Both are made to leave control tokens in a text as text, and both refuse a file that is no Gemma tokenizer. Each
library is imported where it is used, as nobody needs both, and importing one takes 10 to 20 ms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from gemma2.errors import TokenizerError
from gemma2.text.layout import RESERVED_PIECES
from gemma2.text.sentencepiece_model import with_control_pieces


class Library(Protocol):
    """What a `Tokenizer` needs of the library under it."""

    @property
    def source(self) -> str:
        """The file, as errors call it."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        ...

    @property
    def control_names(self) -> frozenset[str]:
        """The pieces that are no text; a name may be missing from the vocabulary."""
        ...

    def encode(self, text: str) -> list[int]:
        """Cuts a text, which has no lone surrogates, into ids, with nothing added."""
        ...

    def piece(self, token_id: int) -> str | None:
        """The piece of an id, or None where the vocabulary has none."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of a piece, or None where the vocabulary has none."""
        ...


class TokenizersLibrary:
    """A `tokenizer.json`, through Hugging Face's tokenizers.

    Raises:
        TokenizerError: the file cannot be read, or is no byte-pair encoding with bytes for rare characters.
    """

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._path = path
        try:
            inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())  # by name it opens no path but in UTF-8
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(_why_not_json(path, error)) from None
        model = inner.model
        if not isinstance(model, tokenizers.models.BPE) or not model.byte_fallback:
            raise TokenizerError(
                f"{path}: a Gemma tokenizer is byte-pair encoding with byte fallback, but this one is "
                f"{type(model).__name__}{'' if not isinstance(model, tokenizers.models.BPE) else ' without it'}"
            )
        # A file saved by transformers may carry the truncation and padding of its last call.
        inner.no_truncation()
        inner.no_padding()
        added = inner.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        reserved = {token.content for token in added.values()} & RESERVED_PIECES
        # Gemma's file calls only six of its reserved tokens special (not <mask> or <unused0>, which people who
        # fine-tune take for control tokens of their own); the library looks for all others in the text.
        inner.add_special_tokens([tokenizers.AddedToken(content, normalized=False) for content in reserved - special])
        inner.encode_special_tokens = True
        self._inner = inner
        self.control_names: frozenset[str] = frozenset(special | reserved)
        self.vocab_size: int = max(inner.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)

    @property
    def source(self) -> str:
        return str(self._path)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def piece(self, token_id: int) -> str | None:
        return self._inner.id_to_token(token_id)

    def token_id(self, piece: str) -> int | None:
        return self._inner.token_to_id(piece)

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets encode_special_tokens: a worker process would find <end_of_turn> in text.
        return TokenizersLibrary, (self._path,)


class SentencePieceLibrary:
    """A `tokenizer.model`, through SentencePiece.

    Args:
        data: the contents of the file.
        source: what to call it in errors.

    Raises:
        TokenizerError: the data are damaged, or no byte-pair encoding with bytes for rare characters.
    """

    def __init__(self, data: bytes, source: str) -> None:
        import sentencepiece

        self._data = data
        self.source = source
        corrected = with_control_pieces(data, RESERVED_PIECES, source=source)
        try:
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=corrected)
        except RuntimeError as error:
            raise TokenizerError(f"{source}: SentencePiece cannot use this file: {error}") from None
        self.vocab_size: int = self._inner.get_piece_size()
        # The unknown piece is nobody's text either: bytes stand for what the vocabulary lacks.
        self.control_names: frozenset[str] = frozenset(
            self._inner.id_to_piece(index)
            for index in range(self.vocab_size)
            if self._inner.is_control(index) or self._inner.is_unknown(index)
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._inner.encode(text)
        return ids

    def piece(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        piece: str = self._inner.id_to_piece(token_id)
        return piece

    def token_id(self, piece: str) -> int | None:
        # SentencePiece answers with the unknown piece's id for what it does not know.
        token_id: int = self._inner.piece_to_id(piece)
        return token_id if self.piece(token_id) == piece else None

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceLibrary, (self._data, self.source)


def read_sentencepiece(path: Path) -> SentencePieceLibrary:
    """Opens a `tokenizer.model`.

    Raises:
        TokenizerError: the file cannot be read, or is no Gemma tokenizer.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise TokenizerError(f"{path}: is empty; fetch it again")
    refuse_pointer(path, data)
    return SentencePieceLibrary(data, str(path))


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuses the few lines of text that git leaves in place of a large file that it did not fetch."""
    if start.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"{path}: is a git-lfs pointer and not the file itself; run `git lfs pull` in its folder")


def _why_not_json(path: Path, error: Exception) -> str:
    """Finds out why tokenizers refused a file, as its own messages name neither the file nor the reason."""
    import tokenizers

    try:
        data = path.read_bytes()
    except OSError as reason:
        return f"{path}: cannot be read: {reason.strerror or reason}"
    refuse_pointer(path, data[:64])
    try:
        contents = json.loads(data)
    except ValueError as reason:
        return f"{path}: is not valid JSON ({reason}); it is damaged or cut short, so fetch it again"
    if not isinstance(contents, dict) or "model" not in contents:
        return f"{path}: is JSON, but no tokenizer of Hugging Face's tokenizers (it has no 'model')"
    return f"{path}: tokenizers {tokenizers.__version__} cannot read this file: {error}"
