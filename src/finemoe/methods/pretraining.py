"""Pre-training: packed documents, the next token and what lies further ahead, balanced experts, everything trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from finemoe.core.seeds import derive
from finemoe.data import Loader, PreparedData, TokenBatch, prepare
from finemoe.methods.live import live_terms
from finemoe.methods.setting import MethodConfig, Setting
from finemoe.model.transformer import Transformer
from finemoe.text import Tokenizer
from finemoe.training.balancing import MoveBiases
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import NextToken
from finemoe.training.method import Method
from finemoe.training.validation import Validation, validate

_VALIDATION_TOKENS = 16_384  # per forward pass


class PretrainingConfig(MethodConfig):
    """Nothing of its own: [data], [mtp] and [balancing] say all."""

    kind: Literal["pretraining"] = "pretraining"

    moves_biases: ClassVar[bool] = True


def build(config: PretrainingConfig, setting: Setting) -> Method[TokenBatch]:
    """The method, on the corpus of `setting`.

    Raises:
        DataError: the corpus cannot be read, or is smaller than one batch.
    """
    data, live = PackedDocuments.read(setting), live_terms(setting)
    return Method(
        data=data,
        objective=NextToken(
            isolate_documents=setting.data.packing == "isolate",
            mtp=setting.mtp,
            mtp_depth=len(setting.model.mtp),
        ),
        measure=HeldOutLoss(data.prepared),
        before_update=(Clip(setting.max_gradient_norm),),
        after_update=(MoveBiases(setting.balancing),),
        notes=(f"added to the cross-entropy: {', '.join(live)}",) if live else (),
    )


@final
@dataclass(frozen=True)
class PackedDocuments:
    """Documents as one stream of tokens, cut into sequences: `training.method.TrainingData`."""

    prepared: PreparedData
    loader: Loader

    @staticmethod
    def read(setting: Setting) -> PackedDocuments:
        """The corpus of `setting`, in the order that its seed decides.

        Raises:
            DataError: it cannot be read, is smaller than one batch, or leaves nothing to validate on.
        """
        prepared = prepare(setting.data)
        prepared.require_batch(setting.sequences_per_step)
        _ = prepared.validation_bytes_per_token  # nothing to measure on is said now, not after the first steps
        return PackedDocuments(prepared, prepared.train_loader(derive(setting.seed, "data")))

    @property
    def tokenizer(self) -> Tokenizer:
        """The corpus's, or the one that was given."""
        return self.prepared.tokenizer

    @property
    def sequences_per_epoch(self) -> int:
        """Distinct sequences."""
        return self.loader.sequences_per_epoch

    @property
    def companions(self) -> Mapping[str, str]:
        """None: documents are no conversations."""
        return {}

    @property
    def report(self) -> Mapping[str, Any]:
        """What was read and left out, with the hashes of corpus and tokenizer."""
        return self.prepared.report

    def batch(self, position: int, num_sequences: int) -> TokenBatch:
        """Sequences by position: a pure function."""
        return self.loader.batch(position, num_sequences)

    def token_frequencies(self) -> Tensor:
        """[ids] counts in the training tokens."""
        return torch.from_numpy(self.prepared.token_frequencies())


@dataclass(frozen=True)
class HeldOutLoss:
    """Measures the loss on the documents that were held out."""

    prepared: PreparedData

    def __call__(self, model: Transformer) -> Validation:
        """Run over all of them."""
        config = self.prepared.config
        return validate(
            model,
            self.prepared.validation_batches(max(1, _VALIDATION_TOKENS // config.sequence_length)),
            isolate_documents=config.packing == "isolate",
            bytes_per_token=self.prepared.validation_bytes_per_token,
        )
