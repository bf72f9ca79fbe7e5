"""What an answer is worth, by rules, tests, functions of one's own and reward models: a line in REWARDS each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from finemoe.core.config import Config, union_of
from finemoe.judging import KINDS
from finemoe.judging.comparing import AnswerReward, ExpressionReward, LatexReward, NumberReward
from finemoe.judging.custom import FunctionReward, GymReward
from finemoe.judging.programs import ProgramReward
from finemoe.judging.shape import FormatReward, LanguageReward, LengthReward
from finemoe.judging.steps import StepsReward
from finemoe.judging.verdicts import Answer, Judged, Verdict
from finemoe.methods.rewards.reward_model import RewardModelReward
from finemoe.methods.rewards.scoring import Rewards, Scored, require_made

__all__ = [
    "REWARDS",
    "Answer",
    "AnswerReward",
    "ExpressionReward",
    "FormatReward",
    "FunctionReward",
    "GymReward",
    "Judged",
    "LanguageReward",
    "LatexReward",
    "LengthReward",
    "NumberReward",
    "ProgramReward",
    "RewardModelReward",
    "Rewards",
    "RewardsConfig",
    "RewardsTables",
    "Scored",
    "StepsReward",
    "Verdict",
    "require_made",
]

REWARDS: dict[str, type[Config]] = {
    **{kind: one.config for kind, one in KINDS.items()},
    "reward_model": RewardModelReward,
}
"""Kind -> its configuration. Those of `judging.KINDS` look at one answer at a time, in a process that may fail."""
RewardsConfig: Any = union_of(REWARDS.values())


def _some_weight(rewards: Sequence[Any]) -> Sequence[Any]:
    if not any(one.weight for one in rewards):
        raise ValueError("every weight is 0, nothing would be learnt: a reward without a weight is only watched")
    return rewards


RewardsTables: Any = Annotated[tuple[RewardsConfig, ...], Field(min_length=1), AfterValidator(_some_weight)]
"""All rewards of a run, of which one at least counts."""
