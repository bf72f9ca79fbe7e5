"""What a run says when it learns nothing, or something else than it should: after a while, once, with the knob."""

from __future__ import annotations

from typing import Any

import pytest

from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.watch import Watch
from finemoe.training.method import Note

SOUND = {
    "reward": 0.4,
    "length": 9.0,
    "dead_groups": 0.2,
    "cut_share": 0.0,
    "failed_share": 0.0,
    "unreadable_answer": 0.1,
}


def said(after: int, **figures: Any) -> list[str]:
    """All that is said of a sound rollout and then of `after` with these figures."""
    watch = Watch(GRPOConfig())
    found = watch.after(SOUND)
    for _ in range(after):
        found += watch.after({**SOUND, **figures})
    return found


TROUBLE: dict[str, tuple[dict[str, float], str]] = {
    "dead": ({"dead_groups": 0.95}, "method.dynamic_sampling"),
    "dead because cut": ({"dead_groups": 1.0, "cut_share": 0.9}, "raise method.answer_tokens"),
    "cut": ({"cut_share": 0.6}, "method.answer_tokens 128"),
    "unreadable": ({"unreadable_answer": 0.8}, "`method.template`"),
    "longer and no better": ({"length": 20.0, "reward": 0.4}, "2.2 times as long"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_told_once_after_five_rollouts(name: str) -> None:
    """Complaint 14 of post-training: dead groups and truncated answers, with the knob."""
    figures, knob = TROUBLE[name]
    assert said(4, **figures) == []
    found = said(30, **figures)
    assert len(found) == 1
    assert knob in found[0]


@pytest.mark.parametrize(
    ("right", "knob", "is_note"),
    [(0.98, "stop here, or ask harder ones", True), (0.01, "begin with easier prompts", False),
     (0.4, "make prompts easier or harder", False)],
)  # fmt: skip
def test_where_nothing_is_left_to_learn_that_is_no_trouble(right: float, knob: str, is_note: bool) -> None:
    """A run that has learnt its task ends with groups of right answers, and nobody is to mend that."""
    (found,) = said(30, dead_groups=0.95, reward=right, reward_answer=right)
    assert knob in found
    assert isinstance(found, Note) is is_note
    assert found.startswith("95% of the groups teach nothing, as ")


def test_what_a_users_function_gives_says_nothing_of_right_and_wrong() -> None:
    watch = Watch(GRPOConfig.model_validate({"rewards": [{"kind": "function", "path": "rules.py:score"}]}))
    found = [one for _ in range(8) for one in watch.after({**SOUND, "dead_groups": 1.0, "reward_function": 1.0})]
    assert ["make prompts easier or harder" in one for one in found] == [True]


def test_sound_runs_are_left_alone() -> None:
    assert said(30) == []
    assert said(30, length=30.0, reward=0.8) == [], "longer and better is what was hoped for"


def test_what_comes_back_is_told_again() -> None:
    watch = Watch(GRPOConfig())
    found = [watch.after({**SOUND, "cut_share": 0.9 if number % 10 < 6 else 0.0}) for number in range(20)]
    assert [bool(one) for one in found].count(True) == 2


def test_failures_of_rewards_are_told_at_once_and_then_now_and_then() -> None:
    watch = Watch(GRPOConfig())
    assert watch.failures(0.0, "") == []
    (first,) = watch.failures(0.02, "tests: no verdict within 10 seconds")
    assert "2.0% of the answers" in first
    assert "the last as tests: no verdict within 10 seconds" in first
    assert "method.reward_seconds" in first
    again = [bool(watch.failures(0.02, "x")) for _ in range(100)]
    assert [number for number, said in enumerate(again, 1) if said] == [50, 100]
    known = Watch(GRPOConfig())
    known.put(watch.values())
    assert known.failures(0.5, "x") == [], "a run that goes on says what the unbroken one would"


def test_a_rollout_without_a_reward_is_no_worse_one() -> None:
    watch = Watch(GRPOConfig())
    unjudged = {name: value for name, value in SOUND.items() if name != "reward"}
    assert [one for _ in range(8) for one in watch.after({**unjudged, "length": 90.0, "failed_share": 1.0})] == []


def test_a_policy_that_left_who_wrote_the_answers_is_told() -> None:
    """Complaints 11 and 12 of post-training: probabilities and experts that differ."""
    watch = Watch(GRPOConfig())
    found = [one for _ in range(8) for one in watch.off_policy(0.3, 0.05)]
    assert len(found) == 2
    assert 'method.replay = "rollout"' in found[0]
    assert "30%" in found[0]
    assert "method.importance_cap" in found[1]
    calm = Watch(GRPOConfig())
    assert not any(calm.off_policy(None, 1e-6) for _ in range(8)), "a dense model has no experts"
