"""Floor 2: documents to TokenBatch. `prepare` does all of it; the rest is for those who want a part."""

from finemoe.data.batch import TokenBatch
from finemoe.data.config import DataConfig
from finemoe.data.corpora import (
    CORPORA,
    FilesCorpus,
    HuggingFaceCorpus,
    MixtureCorpus,
    MixturePart,
    StdlibCorpus,
    held_out,
    read_corpus,
)
from finemoe.data.documents.document import Document, SkipReport
from finemoe.data.loader import Loader, TokenShards, TokenSource
from finemoe.data.pipeline import PreparedData, prepare

__all__ = [
    "CORPORA",
    "DataConfig",
    "Document",
    "FilesCorpus",
    "HuggingFaceCorpus",
    "Loader",
    "MixtureCorpus",
    "MixturePart",
    "PreparedData",
    "SkipReport",
    "StdlibCorpus",
    "TokenBatch",
    "TokenShards",
    "TokenSource",
    "held_out",
    "prepare",
    "read_corpus",
]
