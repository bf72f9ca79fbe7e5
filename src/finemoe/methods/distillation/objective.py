"""What distillation minimises: the divergence from the teacher's distributions, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from finemoe.data.batch import PackedBatch, TokenBatch
from finemoe.methods.distillation.own_answers import OwnAnswers, Prompts
from finemoe.methods.distillation.teacher import Reading, Teacher
from finemoe.model.divergence import Direction, divergence_sum
from finemoe.model.transformer import Transformer
from finemoe.training.losses.next_token import CROSS_ENTROPY
from finemoe.training.objective import Terms, balance_counts, balance_sums

DIVERGENCE, AGREEMENT = "divergence", "agreement"


@final
@dataclass(frozen=True)
class Distil:
    """`training.objective.Objective`: divergence per weighted token, cross-entropy of the data beside it."""

    teacher: Teacher
    vocab: int
    """Ids that are compared; both models' matrices have at least as many rows."""
    direction: Direction
    temperature: float
    mix: float
    """What the cross-entropy is multiplied by in the loss."""
    isolate: bool
    """Documents of a row do not see each other."""
    answers: OwnAnswers | None = None
    """Who answers prompts, where the batches are prompts."""

    @property
    def headline(self) -> str:
        """The divergence."""
        return DIVERGENCE

    @property
    def figures(self) -> tuple[str, ...]:
        """The share of tokens where student and teacher hold the same for the most probable; and the cross-entropy.

        Of the student's own answers there is none: it would be the entropy of its own guesses.
        """
        return (AGREEMENT,) if self.answers is not None else (AGREEMENT, CROSS_ENTROPY)

    def counts(self, batch: PackedBatch | TokenBatch | Prompts) -> dict[str, float]:
        """Weighted tokens, or answers, whose tokens weigh 1 together; sequences for each balance term."""
        if isinstance(batch, Prompts):
            total, sequences = float(batch.num_sequences), batch.num_sequences
        else:
            reading = Reading.of(batch, self.isolate)
            total, sequences = reading.rows.weights.sum().item(), reading.sequences
        return {**dict.fromkeys((DIVERGENCE, *self.figures), total), **balance_counts(sequences)}

    def weights(self, progress: float) -> Mapping[str, float]:
        """The gradient of a divergence at temperature T is 1 / T² as large: it counts T² (Hinton et al. 1503.02531)."""
        return {DIVERGENCE: self.temperature**2, AGREEMENT: 0.0, CROSS_ENTROPY: self.mix}

    def terms(self, model: Transformer, batch: PackedBatch | TokenBatch | Prompts) -> Terms:
        """Sums over the batch. Cross-entropy that counts nothing is left out while the model is trained."""
        if isinstance(batch, Prompts):
            assert self.answers is not None
            batch = self.answers(model, batch)
        reading = Reading.of(batch, self.isolate)
        places = reading.places
        output = reading.through(model)
        hidden, weights = output.hidden.flatten(0, 1)[places], reading.rows.weights.flatten()[places]
        head, said = model.head_weight, self.teacher(reading, places)
        found = divergence_sum(hidden, head, said, weights, self.direction, self.temperature, self.vocab)
        sums = {DIVERGENCE: found.total, AGREEMENT: found.agreed}
        if CROSS_ENTROPY in self.figures and (self.mix or not model.training):
            targets = reading.rows.targets.flatten()[places]
            sums[CROSS_ENTROPY] = model.backend.cross_entropy_sum(hidden, head, targets, weights)
        return Terms(sums | balance_sums(output.routing), output.routing)
