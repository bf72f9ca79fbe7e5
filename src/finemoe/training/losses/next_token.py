"""Pre-training's objective: next-token cross-entropy, what lies further ahead, and the balance terms of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from finemoe.core.config import Config
from finemoe.data.batch import TokenBatch
from finemoe.model.transformer import Transformer
from finemoe.training.objective import Terms, balance_counts, balance_sums

CROSS_ENTROPY = "cross_entropy"


class MTPLossConfig(Config):
    """Weight of multi-token prediction, lambda of V3 Eq. 25."""

    weight: NonNegativeFloat = 0.3
    """[coefficient] V3's lambda: the weight of the look-ahead losses, averaged over depths."""
    late_weight: NonNegativeFloat = 0.1
    """[coefficient] The same in the last part of the run."""
    late_from: Annotated[float, Field(ge=0, le=1)] = 0.676
    """[share] Share of the run after which `late_weight` holds (V3: 10 of 14.8 trillion tokens)."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy per weighted token; balance losses per sequence, summed over layers, coefficients included."""

    isolate_documents: bool
    """Let a token attend to its own document only."""
    mtp: MTPLossConfig = field(default_factory=MTPLossConfig)
    mtp_depth: int = 0
    """Multi-token prediction modules of the model, all of them trained."""

    @property
    def headline(self) -> str:
        """The cross-entropy of the next token."""
        return CROSS_ENTROPY

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        """Weighted tokens for the cross-entropies, sequences for each balance term."""
        ahead = {name: weights.sum().item() for name, _, weights in self._ahead(batch)}
        return {CROSS_ENTROPY: batch.weights.sum().item(), **ahead, **balance_counts(batch.num_sequences)}

    def weights(self, progress: float) -> Mapping[str, float]:
        """Multi-token prediction counts lambda / depths for each depth (V3 Eq. 25)."""
        weight = self.mtp.weight if progress < self.mtp.late_from else self.mtp.late_weight
        return {mtp_name(depth): weight / self.mtp_depth for depth in range(1, self.mtp_depth + 1)}

    def terms(self, model: Transformer, batch: TokenBatch) -> Terms:
        """Sums over the batch."""
        output = model(
            batch.tokens,
            positions=batch.positions,
            documents=batch.documents if self.isolate_documents else None,
            mtp=self.mtp_depth > 0,
        )
        head = model.head_weight
        hidden = output.hidden.flatten(0, 1)
        targets, weights, loss = batch.targets.flatten(), batch.weights.flatten(), model.backend.cross_entropy_sum
        sums: dict[str, Tensor] = {CROSS_ENTROPY: loss(hidden, head, targets, weights)}
        for (name, targets, weights), ahead in zip(self._ahead(batch), output.mtp_hidden, strict=True):
            states = ahead.flatten(0, 1)
            sums[name] = loss(states, head, targets.flatten(), weights.flatten())
        return Terms(sums | balance_sums(output.routing), output.routing)

    def _ahead(self, batch: TokenBatch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, targets and weights `[batch, seq - k]` of each depth k: place i predicts token i + k + 1 (Eq. 24)."""
        for depth in range(1, self.mtp_depth + 1):
            weights = batch.weights[:, depth:]
            if self.isolate_documents:  # what stands k tokens ahead may be another document
                weights = weights * (batch.documents[:, depth:] == batch.documents[:, :-depth])
            yield mtp_name(depth), batch.targets[:, depth:], weights


def mtp_name(depth: int) -> str:
    """The term of one depth."""
    return f"mtp_{depth}"
