"""Text: tokenizer, chat format, streaming detokenizer, and the training of a tokenizer.

Read in this order: `tokenizer`, `chat`, `detokenizer`; then `layout`, `libraries`, `sentencepiece_model`, `twin`,
`twin_builder`, `train`.
"""

from gemma2.text.chat import ChatSegment, Message, encode_chat, encode_chat_segments, render_chat
from gemma2.text.detokenizer import StreamDetokenizer
from gemma2.text.tokenizer import Tokenizer
from gemma2.text.train import train_tokenizer

__all__ = [
    "ChatSegment",
    "Message",
    "StreamDetokenizer",
    "Tokenizer",
    "encode_chat",
    "encode_chat_segments",
    "render_chat",
    "train_tokenizer",
]
