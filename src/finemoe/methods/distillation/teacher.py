"""The teacher: a model that is opened, checked against the student, and asked what it makes of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import torch
from torch import Tensor

from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.checkpoint.open import load_tokenizer
from finemoe.core.errors import ConfigError
from finemoe.data.batch import PackedBatch, TokenBatch
from finemoe.model.divergence import BestOfTeacher, WholeTeacher
from finemoe.model.transformer import ModelOutput, Transformer
from finemoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reading:
    """What a model reads of a batch: conversations in one row, or sequences of documents."""

    rows: TokenBatch
    sequences: int
    """What balance losses are averaged over: conversations, or rows."""
    isolate: bool
    """A token sees its own document only."""
    packed: bool
    """The only row holds documents that have nothing to do with each other."""

    @staticmethod
    def of(batch: PackedBatch | TokenBatch, isolate: bool) -> Reading:
        """`isolate` is of rows of documents; those of a packed batch are always apart."""
        if isinstance(batch, PackedBatch):
            return Reading(batch.rows, batch.num_documents, isolate=True, packed=True)
        return Reading(batch, batch.num_sequences, isolate, packed=False)

    @property
    def places(self) -> Tensor:
        """[places] int64: the tokens that have a weight, counted through all rows."""
        return self.rows.weights.flatten().nonzero()[:, 0]

    def through(self, model: Transformer) -> ModelOutput:
        """What `model` makes of it."""
        documents = self.rows.documents if self.isolate else None
        return model(  # type: ignore[no-any-return]
            self.rows.tokens, positions=self.rows.positions, documents=documents, by_document=self.packed
        )


class Teacher(Protocol):
    """What an objective asks."""

    def __call__(self, reading: Reading, places: Tensor) -> WholeTeacher | BestOfTeacher:
        """What it says of the next token at `places`."""
        ...


@final
@dataclass(frozen=True)
class Beside:
    """A teacher in memory, which reads every batch itself. It is never trained, and stays in eval mode."""

    model: Transformer
    vocab: int
    """Ids that it is asked about: those from here on are padding of its matrix, or of the student's."""

    def __call__(self, reading: Reading, places: Tensor) -> WholeTeacher:
        """As in `Teacher`; no gradient."""
        with torch.no_grad():
            hidden = reading.through(self.model).hidden.flatten(0, 1)[places]
        return WholeTeacher(hidden, self.model.head_rows(slice(self.vocab)).detach())

    def prepare(self, model: Transformer, begins: bool) -> None:
        """Go where the student is."""
        self.model.to(model.embedding.weight.device)


def open_teacher(source: str, tokenizer: Tokenizer, vocab_size: int) -> LanguageModel:
    """The model at `source`, frozen; its architecture is its own affair.

    Args:
        source: a run, a checkpoint of one, an imported or a Hugging Face folder.
        tokenizer: the student's.
        vocab_size: rows of the student's matrices.

    Raises:
        ConfigError: its tokenizer is another, so that one id would mean two things.
        CheckpointError: nothing to open.
    """
    theirs = load_tokenizer(Path(source))
    if theirs.fingerprint() != tokenizer.fingerprint():
        raise ConfigError(
            f"method.teacher {source} has another tokenizer than the student ({theirs.vocab_size} and "
            f"{tokenizer.vocab_size} ids, or other pieces): token by token only models of one tokenizer can be "
            f'compared. Begin with a student of its tokenizer, or draw answers from it with "finemoe sample" and '
            'learn them with method.kind = "sft"'
        )
    opened = open_language_model(source)
    opened.model.requires_grad_(False)
    return opened
