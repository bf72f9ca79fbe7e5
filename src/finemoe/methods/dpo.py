"""Direct preference optimisation (Rafailov et al., 2305.18290) and its near kin: the better of two answers.

The reference is the model that the run begins with. What it says of every answer is one number, computed once and kept:
no second model is in memory while the first one learns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self, final

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor
from torch.nn import functional as F

from finemoe.data.batch import PackedBatch
from finemoe.methods.conversations import Conversations, ConversationsConfig, method_on
from finemoe.methods.measuring import GeneralText, HeldOut, Sampling
from finemoe.methods.reference import Reference
from finemoe.methods.setting import Setting
from finemoe.training.losses.coefficients import ByCoefficients, Places, Worth
from finemoe.training.method import Method


class DPOConfig(ConversationsConfig):
    """The better of two answers, against a reference."""

    kind: Literal["dpo"] = "dpo"
    mtp: Literal["freeze", "drop"] = "freeze"
    """What becomes of multi-token prediction modules: left as they are, or left out of the new model."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO's (eq. 7); ipo: the square of 2310.12036 (eq. 17), where beta is tau; hinge: SLiC's (2305.10425)."""
    beta: PositiveFloat = 0.1
    """[per nat] How strongly the model is held to the reference: the smaller, the further it may go."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """[share] Of pairs that are taken to be labelled the wrong way round (conservative DPO); of sigmoid alone."""
    reference: Literal["start", "none"] = "start"
    """start: the model that the run begins with; none: no reference, as in SimPO (2405.14734), with length = "mean"."""
    length: Literal["sum", "mean"] = "sum"
    """sum: log-probabilities of whole answers; mean: per token, so that longer answers are no better for it."""
    target_margin: NonNegativeFloat = 0.0
    """[nats] How far apart the answers are to be: SimPO's gamma over beta; of sigmoid alone."""
    nll: NonNegativeFloat = 0.0
    """[coefficient] Of the better answer's mean cross-entropy beside (RPO, 2404.19733): it keeps the answer likely."""
    samples: Annotated[int, Field(ge=0)] = 2
    """[prompts] Held-out questions that are answered at every validation, greedily, to be read on the run's page."""
    sample_tokens: Annotated[int, Field(ge=1)] = 64
    """[tokens] Longest such answer."""

    @property
    def prepares(self) -> bool:
        """A reference is what the run begins with."""
        return self.reference == "start"

    @model_validator(mode="after")
    def _of_sigmoid(self) -> Self:
        wrong = [name for name in ("label_smoothing", "target_margin") if getattr(self, name)]
        if wrong and self.loss != "sigmoid":
            raise ValueError(f'{wrong[0]} does nothing with loss = "{self.loss}": use "sigmoid", or leave it out')
        if self.reference == "none" and self.length == "sum":
            raise ValueError('without a reference the shorter answer would win: set length = "mean"')
        return self


FIGURES = (
    "accuracy", "margin", "accuracy_per_token", "longer_wins", "chosen_logprob", "rejected_logprob", "chosen_length",
    "rejected_length",
)  # fmt: skip


@final
@dataclass(frozen=True)
class Preference:
    """How much better the model finds the better answer, than the reference does."""

    config: DPOConfig
    known: Reference | None
    headline: str = "preference"
    reads_logprobs: bool = True
    figures: tuple[str, ...] = FIGURES

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Pairs."""
        return dict.fromkeys((self.headline, *self.figures), float(batch.num_documents // 2))

    def places(self, batch: PackedBatch) -> Places:
        """Every token of both answers."""
        return Places.of(batch)

    def worth(self, logprobs: Tensor, places: Places, batch: PackedBatch) -> Worth:
        """As in `coefficients.Rule`; even documents are the better answers."""
        config, count = self.config, batch.num_documents
        sums, lengths = (places.per_document(one, count) for one in (logprobs, torch.ones_like(logprobs)))
        of_reference = torch.zeros_like(sums) if self.known is None else self.known.of(batch)
        per = lengths if config.length == "mean" else torch.ones_like(lengths)
        ratio = ((sums - of_reference) / per).view(-1, 2)
        apart = ratio[:, 0] - ratio[:, 1]
        loss, slope = _loss(config, apart)
        signed = torch.stack((-slope, slope), dim=1).flatten() / per
        mean = (sums / lengths).view(-1, 2)
        if config.nll:
            loss = loss - config.nll * mean[:, 0]
            signed = signed + config.nll * torch.stack((1 / lengths[0::2], torch.zeros_like(slope)), dim=1).flatten()
        figures = {
            "accuracy": (apart > 0).float() + 0.5 * (apart == 0),
            "margin": config.beta * apart,
            "accuracy_per_token": (mean[:, 0] > mean[:, 1]).float(),
            "longer_wins": (lengths[0::2] > lengths[1::2]).float() + 0.5 * (lengths[0::2] == lengths[1::2]).float(),
            "chosen_logprob": sums[0::2],
            "rejected_logprob": sums[1::2],
            "chosen_length": lengths[0::2],
            "rejected_length": lengths[1::2],
        }
        return Worth(signed[places.documents], loss.sum(), {name: one.sum() for name, one in figures.items()})


def _loss(config: DPOConfig, apart: Tensor) -> tuple[Tensor, Tensor]:
    """[pairs]: the loss, and its derivative by how far `apart [pairs]` the answers are."""
    beta, smoothing = config.beta, config.label_smoothing
    match config.loss:
        case "sigmoid":
            scaled = beta * (apart - config.target_margin)
            loss = -(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)
            return loss, beta * (scaled.sigmoid() - (1 - smoothing))
        case "ipo":
            short = apart - 1 / (2 * beta)
            return short.square(), 2 * short
        case "hinge":
            short = 1 - beta * apart
            return short.clamp(min=0), -beta * (short > 0).to(apart.dtype)


def build(config: DPOConfig, setting: Setting) -> Method[PackedBatch]:
    """The method, on the pairs of `setting`.

    Raises:
        ConfigError, DataError: there is no model to begin with, or its template and the records do not go together.
    """
    data = Conversations.read(setting, config, "pair")
    known = Reference(data, setting) if config.reference == "start" else None
    objective = ByCoefficients(Preference(config, known))
    sampling = Sampling.of(data, config.samples, config.sample_tokens)
    measure = HeldOut(data, objective, sampling, GeneralText.of(config.general, setting))
    method = method_on(config, setting, data, objective, measure)
    return method if known is None else known.added_to(method)
