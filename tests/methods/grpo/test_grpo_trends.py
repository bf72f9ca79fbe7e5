"""What is told of a run's whole way: falls, length that buys reward, and nothing learnt. Chance alone tells nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.watch import Watch
from finemoe.training.method import Note

JUDGE = {"kind": "function", "path": "judge.py:score"}
"""It may like what it likes."""
RIGHT, WATCHED = {"kind": "answer"}, {"kind": "answer", "weight": 0}
FORM = {"kind": "format", "weight": 0.2}
BRIEF = {"kind": "length", "longest": 30, "cushion": 10, "weight": 0.2}
"""It costs, and earns nothing."""
GROUPS, SIZE = 8, 16
"""Of a rollout of 128 answers."""


def config(*rewards: dict[str, Any], **keys: Any) -> GRPOConfig:
    return GRPOConfig.model_validate({"rewards": list(rewards), **keys})


def told(config: GRPOConfig, rollouts: Iterable[dict[str, float]], word: str) -> list[tuple[int, str]]:
    """The number of the rollout, from 1, and the sentence, of those with `word`; the run goes on anew in between."""
    watch, found = Watch(config), []
    for number, figures in enumerate(rollouts, 1):
        sound = {"reward": 0.5, "length": 9.0, "dead_groups": 0.2, "cut_share": 0.0, "failed_share": 0.0}
        found += [(number, said) for said in watch.after({**sound, **figures}) if word in said]
        if number % 7 == 0:
            kept = json.loads(json.dumps(watch.values()))
            watch = Watch(config)
            watch.put(kept)
    return found


def drawn(seed: int, way: Iterable[float], alike: float | None = None) -> list[float]:
    """Shares of right answers in rollouts, whose true shares are `way`; questions differ by Beta(a + b = alike)."""
    draws, shares = np.random.default_rng(seed), np.repeat(np.array([*way])[:, None], GROUPS, 1)
    if alike is not None:
        shares = draws.beta(shares * alike, (1 - shares) * alike)
    return [float(one) for one in draws.binomial(SIZE, shares).mean(1) / SIZE]


# ---- falls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "alike"), [(0.01, None), (0.02, None), (0.05, None), (0.1, None), (0.2, 2), (0.3, 2), (0.5, 2)]
)
def test_a_share_that_stays_does_not_fall(share: float, alike: float | None) -> None:
    """Every run of a low share was told so, and many of others: the best of all windows is a lucky one."""
    runs = [[{"reward_answer": one} for one in drawn(seed, [share] * 100, alike)] for seed in range(30)]
    assert sum(bool(told(config(WATCHED, JUDGE), one, "fell from")) for one in runs) <= 1


@pytest.mark.parametrize("alike", [None, 2])
def test_a_share_that_falls_is_told(alike: float | None) -> None:
    """As it was with a judge that liked steps: 0.37, then 0.84, then 0.19, while the reward stood still."""
    way = np.interp(np.arange(60), [0, 12, 40, 60], [0.37, 0.84, 0.19, 0.19])
    for seed in range(20):
        rollouts = [{"reward_answer": one} for one in drawn(seed, way, alike)]
        ((_, said),) = told(config(WATCHED, JUDGE), rollouts, "fell from")
        assert said.startswith("answer, which is only watched, fell from 0.")
    assert not told(config(WATCHED, JUDGE, order="given"), rollouts, "fell from"), "prompts get harder there"


def test_a_run_that_began_with_narrower_windows_goes_on_with_what_they_held() -> None:
    """Of five rollouts; the best of a watched reward stood among the first."""
    watch = Watch(config(WATCHED, JUDGE))
    first = {"reward": [0.3] * 5, "length": [9.0] * 5, "watched answer": [0.84]}
    watch.put({"streaks": {}, "first": first, "last": {**first, "watched answer": [0.8] * 5}})
    kept = watch.values()
    assert kept["first"] == {"reward": [0.3] * 10, "length": [9.0] * 10}
    assert kept["last"]["reward_answer"] == [0.8] * 10
    assert kept["best"] == {"reward_answer": [0.84] * 10}


# ---- length and reward ---------------------------------------------------------------------------------------------


def ways(seed: int, right: Sequence[float], related: float = 0.7, longer: float = 1.3) -> list[dict[str, float]]:
    """A run whose reward rises from 0.3 to 0.9, and whose answers grow `longer`."""
    draws, count = np.random.default_rng(seed), len(right)
    return [
        {"reward": reward, "length": length, "reward_answer": share, "length_correlation": related + noise}
        for reward, length, share, noise in zip(
            np.linspace(0.3, 0.9, count) + draws.normal(0, 0.03, count),
            np.linspace(40, 40 * longer, count) + draws.normal(0, 1, count),
            drawn(seed, right, 2),
            draws.normal(0, 0.1, count),
            strict=True,
        )
    ]


def bought(config: GRPOConfig, rollouts: list[dict[str, float]]) -> list[tuple[int, str]]:
    return told(config, rollouts, "answers grow longer")


def test_reward_that_is_bought_by_length_is_told() -> None:
    """It was said only where the reward did not rise."""
    for rewards in ([JUDGE, WATCHED], [JUDGE, RIGHT]):
        found = [bought(config(*rewards), ways(seed, [0.4] * 100)) for seed in range(20)]
        assert sum(map(bool, found)) >= 16, "now and then a share seems to rise by chance"
    number, said = next(one[0] for one in found if one)
    assert number >= 40, "for long, and no sooner"
    assert "reward is bought by length" in said
    assert "(length_correlation 0." in said
    assert "no more of them are right (answer 0." in said
    assert not isinstance(said, Note)


def test_length_that_makes_right_is_not_bought() -> None:
    """R1-Zero's answers grow with what is right, and so do those that are taught a form first."""
    for seed in range(10):
        grown = ways(seed, [*np.linspace(0.3, 0.9, 100)], longer=4.0)
        assert not bought(config(JUDGE, WATCHED), grown)
        mixed = [{**one, "reward": one["reward_answer"] + 0.2} for one in grown]
        assert not bought(config(RIGHT, FORM), mixed)
        assert not bought(config(RIGHT), mixed)
        form_first = ways(seed, [0.4] * 30) + [{**one, "length_correlation": 0.1} for one in ways(seed, [0.4] * 70)]
        assert not bought(config(RIGHT, FORM), form_first)
        assert not bought(config(RIGHT), ways(seed, [0.4] * 100)), "all that is rewarded is right"
        assert not bought(config(JUDGE, WATCHED), ways(seed, [0.4] * 100, related=0.2))
        assert not bought(config(JUDGE, WATCHED), ways(seed, [0.4] * 100, longer=0.7))
        assert not bought(config(JUDGE, WATCHED), ways(seed, [0.97] * 100)), "nothing is left to rise"


def test_where_nothing_says_what_is_right_that_is_a_note() -> None:
    unwatched = [{name: one[name] for name in one if name != "reward_answer"} for one in ways(0, [0.4] * 100)]
    ((_, said),) = bought(config(JUDGE), unwatched)
    assert isinstance(said, Note)
    assert "nothing says whether they are right" in said


# ---- nothing learnt ------------------------------------------------------------------------------------------------


def unlearnt(config: GRPOConfig, rewards: Iterable[float], **figures: float) -> list[tuple[int, str]]:
    return told(config, ({"reward": one, **figures} for one in rewards), "nothing has been learnt")


def test_a_run_that_stays_at_chance_says_so_once() -> None:
    runs = [unlearnt(config(RIGHT), drawn(seed, [0.2] * 200)) for seed in range(40)]
    assert sum(map(len, runs)) >= 36, "now and then chance looks like a rise"
    assert {number for found in runs for number, _ in found} == {50}
    ((_, said),) = runs[0]
    assert isinstance(said, Note)
    assert said.startswith(
        "nothing has been learnt so far: in 50 rollouts the reward has not risen by more than chance"
    )
    assert "raise optimizer.learning_rate" in said
    dead = [unlearnt(config(RIGHT), drawn(0, [0.2] * 200), dead_groups=0.95)]
    assert dead == [[]], "of which another sentence is"


@pytest.mark.parametrize(
    "way",
    [np.linspace(0.2, 0.6, 200), np.interp(np.arange(200), [0, 5], [0.1, 0.6]), [0.95] * 200, [0.2] * 49],
    ids=["slowly", "at once", "there is no more", "a short run"],
)
def test_who_learns_or_has_learnt_is_not_told_otherwise(way: Sequence[float]) -> None:
    for rewards in ([RIGHT], [RIGHT, BRIEF]):
        assert sum(map(len, (unlearnt(config(*rewards), drawn(seed, way)) for seed in range(20)))) <= 1


def test_prompts_that_get_harder_say_nothing_of_what_was_learnt() -> None:
    assert unlearnt(config(RIGHT, order="given"), drawn(0, [0.2] * 200)) == []


def test_a_reward_of_any_size_may_be_far_from_its_largest() -> None:
    """What a function gives ends nowhere."""
    ((_, said),) = unlearnt(config(JUDGE), [5.0, 5.1] * 50)
    assert "5.05 at first, 5.05 now" in said
