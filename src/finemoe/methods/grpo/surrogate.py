"""What a policy gradient makes of log-probabilities: a coefficient for each token. Pure functions of flat tensors.

The gradient of the loss is  sum of c · d(-log p), with the coefficient c of every token (DeepSeekMath, 2402.03300,
section 5.2.1). Where ratios are those of tokens, c is advantage times ratio where it is not clipped, and 0 where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finemoe.methods.grpo.config import GRPOConfig
from finemoe.training.losses.coefficients import Worth

KL, CLIPPED, OFF_POLICY = "kl", "clip_share", "off_policy_kl"


def figures_of(config: GRPOConfig) -> tuple[str, ...]:
    """Names of means over tokens: the divergence from the reference, where there is one; tokens whose ratio is clipped;
    tokens of answers that are left out as too far off policy; and how far the policy of now is from who wrote the
    answers (k3).
    """
    return (*((KL,) if config.beta else ()), CLIPPED, "masked_share", OFF_POLICY)


@dataclass(frozen=True)
class Tokens:
    """The tokens that are learnt, in a row, with all that is known of them; `[tokens]` each, float32 nats."""

    advantages: Tensor
    behaviour: Tensor
    """Log-probabilities as they were drawn."""
    old: Tensor
    """Log-probabilities before the first step on the rollout."""
    reference: Tensor | None
    """Log-probabilities under the reference; None: there is none."""
    answers: Tensor
    """int64: the answer of each."""
    count: int
    """Answers."""

    def sums(self, values: Tensor) -> Tensor:
        """[answers]."""
        return values.new_zeros(self.count).index_add(0, self.answers, values)

    @property
    def lengths(self) -> Tensor:
        """[answers] float32 tokens; 1 where there is none."""
        return self.sums(torch.ones_like(self.advantages)).clamp(min=1)


def surrogate(config: GRPOConfig, logprobs: Tensor, tokens: Tokens) -> Worth:
    """Coefficients, the loss as a sum, and figures as sums, of `logprobs [tokens]` under the weights of now.

    The sum is divided by answers, or by tokens where `config.normalize` is "token".
    """
    share = _share(config, tokens)
    by_token = config.ratio == "token"
    ratio, slope = _ratio(config, logprobs, tokens)
    weights = _weights(config, logprobs, tokens)
    high, low = 1 + config.high, 1 - config.clip
    advantages = tokens.advantages
    if config.cispo is not None:
        cut = ratio.clamp(max=config.cispo)
        clipped = ratio > config.cispo
        gain, policy = cut * advantages * logprobs, cut * advantages
    else:
        clipped = torch.where(advantages > 0, ratio > high, (ratio < low) & (advantages < 0))
        gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        policy = torch.where(clipped, 0.0, ratio * advantages)
    each = share if by_token else 1 / tokens.lengths[tokens.answers]  # a sequence's gain is written on all its tokens
    loss = -(weights * gain * each).sum()
    coefficients = weights * policy * slope * (share if by_token else 1.0)
    divergence, pull = _divergence(config, logprobs, ratio, tokens)
    loss = loss + config.beta * (divergence * each).sum()
    coefficients = coefficients + config.beta * pull * each
    figures = {
        CLIPPED: clipped.float().sum(),
        "masked_share": (weights == 0).float().sum(),
        OFF_POLICY: _k3(logprobs - tokens.behaviour).sum(),
    }
    if config.beta:  # no reference: not one of these answers counts
        figures[KL] = logprobs.new_zeros(()) if tokens.reference is None else _k3(tokens.reference - logprobs).sum()
    return Worth(coefficients, loss, figures)


def _share(config: GRPOConfig, tokens: Tokens) -> Tensor:
    """[tokens]: what a token's gain counts in the sum."""
    match config.normalize:
        case "sequence":
            return 1 / tokens.lengths[tokens.answers]
        case "token":
            return torch.ones_like(tokens.advantages)
        case "constant":
            return torch.full_like(tokens.advantages, 1 / config.answer_tokens)


def _ratio(config: GRPOConfig, logprobs: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[tokens]: the ratio that each one's gain is made with, and its derivative by this log-probability, over it."""
    apart = logprobs - tokens.old
    if config.ratio == "token":
        return apart.exp(), torch.ones_like(apart)
    whole, slope = tokens.sums(apart), torch.ones_like(tokens.lengths)
    if config.ratio == "gspo":
        whole, slope = whole / tokens.lengths, 1 / tokens.lengths
    return whole.exp()[tokens.answers], slope[tokens.answers]


def _weights(config: GRPOConfig, logprobs: Tensor, tokens: Tokens) -> Tensor:
    """[tokens]: of importance against who wrote the answers, and 0 of answers that are too far off policy."""
    weights = torch.ones_like(logprobs)
    if config.importance_cap is not None:
        weights = (tokens.old - tokens.behaviour).exp().clamp(max=config.importance_cap)
        if config.ratio != "token":
            whole = tokens.sums(tokens.old - tokens.behaviour)
            whole = whole / tokens.lengths if config.ratio == "gspo" else whole
            weights = whole.exp().clamp(max=config.importance_cap)[tokens.answers]
    if config.off_policy_bound is not None:
        drift = tokens.sums(tokens.behaviour - logprobs) / tokens.lengths
        off = (drift > config.off_policy_bound)[tokens.answers] & (tokens.advantages < 0)
        weights = weights.masked_fill(off, 0.0)
    return weights


def _divergence(config: GRPOConfig, logprobs: Tensor, ratio: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[tokens]: the divergence from the reference, and minus its derivative by this log-probability.

    Of each token, whatever the ratio is of: of a whole answer, as R1 prints it, e^d overflows within some hundred.
    """
    if tokens.reference is None or not config.beta:
        return torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    further = tokens.reference - logprobs
    k3, pull = _k3(further), further.exp() - 1
    if config.unbiased_kl:
        return ratio * k3, ratio * (pull - k3)
    return k3, pull


def _k3(further: Tensor) -> Tensor:
    """Schulman's estimate of a divergence, never below 0: e^d - d - 1 (DeepSeekMath eq. 4)."""
    return further.exp() - further - 1
