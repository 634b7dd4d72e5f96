"""Training data: texts or examples from files, packed rows, loaders that resume exactly. No torch.

For pretraining read `files`, `sources`, `packing`, `shuffling`, `loader`, `prefetching`, `streams`, `validation`. For
fine-tuning read `records` and the readers, `fields`, `forms`, `examples`, `encoding`, `tokenizing`, `tokenized`,
`example_packing`, `example_loader`, `example_validation`.
"""

from gemma2.data.encoding import (
    EncodedExample,
    EncodedPair,
    RenderedSpan,
    Template,
    TrainOn,
    encode_example,
    encode_pair,
    render_example,
)
from gemma2.data.example_loader import ExampleLoader
from gemma2.data.example_validation import batch_for_validation
from gemma2.data.examples import Conversation, Example, PlainText, PreferencePair, PromptCompletion
from gemma2.data.files import expand_files
from gemma2.data.forms import Format, FormChoice
from gemma2.data.loader import LoaderSnapshot, PackedLoader, Source
from gemma2.data.packing import IGNORED_LABEL, Encode, PackedBatch
from gemma2.data.prefetching import Prefetcher
from gemma2.data.record_sources import RecordSource, find_sources
from gemma2.data.records import Record
from gemma2.data.skipping import ExampleError, SkippedExamples
from gemma2.data.sources import Document, OnError, Position, SkipCount, iter_documents
from gemma2.data.streams import StreamLoader
from gemma2.data.tokenized import TokenizedExamples
from gemma2.data.tokenizing import TokenizingProgress, TooLong, tokenize_examples
from gemma2.data.validation import ValidationSet, tokenize_for_validation

__all__ = [
    "IGNORED_LABEL",
    "Conversation",
    "Document",
    "Encode",
    "EncodedExample",
    "EncodedPair",
    "Example",
    "ExampleError",
    "ExampleLoader",
    "FormChoice",
    "Format",
    "LoaderSnapshot",
    "OnError",
    "PackedBatch",
    "PackedLoader",
    "PlainText",
    "Position",
    "PreferencePair",
    "Prefetcher",
    "PromptCompletion",
    "Record",
    "RecordSource",
    "RenderedSpan",
    "SkipCount",
    "SkippedExamples",
    "Source",
    "StreamLoader",
    "Template",
    "TokenizedExamples",
    "TokenizingProgress",
    "TooLong",
    "TrainOn",
    "ValidationSet",
    "batch_for_validation",
    "encode_example",
    "encode_pair",
    "expand_files",
    "find_sources",
    "iter_documents",
    "render_example",
    "tokenize_examples",
    "tokenize_for_validation",
]
