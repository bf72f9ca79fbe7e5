"""Reward models: how good an answer is, as the difference of two words' logits behind it.

No tensor is added to the model, so that it is saved, exported and served like any other: what it thinks of an answer is
what it would say of it, as generative judges do. Pairs are learnt by Bradley and Terry's model (InstructGPT,
2203.02155, eq. 1).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.core.errors import ConfigError
from finemoe.core.statistics import wilson
from finemoe.data.batch import PackedBatch
from finemoe.methods.conversations import Conversations, ConversationsConfig, method_on
from finemoe.methods.measuring import GeneralText, HeldOutFigures
from finemoe.methods.setting import Setting
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer
from finemoe.text.turns import encode_turns
from finemoe.training.losses.coefficients import ByCoefficients, Places, Worth
from finemoe.training.method import Method

LABELS = (("good", "bad"), ("yes", "no"), ("A", "B"), ("1", "0"))
"""Words for good and bad, of which the first two are taken that are a token of the tokenizer each."""
_CALIBRATION_BINS = 10


class RewardConfig(ConversationsConfig):
    """How good an answer is, from pairs of which one is better."""

    kind: Literal["reward"] = "reward"
    mtp: Literal["freeze", "drop"] = "freeze"
    """What becomes of multi-token prediction modules: left as they are, or left out of the new model."""
    loss: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: the better answer of a pair has the higher reward (Bradley and Terry); pointwise: each answer by itself
    is good or bad, so that a reward is the logarithm of the odds that it is good."""
    labels: tuple[str, str] | None = None
    """The words for good and bad, a token of the tokenizer each. None: good and bad; where they are several tokens, yes
    and no; or A and B, or 1 and 0."""


@final
@dataclass(frozen=True)
class Judge:
    """What the model would say behind an answer, in two words."""

    config: RewardConfig
    label_ids: tuple[int, int]
    headline: str = "reward"
    reads_logprobs: bool = True
    figures: tuple[str, ...] = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Pairs."""
        return dict.fromkeys((self.headline, *self.figures), float(batch.num_documents // 2))

    def places(self, batch: PackedBatch) -> Places:
        """The end of every answer twice, once for each word."""
        ends = Places.of(batch)
        twice = (one.repeat_interleave(2) for one in (ends.index, ends.weights, ends.documents))
        index, weights, documents = twice
        targets = torch.tensor(self.label_ids, device=index.device).repeat(len(ends.index))
        return Places(index, targets, weights, documents)

    def worth(self, logprobs: Tensor, places: Places, batch: PackedBatch) -> Worth:
        """As in `coefficients.Rule`; even documents are the better answers."""
        rewards = (logprobs[0::2] - logprobs[1::2]).view(-1, 2)
        apart = rewards[:, 0] - rewards[:, 1]
        if self.config.loss == "pairwise":
            loss, slope = -F.logsigmoid(apart), apart.sigmoid() - 1
            slopes = torch.stack((slope, -slope), dim=1)
        else:
            loss = -F.logsigmoid(rewards[:, 0]) - F.logsigmoid(-rewards[:, 1])
            slopes = torch.stack((rewards[:, 0].sigmoid() - 1, rewards[:, 1].sigmoid()), dim=1)
        by_reward = slopes.flatten()
        coefficients = torch.stack((-by_reward, by_reward), dim=1).flatten()
        figures = {
            "accuracy": (apart > 0).float() + 0.5 * (apart == 0),
            "margin": apart,
            "chosen_reward": rewards[:, 0],
            "rejected_reward": rewards[:, 1],
        }
        return Worth(coefficients, loss.sum(), {name: one.sum() for name, one in figures.items()})


@dataclass(frozen=True)
class HeldOutRewards:
    """Measures a reward model on the pairs held out: loss, accuracy with its interval, calibration."""

    data: Conversations
    objective: ByCoefficients
    judge: Judge
    general: GeneralText | None

    def __call__(self, model: Transformer) -> HeldOutFigures:
        """Over all of them."""
        found: list[NDArray[np.float64]] = []
        loss = 0.0
        load: dict[int, Tensor] = {}
        for batch in self.data.held_out():
            terms = self.objective.terms(model, batch.to(model.embedding.weight.device))
            loss += terms.sums[self.judge.headline].item()
            found.append(_pairs_of(model, batch, self.judge))
            for layer, record in terms.routing.items():
                load[layer] = load[layer] + record.load.cpu() if layer in load else record.load.cpu()
        values = {"validation_loss": loss / sum(map(len, found)), **figures_of(np.concatenate(found))}
        if self.general is not None:
            values["general_loss"] = self.general(model)
        return HeldOutFigures(values, load)


def _pairs_of(model: Transformer, batch: PackedBatch, judge: Judge) -> NDArray[np.float64]:
    """[pairs, 2]: rewards of the better and the worse answers of `batch`."""
    rewards = rewards_of(model, batch, judge.label_ids)
    return rewards.view(-1, 2).double().numpy()


@torch.no_grad()
def rewards_of(model: Transformer, batch: PackedBatch, label_ids: tuple[int, int]) -> Tensor:
    """[documents]: the reward of every document of `batch`, each with one weighted place, its end."""
    batch = batch.to(model.embedding.weight.device)
    rows, ends = batch.rows, Places.of(batch)
    output = model(rows.tokens, positions=rows.positions, documents=rows.documents)
    logits = output.hidden[0, ends.index].float() @ model.head_rows(label_ids).float().t()
    return (logits[:, 0] - logits[:, 1]).cpu()


def figures_of(rewards: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy with Wilson's interval, and how far the probability of being right is from being it.

    Args:
        rewards: [pairs, 2], of the better and the worse answer; the probability that the first is better is the
            sigmoid of their difference.
    """
    apart = rewards[:, 0] - rewards[:, 1]
    right = np.where(apart == 0, 0.5, apart > 0)
    low, high = wilson(float(right.mean()), len(right))
    sure = 1 / (1 + np.exp(-np.abs(apart)))  # of whichever it finds better
    bins = np.minimum((sure - 0.5) * 2 * _CALIBRATION_BINS, _CALIBRATION_BINS - 1).astype(int)
    off = sum(abs(float((right - sure)[bins == one].sum())) for one in range(_CALIBRATION_BINS)) / len(right)
    return {
        "validation_accuracy": float(right.mean()),
        "validation_accuracy_low": low,
        "validation_accuracy_high": high,
        "validation_calibration_error": off,
        "validation_brier": float(((1 / (1 + np.exp(-apart)) - 1) ** 2).mean()),
        "validation_margin": float(apart.mean()),
    }


def labels_for(tokenizer: Tokenizer, asked: tuple[str, str] | None) -> tuple[str, str]:
    """The two words: those that are asked for, or the first of LABELS that are a token each."""
    whole = (pair for pair in LABELS if all(len(tokenizer.encode_piece(one, first=False)) == 1 for one in pair))
    return asked or next(whole, LABELS[-1])


def label_ids(tokenizer: Tokenizer, labels: tuple[str, str], key: str = "method.labels") -> tuple[int, int]:
    """The tokens of the two words, which are at `key` of a recipe.

    Raises:
        ConfigError: a word is more than one token, or both are the same.
    """
    found = []
    for label in labels:
        ids = tokenizer.encode_piece(label, first=False)
        if len(ids) != 1:
            pieces = " + ".join(repr(tokenizer.decode([one])) for one in ids)
            raise ConfigError(
                f"{key}: {label!r} is {len(ids)} tokens of this tokenizer ({pieces}): choose a word that is "
                "one, such as a letter"
            )
        found.append(ids[0])
    if found[0] == found[1]:
        raise ConfigError(f"{key}: {labels[0]!r} and {labels[1]!r} are the same token: choose two words")
    return found[0], found[1]


def build(config: RewardConfig, setting: Setting) -> Method[PackedBatch]:
    """The method, on the pairs of `setting`.

    Raises:
        ConfigError, DataError: there is no model to begin with, a label is no token, or the records are no pairs.
    """

    def ids(tokenizer: Tokenizer) -> tuple[int, int]:
        return label_ids(tokenizer, labels_for(tokenizer, config.labels))

    data = Conversations.read(setting, config, "pair", ending=lambda tokenizer: ids(tokenizer)[0])
    judge = Judge(config, ids(data.tokenizer))
    objective = ByCoefficients(judge)
    good, bad = labels_for(data.tokenizer, config.labels)
    note = f"a reward is the logit of {good!r} minus that of {bad!r} behind an answer"
    measure = HeldOutRewards(data, objective, judge, GeneralText.of(config.general, setting))
    return method_on(config, setting, data, objective, measure, (note,))


@torch.no_grad()
def rewards(
    model: str | os.PathLike[str] | LanguageModel,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    labels: tuple[str, str] | None = None,
) -> list[float]:
    """What a reward model thinks of each conversation, which ends with an answer: a number, higher is better.

    Of a model that was trained pointwise it is the logarithm of the odds that the answer is good.

    Args:
        model: a run, a checkpoint, an imported or Hugging Face folder, a GGUF file, or what was opened of one.
        conversations: each a list of messages, {"role": ..., "content": ...}.
        labels: the words for good and bad, where the run was told others than it finds by itself.

    Raises:
        CheckpointError: nothing that can be opened.
        ConfigError: the model has no chat template, or a label is no token of its tokenizer.
        DataError: a message that its template cannot render.
    """
    opened = model if isinstance(model, LanguageModel) else open_language_model(model)
    if opened.template is None:
        raise ConfigError(f"{opened.source}: has no chat template, so conversations cannot be read as it learnt them")
    ids = label_ids(opened.tokenizer, labels_for(opened.tokenizer, labels))
    found = []
    for messages in conversations:
        turns = encode_turns(opened.template, opened.tokenizer, messages)
        hidden = opened.model(torch.tensor([turns.ids], device=opened.device)).hidden[0, -1].float()
        logits = opened.model.head_rows(ids).float() @ hidden
        value = float(logits[0] - logits[1])
        assert math.isfinite(value)
        found.append(value)
    return found
