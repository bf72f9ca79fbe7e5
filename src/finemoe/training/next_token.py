"""Pre-training's objective: next-token cross-entropy plus the balance terms of every MoE layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from finemoe.data.batch import TokenBatch
from finemoe.model.moe.balance import BALANCE_TERMS
from finemoe.model.transformer import Transformer
from finemoe.training.cross_entropy import cross_entropy_sum
from finemoe.training.objective import Terms

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy per weighted token; balance losses per sequence, summed over layers, coefficients included."""

    isolate_documents: bool
    """Let a token attend to its own document only."""

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        """Weighted tokens for the cross-entropy, sequences for each balance term."""
        sequences = float(batch.tokens.shape[0])
        return {CROSS_ENTROPY: batch.weights.sum().item(), **dict.fromkeys(BALANCE_TERMS, sequences)}

    def terms(self, model: Transformer, batch: TokenBatch) -> Terms:
        """Sums over the batch."""
        output = model(
            batch.tokens,
            positions=batch.positions,
            documents=batch.documents if self.isolate_documents else None,
        )
        hidden = output.hidden.flatten(0, 1)
        cross_entropy = cross_entropy_sum(hidden, model.head_weight, batch.targets.flatten(), batch.weights.flatten())
        sums: dict[str, Tensor] = {CROSS_ENTROPY: cross_entropy}
        for record in output.routing.values():
            for name, value in record.balance.items():
                sums[name] = sums[name] + value if name in sums else value
        return Terms(sums, output.routing)
