"""The policy gradient's coefficients against autograd on the formulas as papers print them, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.surrogate import Tokens, surrogate

LENGTHS = (3, 1, 5, 2)


def case(seed: int = 0, drift: float = 0.4, supervision: str = "outcome") -> tuple[Tensor, Tokens]:
    """Log-probabilities of now, and tokens of four answers, so far apart that some ratios are clipped.

    Of "process" every token has an advantage of its own, of either sign in one answer.
    """
    draw = torch.Generator().manual_seed(seed)

    def numbers(scale: float) -> Tensor:
        return scale * torch.randn(sum(LENGTHS), generator=draw, dtype=torch.float64)

    answers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old = numbers(1.0) - 2
    advantages = torch.tensor([1.3, -0.7, -1.1, 0.5], dtype=torch.float64)[answers]
    tokens = Tokens(
        advantages=advantages,
        behaviour=old + numbers(0.2),
        old=old,
        reference=old + numbers(0.3),
        answers=answers,
        count=len(LENGTHS),
    )
    logprobs = old + numbers(drift)
    return logprobs, replace(tokens, advantages=numbers(1.0)) if supervision == "process" else tokens


def split(values: Tensor) -> list[Tensor]:
    return list(values.split(LENGTHS))


def printed(config: GRPOConfig, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """The loss, answer by answer and token by token, as the papers have it; for autograd."""
    columns = zip(
        *map(split, (logprobs, tokens.old, tokens.behaviour, tokens.reference, tokens.advantages)), strict=True
    )
    total = torch.zeros((), dtype=torch.float64)
    for new, old, behaviour, reference, advantages in columns:
        length = len(new)
        if config.ratio == "token":
            ratios = [(new[t] - old[t]).exp() for t in range(length)]
            weights = [(old[t] - behaviour[t]).exp() for t in range(length)]
        else:
            power = 1 / length if config.ratio == "gspo" else 1.0
            ratios = [(power * (new - old).sum()).exp()]
            weights = [(power * (old - behaviour).sum()).exp()]
        share = {"sequence": 1 / len(ratios), "token": 1.0, "constant": 1 / config.answer_tokens}[config.normalize]
        off = config.off_policy_bound is not None and float((behaviour - new).detach().mean()) > config.off_policy_bound
        for place, ratio in enumerate(ratios):
            advantage = advantages[place]
            if config.cispo is not None:
                gain = ratio.detach().clamp(max=config.cispo) * advantage * new[place]
            else:
                low, high = 1 - config.clip, 1 + config.high
                gain = torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
            if config.importance_cap is not None:
                gain = gain * weights[place].clamp(max=config.importance_cap).detach()
            if off and advantage < 0:
                gain = gain * 0
            total = total - share * gain
        each = share if config.ratio == "token" else 1 / length
        for place in range(length):
            further = reference[place] - new[place]
            k3 = further.exp() - further - 1
            if config.unbiased_kl:
                k3 = ratios[place] * k3
            total = total + each * config.beta * k3
    return total


SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.0},
    {"normalize": "token"},
    {"normalize": "constant", "answer_tokens": 7, "scale": "none"},
    {"clip": 0.1, "clip_high": 0.28},
    {"clip": 10.0},
    {"cispo": 1.2},
    {"ratio": "sequence"},
    {"ratio": "gspo", "clip": 0.03, "clip_high": 0.04},
    {"unbiased_kl": True},
    {"ratio": "gspo", "beta": 0.5},
    {"importance_cap": 1.1},
    {"ratio": "gspo", "importance_cap": 1.05},
    {"off_policy_bound": 0.01},
    {"normalize": "token", "importance_cap": 1.1, "off_policy_bound": 0.05, "clip_high": 0.3, "unbiased_kl": True},
    {"ratio": "sequence", "importance_cap": 1.1},
    {"ratio": "sequence", "off_policy_bound": 0.01},
    {"ratio": "sequence", "importance_cap": 1.1, "off_policy_bound": 0.01},
    {"ratio": "gspo", "off_policy_bound": 0.01},
    {"cispo": 1.2, "importance_cap": 1.1},
    {"cispo": 1.2, "off_policy_bound": 0.01},
    {"cispo": 1.2, "normalize": "token", "importance_cap": 1.1, "off_policy_bound": 0.01},
    {"supervision": "process"},
    {"supervision": "process", "normalize": "token", "clip_high": 0.28},
    {"supervision": "process", "importance_cap": 1.1, "off_policy_bound": 0.01},
    {"supervision": "process", "cispo": 1.2, "off_policy_bound": 0.01, "unbiased_kl": True},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=[str(one) for one in SETTINGS])
@pytest.mark.parametrize("seed", range(3))
def test_coefficients_and_loss_are_those_of_autograd(setting: dict[str, Any], seed: int) -> None:
    config = GRPOConfig(**{"inner_epochs": 2, **setting})
    logprobs, tokens = case(seed, supervision=config.supervision)
    logprobs.requires_grad_()
    loss = printed(config, logprobs, tokens)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    worth = surrogate(config, logprobs.detach(), tokens)
    assert worth.loss is not None
    torch.testing.assert_close(worth.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(worth.coefficients, -gradient, rtol=1e-12, atol=1e-12)


def test_the_settings_of_these_tests_meet_what_they_are_about() -> None:
    """Some ratios are clipped, some weights capped, some answers masked: else the comparison above says nothing."""
    logprobs, tokens = case()
    figures = surrogate(GRPOConfig(inner_epochs=2), logprobs, tokens).figures
    assert 0 < figures["clip_share"] < sum(LENGTHS)
    masked = surrogate(GRPOConfig(inner_epochs=2, off_policy_bound=0.01), logprobs, tokens).figures["masked_share"]
    assert 0 < masked < sum(LENGTHS)
    assert (tokens.old - tokens.behaviour).exp().max() > 1.1
    whole = tokens.sums(tokens.old - tokens.behaviour).exp()
    assert whole.max() > 1.1 > whole.min(), "of whole answers too"
    drift = tokens.sums(tokens.behaviour - logprobs) / tokens.lengths
    steps = split(case(supervision="process")[1].advantages)
    mixed = [one.min() < 0 < one.max() for one in steps]
    assert any(far > 0.01 and both for far, both in zip(drift, mixed, strict=True)), "part of an answer is masked"


def test_at_the_first_step_the_ratio_is_exactly_one() -> None:
    """DeepSeekMath's coefficient there: the advantage, and beta (reference / policy - 1)."""
    logprobs, tokens = case()
    tokens = Tokens(tokens.advantages, tokens.behaviour, logprobs, tokens.reference, tokens.answers, tokens.count)
    assert tokens.reference is not None
    share = 1 / tokens.lengths[tokens.answers]
    alone = surrogate(GRPOConfig(beta=0.0), logprobs, tokens)
    assert torch.equal(alone.coefficients, tokens.advantages * share), "the ratio is 1 to the last bit"
    held = surrogate(GRPOConfig(beta=0.04), logprobs, tokens)
    pull = 0.04 * ((tokens.reference - logprobs).exp() - 1)
    torch.testing.assert_close(held.coefficients, (tokens.advantages + pull) * share, rtol=1e-13, atol=1e-15)
    assert held.figures["clip_share"] == 0


def test_without_a_reference_there_is_no_divergence() -> None:
    logprobs, tokens = case()
    alone = Tokens(tokens.advantages, tokens.behaviour, tokens.old, None, tokens.answers, tokens.count)
    found = surrogate(GRPOConfig(beta=0.0), logprobs, alone)
    assert "kl" not in found.figures, "and 0 would say that the model had not moved"
    assert torch.equal(found.coefficients, surrogate(GRPOConfig(beta=0.0), logprobs, tokens).coefficients)


def test_distance_to_who_wrote_is_that_of_the_policy_of_now() -> None:
    """k3 by hand, of two tokens that became twice and half as probable since they were drawn: r - 1 - log r."""
    behaviour = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    logprobs = behaviour + torch.tensor([2.0, 0.5], dtype=torch.float64).log()
    same = torch.zeros(2, dtype=torch.int64)
    tokens = Tokens(torch.ones_like(behaviour), behaviour, behaviour, None, same, 1)
    later = surrogate(GRPOConfig(inner_epochs=2, beta=0.0), logprobs, tokens).figures["off_policy_kl"]
    assert later.item() == pytest.approx((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)), rel=1e-12)
    first = surrogate(GRPOConfig(inner_epochs=2, beta=0.0), behaviour, tokens).figures["off_policy_kl"]
    assert first == 0
    one_way = surrogate(GRPOConfig(beta=0.0), behaviour + 1.0, tokens).figures["off_policy_kl"]
    assert one_way.item() == pytest.approx(2 * (math.e - 2)), "and not the other way round, which were 2 / e"


def test_constant_rewards_have_no_gradient_at_all() -> None:
    """Complaint 14 of post-training: the coefficient is 0 and not small."""
    logprobs, tokens = case()
    still = Tokens(
        torch.zeros_like(logprobs), tokens.behaviour, tokens.old, tokens.reference, tokens.answers, tokens.count
    )
    for ratio, normalize in itertools.product(("token", "sequence", "gspo"), ("sequence", "token")):
        if ratio == "token" or normalize == "sequence":
            config = GRPOConfig(ratio=ratio, normalize=normalize, beta=0.0)  # type: ignore[arg-type]
            assert not surrogate(config, logprobs, still).coefficients.any()


def test_a_divergence_that_is_further_pulls_harder() -> None:
    logprobs, tokens = case(drift=0.0)
    pulls = []
    for further in (0.1, 0.5):
        one = Tokens(
            torch.zeros_like(logprobs), tokens.behaviour, tokens.old, logprobs - further, tokens.answers, tokens.count
        )
        pulls.append(surrogate(GRPOConfig(beta=1.0), logprobs, one).coefficients)
    assert (pulls[0] < 0).all(), "the reference finds the tokens less probable: they are to become so"
    assert (pulls[1] < pulls[0]).all()
