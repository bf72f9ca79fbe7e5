"""StepReport: what one optimizer step did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finemoe.model.moe.balance import max_violation


@dataclass(frozen=True)
class StepReport:
    """Figures of one step."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Tokens trained on so far."""
    loss: float | None
    """The headline term of the objective: in pre-training the cross-entropy per token, nats. None: nothing to count,
    and nothing was changed."""
    terms: Mapping[str, float]
    """Every term of the objective, divided."""
    gradient_norm: float
    """Of all gradients together, before anything changed them."""
    learning_rate: float
    seconds: float
    """Training time so far, without validation and saving."""
    tokens_per_second: float
    """Of this step."""
    processor_seconds: float
    """Of this step, all threads of this process together: what else runs on the machine hardly changes it."""
    load: Mapping[int, Tensor]
    """[experts] assignments in this step, by layer index."""
    dropped: int
    """Assignments beyond capacity."""
    selection_bias: Mapping[int, float] = field(default_factory=dict)
    """Largest absolute selection bias after the step, by layer index, where there is one."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the method did to the gradients, in figures of its own."""
    skipped: int = 0
    """Steps of the run so far that held nothing to count."""

    def max_vio(self) -> dict[int, float]:
        """MaxVio by layer."""
        return {layer: max_violation(load) for layer, load in self.load.items()}

    def to_record(self) -> dict[str, Any]:
        """For metrics.jsonl: load and MaxVio per layer, dead experts as the share that got no token.

        A step that held nothing to count has a record of a kind of its own, so that no loss is made up for it.
        """
        if self.loss is None:
            passed = {"kind": "skipped", "step": self.step, "tokens": self.tokens, "skipped": self.skipped}
            return {**passed, "seconds": round(self.seconds, 4)}
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.step,
            "tokens": self.tokens,
            "loss": self.loss,
            "terms": dict(self.terms),
            "gradient_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "processor_seconds": round(self.processor_seconds, 5),
        }
        if self.load:
            violations = self.max_vio()
            record["max_vio"] = mean_max_vio(self.load)
            record["max_vio_per_layer"] = {str(layer): round(value, 4) for layer, value in violations.items()}
            record["dead_experts"] = dead_share(self.load)
            record["dead_experts_per_layer"] = {
                str(layer): dead_share({layer: one}) for layer, one in self.load.items()
            }
            record["load"] = {str(layer): load.tolist() for layer, load in self.load.items()}
            record["dropped"] = self.dropped
        if self.selection_bias:
            record["selection_bias"] = {str(layer): round(value, 6) for layer, value in self.selection_bias.items()}
        if self.figures:
            record["figures"] = dict(self.figures)
        return record


def mean_max_vio(load: Mapping[int, Tensor]) -> float | None:
    """MaxVio averaged over layers; None for a dense model."""
    return sum(max_violation(one) for one in load.values()) / len(load) if load else None


def dead_share(load: Mapping[int, Tensor]) -> float:
    """Share of all experts, over all layers, that got no token."""
    return sum(int((one == 0).sum()) for one in load.values()) / sum(len(one) for one in load.values())


def recent_loss(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean training loss of the last fifth of `steps`, at most 100: one batch alone is mostly noise.

    `steps`: records of metrics.jsonl. None when there are none.
    """
    recent = [record["loss"] for record in steps[-max(1, min(100, len(steps) // 5)) :]]
    return sum(recent) / len(recent) if recent else None
