"""What GRPO minimises, on answers that are packed without padding (DeepSeekMath eq. 3; V2 eq. 32; R1 eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from finemoe.methods.grpo.batch import RolloutBatch
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.surrogate import Tokens, figures_of, surrogate
from finemoe.model.logprobs import logprobs_and_entropy
from finemoe.model.moe.decision import RoutingConstraint, RoutingRecord
from finemoe.model.transformer import ModelOutput, Transformer
from finemoe.training.objective import Terms, balance_counts, balance_sums

POLICY, ENTROPY, MISMATCH = "policy", "entropy", "expert_mismatch"


@final
@dataclass(frozen=True)
class PolicyGradient:
    """`training.objective.Objective` of a policy gradient; balance losses per answer beside it."""

    config: GRPOConfig
    vocab_size: int | None = None
    """Ids that can be drawn, where the model has more rows than its tokenizer ids."""

    @property
    def headline(self) -> str:
        """What is minimised: minus the gain, and the divergence from the reference. It says little: see the reward."""
        return POLICY

    @property
    def figures(self) -> tuple[str, ...]:
        """Per token that was answered; and the share of experts that are others than when it was written."""
        return (*figures_of(self.config), ENTROPY, MISMATCH)

    def counts(self, batch: RolloutBatch) -> dict[str, float]:
        """Answers, or tokens; decisions of routers, of the whole texts."""
        answered = float(len(batch.places))
        chosen = float(sum(one.numel() for one in batch.routes.values()))
        by_token = self.config.normalize == "token"
        return {
            POLICY: answered if by_token else float(batch.num_counting),
            **dict.fromkeys((*figures_of(self.config), ENTROPY), answered),
            MISMATCH: chosen,
            **balance_counts(batch.num_sequences),
        }

    def weights(self, progress: float) -> Mapping[str, float]:
        """Figures count nothing."""
        return dict.fromkeys(self.figures, 0.0)

    def terms(self, model: Transformer, batch: RolloutBatch) -> Terms:
        """Sums over the batch."""
        output = read(model, batch, batch.replay)
        hidden = output.hidden[0, batch.places] / self.config.temperature
        targets = batch.rows.targets[0, batch.places]
        logprobs, entropy = logprobs_and_entropy(model, hidden.detach(), targets, self.vocab_size)
        with torch.no_grad():
            tokens = Tokens(
                advantages=batch.advantages,
                behaviour=batch.behaviour,
                old=logprobs if batch.old is None else batch.old,
                reference=batch.reference,
                answers=batch.answers,
                count=batch.num_sequences,
            )
            worth = surrogate(self.config, logprobs, tokens)
        head = model.head_weight[: self.vocab_size]
        loss = model.backend.cross_entropy_sum(hidden, head, targets, worth.coefficients)
        assert worth.loss is not None
        loss = loss + (worth.loss.to(loss.dtype) - loss).detach()  # its value, with the gradient that it has
        sums: dict[str, Tensor] = {POLICY: loss, **worth.figures, ENTROPY: entropy.sum()}
        sums[MISMATCH] = mismatch(output.routing, batch.routes).to(loss.device)
        return Terms(sums | balance_sums(output.routing), output.routing)


def read(model: Transformer, batch: RolloutBatch, replay: Mapping[int, Tensor]) -> ModelOutput:
    """A forward pass over the answers, each by itself, with the experts of `replay`."""
    rows = batch.rows
    output: ModelOutput = model(
        rows.tokens,
        positions=rows.positions,
        documents=rows.documents,
        by_document=True,
        constraint={layer: RoutingConstraint(replay=one) for layer, one in replay.items()} or None,
        record=bool(batch.routes),
    )
    return output


@torch.no_grad()
def mismatch(routing: Mapping[int, RoutingRecord], drawn: Mapping[int, Tensor]) -> Tensor:
    """How many experts a router would choose that the text was not written by, over all layers and tokens.

    Under replay it is the router's own choice that is compared.
    """
    total = torch.zeros(())
    for layer, chosen in drawn.items():
        record = routing[layer]
        assert record.decision is not None
        own = record.decision.expert_ids if record.unconstrained is None else record.unconstrained
        total = total + (own[:, :, None] != chosen[:, None, :]).all(dim=-1).sum().cpu()
    return total
