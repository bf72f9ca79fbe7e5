"""Validation loss, and how the experts were used on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finemoe.data.batch import TokenBatch
from finemoe.model.moe.balance import max_violation
from finemoe.model.transformer import Transformer
from finemoe.training.report import dead_share, mean_max_vio


@dataclass(frozen=True)
class Validation:
    """Figures over the whole validation set."""

    loss: float
    """Cross-entropy per token, nats."""
    bits_per_byte: float
    """The same per byte of text: comparable across tokenizers."""
    load: Mapping[int, Tensor]
    """[experts] assignments, by layer index."""

    @property
    def headline(self) -> float:
        """The loss."""
        return self.loss

    def to_record(self) -> dict[str, Any]:
        """For metrics.jsonl. MaxVio here is the global one of 2408.15664: over the validation set."""
        record: dict[str, Any] = {"validation_loss": self.loss, "bits_per_byte": self.bits_per_byte}
        if self.load:
            record["max_vio"] = mean_max_vio(self.load)
            record["dead_experts"] = dead_share(self.load)
            record["load"] = {str(layer): load.tolist() for layer, load in self.load.items()}
        return record

    def to_summary(self) -> dict[str, Any]:
        """For summary.json; the figures of experts are None for a dense model."""
        return {
            "final_validation_loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "max_vio": mean_max_vio(self.load),
            "max_vio_per_layer": {str(layer): round(max_violation(load), 4) for layer, load in self.load.items()},
            "dead_experts": dead_share(self.load) if self.load else None,
        }


@torch.no_grad()
def validate(
    model: Transformer, batches: Iterable[TokenBatch], *, isolate_documents: bool, bytes_per_token: float
) -> Validation:
    """Run `model` over `batches`, on whatever device it is; leaves it in the mode it was in."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    total = weight = 0.0
    load: dict[int, Tensor] = {}
    for batch in batches:
        batch = batch.to(device)
        documents = batch.documents if isolate_documents else None
        output = model(batch.tokens, positions=batch.positions, documents=documents)
        hidden = output.hidden.flatten(0, 1)
        targets, weights = batch.targets.flatten(), batch.weights.flatten()
        total += model.backend.cross_entropy_sum(hidden, model.head_weight, targets, weights).item()
        weight += batch.weights.sum().item()
        for layer, record in output.routing.items():
            load[layer] = load[layer] + record.load.cpu() if layer in load else record.load.cpu()
    model.train(was_training)
    loss = total / weight
    return Validation(loss, loss / math.log(2) / bytes_per_token, load)
