"""The one objective of post-training: a method says what each token's log-probability is worth, and no more.

Every method of the family has the gradient  sum over tokens of  c · d(-log p)/d(weights), with a coefficient c for each
token (the gradient coefficient of DeepSeekMath section 5.2.1): of fine-tuning it is 1, of a preference the same for all
tokens of an answer, of a policy gradient the advantage. So a method is a function of log-probabilities, which are
computed without gradient, and the gradient is that of the cross-entropy kernel, weighed: no [tokens, vocab] is ever in
memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from finemoe.data.batch import PackedBatch
from finemoe.model.logprobs import token_logprobs
from finemoe.model.transformer import Transformer
from finemoe.training.losses.next_token import MTPLossConfig, mtp_name
from finemoe.training.objective import Terms, balance_counts, balance_sums


@dataclass(frozen=True)
class Places:
    """The tokens of a batch that count: those with a weight."""

    index: Tensor
    """[places] int64 into the batch's one row."""
    targets: Tensor
    """[places] int64: what is predicted there."""
    weights: Tensor
    """[places] float32, of the batch."""
    documents: Tensor
    """[places] int64: the document of each."""

    @staticmethod
    def of(batch: PackedBatch) -> Places:
        """Those of `batch`."""
        rows = batch.rows
        index = rows.weights[0].nonzero()[:, 0]
        return Places(index, rows.targets[0, index], rows.weights[0, index], rows.documents[0, index])

    def per_document(self, values: Tensor, count: int) -> Tensor:
        """[count]: the sum of `values [places]` over each of `count` documents."""
        return values.new_zeros(count).index_add(0, self.documents, values)


@dataclass(frozen=True)
class Worth:
    """What a method makes of log-probabilities."""

    coefficients: Tensor
    """[places]: what -log p of each is multiplied by in the gradient."""
    loss: Tensor | None = None
    """Scalar: what is minimised, summed over the batch; None: the weighed sum of -log p itself."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars by name, summed over the batch: reported beside the loss."""


class Rule(Protocol):
    """What a method is: names and denominators from the batch alone, and a worth from log-probabilities."""

    @property
    def headline(self) -> str:
        """The term that reports call the loss."""
        ...

    @property
    def reads_logprobs(self) -> bool:
        """False: `worth` is given none, and a pass over the head is saved."""
        ...

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that `worth` gives: weight 0 in the loss."""
        ...

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Denominators of the headline and of every figure."""
        ...

    def places(self, batch: PackedBatch) -> Places:
        """What is scored; as a rule `Places.of(batch)`."""
        ...

    def worth(self, logprobs: Tensor, places: Places, batch: PackedBatch) -> Worth:
        """From `logprobs [places]` in nats, float32, without gradient."""
        ...


@dataclass(frozen=True)
class ByCoefficients:
    """`training.objective.Objective` of a rule; balance losses per document, and multi-token prediction, beside it."""

    rule: Rule
    mtp: MTPLossConfig = field(default_factory=MTPLossConfig)
    mtp_depth: int = 0
    """Modules that are trained too, on the tokens that have a weight; 0 leaves them alone."""

    @property
    def headline(self) -> str:
        """The rule's."""
        return self.rule.headline

    @property
    def figures(self) -> tuple[str, ...]:
        """The rule's."""
        return self.rule.figures

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """The rule's, weighted tokens ahead, documents for each balance term."""
        ahead = {mtp_name(depth): _further(batch, depth)[1].sum().item() for depth in range(1, self.mtp_depth + 1)}
        return {**self.rule.counts(batch), **ahead, **balance_counts(batch.num_documents)}

    def weights(self, progress: float) -> Mapping[str, float]:
        """Figures count nothing; multi-token prediction lambda / depths for each depth (V3 Eq. 25)."""
        weight = self.mtp.weight if progress < self.mtp.late_from else self.mtp.late_weight
        ahead = {mtp_name(depth): weight / self.mtp_depth for depth in range(1, self.mtp_depth + 1)}
        return {**dict.fromkeys(self.rule.figures, 0.0), **ahead}

    def terms(self, model: Transformer, batch: PackedBatch) -> Terms:
        """Sums over the batch."""
        rows, places = batch.rows, self.rule.places(batch)
        output = model(
            rows.tokens,
            positions=rows.positions,
            documents=rows.documents,
            by_document=True,
            mtp=self.mtp_depth > 0,
        )
        hidden = output.hidden[0, places.index]
        logprobs = hidden.new_empty(0)
        if self.rule.reads_logprobs:
            logprobs = token_logprobs(model, hidden.detach(), places.targets)[0]
        with torch.no_grad():
            worth = self.rule.worth(logprobs, places, batch)
        loss_of = model.backend.cross_entropy_sum
        loss = loss_of(hidden, model.head_weight, places.targets, worth.coefficients)
        if worth.loss is not None:
            loss = loss + (worth.loss.to(loss.dtype) - loss).detach()  # its value, with the gradient that it has
        sums: dict[str, Tensor] = {self.headline: loss, **worth.figures}
        for depth, states in enumerate(output.mtp_hidden, 1):
            targets, weights = _further(batch, depth)
            sums[mtp_name(depth)] = loss_of(states[0], model.head_weight, targets, weights)
        return Terms(sums | balance_sums(output.routing), output.routing)


def _further(batch: PackedBatch, depth: int) -> tuple[Tensor, Tensor]:
    """Targets and weights `[places]` of what lies `depth` tokens further: where its document still goes on."""
    rows = batch.rows
    same = rows.documents[0, depth:] == rows.documents[0, : max(0, rows.documents.shape[1] - depth)]
    return rows.targets[0, depth:][same], rows.weights[0, depth:][same]
