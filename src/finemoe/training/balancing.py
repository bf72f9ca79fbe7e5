"""Loss-free balancing: after every step the selection bias of V3's router moves against the load of that step.

DeepSeek-V3 section 2.1.2 and Wang et al. (2408.15664): an overloaded expert's bias falls, an underloaded one's rises.
The load is that of the whole optimizer step, so accumulating micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from finemoe.core.config import Config
from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.transformer import Transformer


class BalancingConfig(Config):
    """How far the bias moves in one step. Rates are per step, so a short run needs a larger one than V3's."""

    rule: Literal["sign", "proportional"] = "sign"
    """sign: every bias moves by `rate`; proportional: by `rate` times (mean load - load) / mean load."""
    rate: NonNegativeFloat | None = None
    """[per step] V3's gamma. None: V3's 0.001, or 1.5 / steps where that is larger and the run starts from drawn
    weights: what a bias has to travel, about the width of the scores, does not depend on the length of the run
    (measured on the tiny ladder, docs/log.md). Biases that were opened are where they should be, and move at V3's
    rate."""
    until: Annotated[float, Field(ge=0, le=1)] = 0.966
    """[share] Share of the run after which the biases stay as they are (V3: 14.3 of 14.8 trillion tokens)."""

    def resolved(self, total_steps: int, *, opened: bool) -> BalancingConfig:
        """With a rate, for a run of so many steps; `opened`: it starts from a trained model."""
        if self.rate is not None:
            return self
        return self.model_copy(update={"rate": 0.001 if opened else max(0.001, 1.5 / total_steps)})


def has_selection_bias(model: ModelConfig) -> bool:
    """Whether any layer selects with a bias."""
    return any(_is_biased(block) for block in (*model.blocks, *model.mtp))


def _is_biased(block: BlockConfig) -> bool:
    layer = block.feed_forward
    return isinstance(layer, MoEConfig) and layer.router.selects_with_bias


def selection_biases(model: Transformer) -> dict[int, Tensor]:
    """The bias `[experts]` of every layer that has one, by layer index."""
    layers = model.moe_layers.items()
    return {n: layer.router.selection_bias for n, layer in layers if layer.config.router.selects_with_bias}


@dataclass(frozen=True)
class MoveBiases:
    """Move every selection bias once, after an update."""

    config: BalancingConfig
    """Resolved."""

    @torch.no_grad()
    def __call__(self, model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        """As in `training.method.AfterUpdate`."""
        if progress >= self.config.until or not self.config.rate:
            return
        for number, bias in selection_biases(model).items():
            if number not in load:  # a prediction module that is left alone
                continue
            counts = load[number].to(bias.device, torch.float32)
            error = counts.mean() - counts
            step = error.sign() if self.config.rule == "sign" else error / counts.mean()
            bias.add_(step, alpha=self.config.rate)
