"""DataConfig: what to learn from, and how it is read, split and cut. `pipeline.prepare` does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finemoe.core.config import Config
from finemoe.core.environment import cache_folder
from finemoe.data.corpora import CorpusConfig, StdlibCorpus
from finemoe.data.loader import Packing

NEW_SPLITTING = "qwen2"
"""Of the tokenizers that recipes have trained now, where they do not say."""


class DataConfig(Config):
    """What to learn from, and how it is cut into sequences."""

    corpus: CorpusConfig = StdlibCorpus()
    """Where the documents come from."""
    tokenizer: str | None = None
    """An existing `tokenizer.json`, or the folder that holds it; None trains one on the corpus."""
    control_tokens: Literal["text", "tokens"] = "text"
    """What a document's spelling of a control token (<|im_start|>, <think>) is: the text it is, or that token."""
    vocab_size: Annotated[int, Field(ge=257)] = 2048
    """[tokens] Size of the tokenizer to train. In a recipe it is the model's, so leave it out."""
    splitting: Literal["qwen2", "finemoe"] = "finemoe"
    """How the tokenizer to train splits text: "qwen2", which transformers and llama.cpp know too and recipes get, or
    "finemoe", that of version 0.1, which configurations that do not say have."""
    sequence_length: Annotated[int, Field(ge=1)] = 256
    """[tokens] Length of a training sequence: how far the model learns to look back."""
    packing: Packing = "concatenate"
    """"concatenate": attention crosses document boundaries, as in the paper. "isolate": it does not."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """[share] Share of the documents kept for validation, where the corpus does not name its own; of a corpus of few
    documents, the share of its text that is kept, from the end."""
    max_validation_tokens: Annotated[int, Field(ge=1)] = 65_536
    """[tokens] Validate on about this many tokens, drawn evenly over the validation documents."""
    max_skipped_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """[share] More unreadable documents than this are an error."""
    max_altered_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """[share] More characters than this that a given tokenizer loses are an error. What it only composes (NFC), and
    a space before a text, is counted and said, and never an error."""
    tokenizer_sample_bytes: Annotated[int, Field(ge=100_000)] = 16_000_000
    """[bytes] Train the tokenizer on about this much of the training documents."""
    cache_dir: str | None = None
    """Where tokens and tokenizers are kept: $FINEMOE_CACHE, or ~/.cache/finemoe."""

    @property
    def cache(self) -> Path:
        """`cache_dir`, or where all that can be made again is kept."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else cache_folder()
