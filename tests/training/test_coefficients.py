"""The one objective of post-training: its gradient is autograd's of the formula, for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.data.batch import PackedBatch
from finemoe.methods.dpo import DPOConfig, Preference
from finemoe.methods.reward import Judge, RewardConfig
from finemoe.methods.sft import Learn
from finemoe.model.transformer import Transformer
from finemoe.training.losses.coefficients import ByCoefficients, Rule
from oracles.models import VOCAB, build, moe_table, small_config
from oracles.packed import alone, packed

LENGTHS = (5, 9, 3, 12, 6, 4)
LABELS = (3, 7)


class Known:
    """A reference that says the same of every batch."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    def of(self, batch: PackedBatch) -> Tensor:
        return self.sums[batch.items].flatten()


KNOWN = Known(-torch.rand(3, 2, generator=torch.Generator().manual_seed(5)) * 20)


def model() -> Transformer:
    return build(small_config(feed_forward=moe_table()), experts="sorted_slices", products="torch").train()


def logprobs(model: Transformer, one: PackedBatch) -> Tensor:
    """[tokens] of a single document, all of them, differentiable."""
    logits = model.logits(model(one.rows.tokens, positions=one.rows.positions).hidden)
    return logits.log_softmax(-1).gather(-1, one.rows.targets[..., None])[0, :, 0]


def answers(model: Transformer, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """[pairs, 2] sums and lengths of the answers."""
    parts = alone(batch)
    sums = torch.stack([(logprobs(model, one) * one.rows.weights[0]).sum() for one in parts])
    return sums.view(-1, 2), torch.stack([one.rows.weights.sum() for one in parts]).view(-1, 2)


def sft(model: Transformer, batch: PackedBatch) -> Tensor:
    return torch.stack([-(logprobs(model, one) * one.rows.weights[0]).sum() for one in alone(batch)]).sum()


def dpo(model: Transformer, batch: PackedBatch) -> Tensor:
    sums, _ = answers(model, batch)
    ratio = sums - KNOWN.sums
    return -F.logsigmoid(0.3 * (ratio[:, 0] - ratio[:, 1])).sum()


def conservative(model: Transformer, batch: PackedBatch) -> Tensor:
    sums, _ = answers(model, batch)
    z = 0.3 * (sums - KNOWN.sums) @ torch.tensor([1.0, -1.0])
    return -(0.8 * F.logsigmoid(z) + 0.2 * F.logsigmoid(-z)).sum()


def ipo(model: Transformer, batch: PackedBatch) -> Tensor:
    sums, _ = answers(model, batch)
    ratio = sums - KNOWN.sums
    return ((ratio[:, 0] - ratio[:, 1]) - 1 / (2 * 0.3)).square().sum()


def hinge(model: Transformer, batch: PackedBatch) -> Tensor:
    sums, _ = answers(model, batch)
    ratio = sums - KNOWN.sums
    return (1 - 0.02 * (ratio[:, 0] - ratio[:, 1])).clamp(min=0).sum()


def simpo(model: Transformer, batch: PackedBatch) -> Tensor:
    sums, lengths = answers(model, batch)
    mean = sums / lengths
    return -F.logsigmoid(2.0 * (mean[:, 0] - mean[:, 1]) - 2.0 * 0.5).sum()


def rpo(model: Transformer, batch: PackedBatch) -> Tensor:
    sums, lengths = answers(model, batch)
    return dpo(model, batch) - 0.7 * (sums[:, 0] / lengths[:, 0]).sum()


def rewards(model: Transformer, batch: PackedBatch) -> Tensor:
    found = []
    for one in alone(batch):
        hidden = model(one.rows.tokens, positions=one.rows.positions).hidden[0, -1]
        logits = model.logits(hidden)
        found.append(logits[LABELS[0]] - logits[LABELS[1]])
    return torch.stack(found).view(-1, 2)


def pairwise(model: Transformer, batch: PackedBatch) -> Tensor:
    found = rewards(model, batch)
    return -(found[:, 0] - found[:, 1]).sigmoid().log().sum()


def pointwise(model: Transformer, batch: PackedBatch) -> Tensor:
    found = rewards(model, batch)
    labels = torch.tensor([1.0, 0.0]).expand_as(found)
    return F.binary_cross_entropy_with_logits(found, labels, reduction="sum")


def preference(**settings: Any) -> Preference:
    config = DPOConfig.model_validate({"beta": 0.3, **settings})
    return Preference(config, None if config.reference == "none" else KNOWN)  # type: ignore[arg-type]


RULES: dict[str, tuple[Rule, Callable[[Transformer, PackedBatch], Tensor], float]] = {
    "sft": (Learn(), sft, 0.5),
    "dpo": (preference(), dpo, 0.5),
    "conservative dpo": (preference(label_smoothing=0.2), conservative, 0.5),
    "ipo": (preference(loss="ipo"), ipo, 0.5),
    "hinge": (preference(loss="hinge", beta=0.02), hinge, 0.5),
    "simpo": (preference(reference="none", length="mean", beta=2.0, target_margin=0.5), simpo, 0.5),
    "rpo": (preference(nll=0.7), rpo, 0.5),
    "pairwise reward": (Judge(RewardConfig(), LABELS), pairwise, 0.0),
    "pointwise reward": (Judge(RewardConfig(loss="pointwise"), LABELS), pointwise, 0.0),
}


@pytest.mark.parametrize("name", RULES)
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    rule, formula, share = RULES[name]
    batch = packed(LENGTHS, VOCAB, share=share, pairs=True)
    ours, theirs = model(), model()
    loss = ByCoefficients(rule).terms(ours, batch).sums[rule.headline]
    expected = formula(theirs, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (key, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        scale = other.grad.abs().max()
        assert scale > 0, key
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, rtol=0, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", RULES)
def test_micro_batches_add_up(name: str) -> None:
    """1 x 3 pairs is 3 x 1: sums and counts alike, for every normalisation."""
    rule, _, share = RULES[name]
    batch = packed(LENGTHS, VOCAB, share=share, pairs=True)
    pieces = pairs_of(batch)
    objective, found = ByCoefficients(rule), model()
    whole = objective.terms(found, batch).sums
    parts = [objective.terms(found, one).sums for one in pieces]
    for term in (rule.headline, *rule.figures):
        torch.testing.assert_close(whole[term], torch.stack([one[term] for one in parts]).sum(), rtol=1e-5, atol=1e-6)
        counts = [objective.counts(one)[term] for one in pieces]
        assert objective.counts(batch)[term] == pytest.approx(sum(counts))
        assert term == rule.headline or objective.weights(0.5)[term] == 0


def pairs_of(batch: PackedBatch) -> list[PackedBatch]:
    """Every pair of `batch` as a batch of its own."""
    from finemoe.data.batch import TokenBatch

    found = []
    for pair in range(batch.num_documents // 2):
        here = batch.rows.documents[0] // 2 == pair
        columns = (batch.rows.tokens, batch.rows.targets, batch.rows.weights, batch.rows.positions)
        documents = batch.rows.documents[:, here] - 2 * pair
        rows = TokenBatch(*(one[:, here] for one in columns), documents)
        found.append(PackedBatch(rows, 1, 2, torch.tensor([pair])))
    return found


def test_figures_of_a_preference_say_what_they_are_called() -> None:
    batch, found = packed(LENGTHS, VOCAB, pairs=True), model()
    with torch.no_grad():
        sums, lengths = answers(found, batch)
        figures = ByCoefficients(RULES["dpo"][0]).terms(found, batch).sums
    apart = (sums - KNOWN.sums)[:, 0] - (sums - KNOWN.sums)[:, 1]
    expected = {
        "accuracy": (apart > 0).sum(),
        "margin": 0.3 * apart.sum(),
        "accuracy_per_token": (sums / lengths)[:, 0].gt((sums / lengths)[:, 1]).sum(),
        "longer_wins": lengths[:, 0].gt(lengths[:, 1]).sum() + 0.5 * lengths[:, 0].eq(lengths[:, 1]).sum(),
        "chosen_logprob": sums[:, 0].sum(),
        "rejected_logprob": sums[:, 1].sum(),
        "chosen_length": lengths[:, 0].sum(),
        "rejected_length": lengths[:, 1].sum(),
    }
    assert set(RULES["dpo"][0].figures) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(figures[name], value.float(), rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_of_the_size_of_tokens_times_vocabulary_is_kept() -> None:
    """The largest tensor that a step of DPO saves for its backward pass is one of the model's, not the logits."""
    batch, found = packed(LENGTHS * 8, VOCAB, pairs=True), model()
    batch = PackedBatch(batch.rows, batch.num_sequences, batch.num_documents, torch.arange(24) % 3)
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ByCoefficients(RULES["dpo"][0]).terms(found, batch)
    tokens = int(batch.rows.weights.sum())
    assert sizes
    assert not [size for size in sizes if len(size) >= 2 and size[-1] == VOCAB and size[-2] >= tokens]
