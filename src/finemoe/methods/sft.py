"""Supervised fine-tuning: conversations, of which the model learns what the assistant wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from pydantic import NonNegativeInt
from torch import Tensor

from finemoe.data.batch import PackedBatch
from finemoe.data.conversations.packing import Weighing
from finemoe.methods.conversations import Conversations, ConversationsConfig, method_on
from finemoe.methods.measuring import GeneralText, HeldOut, Sampling
from finemoe.methods.setting import Setting
from finemoe.training.losses.coefficients import ByCoefficients, Places, Worth
from finemoe.training.losses.next_token import CROSS_ENTROPY
from finemoe.training.method import Method


class SFTConfig(ConversationsConfig):
    """Fine-tuning on what the assistant wrote (DeepSeek LLM section 4.1)."""

    kind: Literal["sft"] = "sft"
    loss: Weighing = "token"
    """token: every token of an answer counts alike; conversation: every conversation does, long or short."""
    samples: NonNegativeInt = 2
    """[prompts] Held-out questions that are answered at every validation, greedily, to be read on the run's page."""
    sample_tokens: NonNegativeInt = 64
    """[tokens] Longest such answer."""

    moves_biases: ClassVar[bool] = True


@final
@dataclass(frozen=True)
class Learn:
    """Minus the log-probability of each token that is to be learnt: its coefficient is its weight."""

    headline: str = CROSS_ENTROPY
    reads_logprobs: bool = False
    figures: tuple[str, ...] = ()

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """The weights, which add up to tokens or to conversations."""
        return {self.headline: batch.rows.weights.sum().item()}

    def places(self, batch: PackedBatch) -> Places:
        """Every token that is to be learnt."""
        return Places.of(batch)

    def worth(self, logprobs: Tensor, places: Places, batch: PackedBatch) -> Worth:
        """As in `coefficients.Rule`."""
        return Worth(places.weights)


def build(config: SFTConfig, setting: Setting) -> Method[PackedBatch]:
    """The method, on the conversations of `setting`.

    Raises:
        ConfigError, DataError: there is no model to begin with, or its template and the records do not go together.
    """
    data = Conversations.read(setting, config, "conversation", weighing=config.loss)
    depth = len(setting.model.mtp) if config.mtp == "train" else 0
    objective = ByCoefficients(Learn(), setting.mtp, depth)
    sampling = Sampling.of(data, config.samples, config.sample_tokens)
    measure = HeldOut(data, objective, sampling, GeneralText.of(config.general, setting))
    return method_on(config, setting, data, objective, measure)
