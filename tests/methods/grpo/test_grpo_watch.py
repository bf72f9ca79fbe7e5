"""What a run says when it learns nothing, or something else than it should: after a while, once, with the knob."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.watch import FirstFailures, Watch
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
    """All that is said of five sound rollouts and then of `after` with these figures."""
    watch = Watch(GRPOConfig())
    found = [one for _ in range(5) for one in watch.after(SOUND)]
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


def test_what_is_only_watched_may_not_fall_unseen() -> None:
    """A judge that likes something else than right answers goes on to be pleased."""
    rewards = [{"kind": "answer", "weight": 0}, {"kind": "length", "longest": 9, "cushion": 3}]
    watch = Watch(GRPOConfig.model_validate({"rewards": rewards}))
    found: list[str] = []
    for right in (0.4, 0.6, *[0.8] * 10, 0.7, 0.5, *[0.2] * 12):
        found += watch.after({**SOUND, "reward_answer": right, "reward_length": 1.0})
        kept = json.loads(json.dumps(watch.values()))
        watch = Watch(watch.config)  # and who goes on says as much
        watch.put(kept)
    (one,) = found
    assert one.startswith("answer, which is only watched, fell from 0.80 to 0.")
    assert 'method.scale = "none"' in one
    watch = Watch(GRPOConfig.model_validate({"rewards": rewards}))
    risen = [0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert [one for right in risen for one in watch.after({**SOUND, "reward_answer": right})] == []


def test_sound_runs_are_left_alone() -> None:
    assert said(30) == []
    assert said(30, length=30.0, reward=0.8) == [], "longer and better is what was hoped for"


def test_what_comes_back_is_told_again() -> None:
    watch = Watch(GRPOConfig())
    found = [watch.after({**SOUND, "cut_share": 0.9 if number % 10 < 6 else 0.0}) for number in range(20)]
    assert [bool(one) for one in found].count(True) == 2


@pytest.mark.parametrize(
    ("note", "of_bounds"),
    [
        ("no verdict within 10 seconds", True),
        ("ran out of memory", True),
        ("its process ended", True),
        ("more than 64 processes started", True),
        ("KeyError: 'answr' (own.py, line 2); the record has prompt, answer", False),
        ("KeyError: 'answr' (own.py, line 2); the record has memory, process, seconds", False),
        ("its process wrote something else than a verdict", False),
        ("own.py:score: it returned str, and not a number, True, False, None or a dict", False),
    ],
)
def test_time_and_memory_are_named_where_more_of_them_may_help(
    note: str, of_bounds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    FirstFailures(GRPOConfig())("answer", note)
    (later,) = Watch(GRPOConfig()).failures(0.5, note)
    (first,) = caplog.messages
    for said in (first, later):
        assert note in said
        assert ("method.reward_seconds" in said) == ("method.reward_memory" in said) == of_bounds


def test_failures_of_rewards_are_told_at_once_and_then_now_and_then() -> None:
    watch = Watch(GRPOConfig())
    assert watch.failures(0.0, "") == []
    (first,) = watch.failures(0.02, "tests: no verdict within 10 seconds")
    assert "2.0% of the answers" in first
    assert "the last as tests: no verdict within 10 seconds" in first
    assert "raise method.reward_seconds from 10, or, for want of memory, method.reward_memory" in first
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
    found = [one for _ in range(8) for one in watch.step({"expert_mismatch": 0.3, "off_policy_kl": 0.05}, 0)]
    assert len(found) == 2
    assert 'method.replay = "rollout"' in found[0]
    assert "30%" in found[0]
    assert "method.importance_cap" in found[1]
    calm = Watch(GRPOConfig())
    assert not any(calm.step({"off_policy_kl": 1e-6}, 0) for _ in range(8)), "a dense model has no experts"
    assert not any(calm.step({}, 0) for _ in range(8)), "nor has a step that was passed over any terms"


FAR = {"expert_mismatch": 0.48, "off_policy_kl": 0.3, "clip_share": 0.94}
NEAR = dict.fromkeys(FAR, 0.0)


def of_rollouts(watch: Watch, rollouts: int, worst: int = 3) -> list[str]:
    """What is said of rollouts of four steps, of which `worst` alone is far from who wrote the answers."""
    return [
        one
        for _ in range(rollouts)
        for within in range(4)
        for one in watch.step(FAR if within == worst else NEAR, within)
    ]


@pytest.mark.parametrize("worst", [1, 3])
def test_several_steps_on_a_rollout_count_as_their_worst(worst: int) -> None:
    """The first of them is of the policy that wrote, and would end any row of steps."""
    watch = Watch(GRPOConfig(steps_per_rollout=4))
    assert of_rollouts(watch, 4, worst) == []
    experts, apart, clipped = of_rollouts(watch, 1, worst)
    assert of_rollouts(watch, 20, worst) == [], "each is said once"
    assert "48% of the experts" in experts
    assert "0.3 nats" in apart
    assert "importance_cap" not in apart, "which corrects what was so before the first step"
    assert "94% of the tokens are clipped" in clipped
    assert all("take fewer steps on a rollout" in one for one in (experts, apart, clipped))
    assert of_rollouts(Watch(GRPOConfig(steps_per_rollout=4, replay="rollout")), 9)[0] == apart


def test_replay_of_the_update_does_not_hide_that_others_wrote() -> None:
    """The steps on a rollout agree with one another, and behaviour and policy chose different experts all the same."""
    watch = Watch(GRPOConfig(steps_per_rollout=4, replay="update"))
    experts, _, _ = of_rollouts(watch, 9)
    assert experts.startswith("48% of the experts are others than when the answers were written: method.replay = ")
    assert "agree with one another, and not with who wrote" in experts
    assert 'set method.replay = "rollout"' in experts


def test_who_wrote_is_another_from_the_first_step_on() -> None:
    watch = Watch(GRPOConfig(steps_per_rollout=4))
    (said,) = [
        one for _ in range(6) for within in range(4) for one in watch.step({**NEAR, "off_policy_kl": 0.05}, within)
    ]
    assert said.endswith("set method.importance_cap = 2")


def test_a_run_that_goes_on_within_a_rollout_says_what_the_unbroken_one_would() -> None:
    watch, other = Watch(GRPOConfig(steps_per_rollout=4)), Watch(GRPOConfig(steps_per_rollout=4))
    of_rollouts(watch, 4)
    assert watch.step(NEAR, 0) == watch.step(FAR, 1) == []
    other.put(json.loads(json.dumps(watch.values())))
    assert other.step(NEAR, 2) == []
    assert len(other.step(NEAR, 3)) == 3


def test_what_an_earlier_checkpoint_kept_of_the_first_rollout_is_read() -> None:
    watch = Watch(GRPOConfig())
    watch.put({"streaks": {"cut": 4}, "first": {"reward": 0.4, "length": 9.0}})
    (said,) = watch.after({**SOUND, "cut_share": 0.9})
    assert "are cut" in said
    longer = [one for _ in range(9) for one in watch.after({**SOUND, "length": 20.0})]
    assert ["times as long" in one for one in longer] == [True]


def noisy(number: int, length: float, reward: float) -> dict[str, float]:
    """A rollout whose reward is up to 0.1 more or less, as it comes."""
    return {**SOUND, "length": length, "reward": reward + 0.1 * (-1) ** number}


@pytest.mark.parametrize(
    ("first", "later", "told"),
    [(0.4, 0.4, True), (0.4, 0.43, True), (0.4, 0.7, False)],
    ids=["no better", "within the noise", "better"],
)
def test_longer_answers_are_compared_with_the_first_few(first: float, later: float, told: bool) -> None:
    """A first rollout that was poor by chance would make all later ones better; so would any rise within the noise."""
    watch = Watch(GRPOConfig())
    said = watch.after(noisy(1, 9.0, first - 0.2))
    for number in range(4):
        said += watch.after(noisy(number, 9.0, first))
    for number in range(30):
        said += watch.after(noisy(number, 20.0, later))
    assert [("times as long" in one) for one in said] == [True] * told
