"""Training data: documents from files, packed rows, a loader that resumes exactly. numpy only."""

from gemma2.data.files import expand_files
from gemma2.data.loader import LoaderSnapshot, PackedLoader, Source
from gemma2.data.packing import IGNORED_LABEL, Encode, PackedBatch
from gemma2.data.prefetching import Prefetcher
from gemma2.data.sources import Document, Position, SkipCount, iter_documents
from gemma2.data.validation import ValidationSet, tokenize_for_validation

__all__ = [
    "IGNORED_LABEL",
    "Document",
    "Encode",
    "LoaderSnapshot",
    "PackedBatch",
    "PackedLoader",
    "Position",
    "Prefetcher",
    "SkipCount",
    "Source",
    "ValidationSet",
    "expand_files",
    "iter_documents",
    "tokenize_for_validation",
]
