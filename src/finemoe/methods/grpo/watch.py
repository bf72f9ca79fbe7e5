"""When a run learns nothing, or not what it should, in plain words, with the knob that helps."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, final

from finemoe.core.logs import logger
from finemoe.methods.grpo.config import COMPARING, GRPOConfig
from finemoe.methods.grpo.objective import MISMATCH
from finemoe.methods.grpo.rollout import LENGTH_CORRELATION
from finemoe.methods.grpo.surrogate import CLIPPED, OFF_POLICY
from finemoe.training.method import Note

_LONG = 5
"""[rollouts] In a row before anything is said; and over which lengths and rewards are averaged, as one is noise."""
_WINDOW = 10
"""[rollouts] Of a mean that others are compared with by its standard error, which fewer would tell badly."""
_AGAIN = 50
"""[rollouts] After which failures of rewards are told again, where there still are some."""
_DEAD, _CUT, _MISMATCH, _CLIPPED, _OFF_POLICY = 0.9, 0.5, 0.1, 0.5, 0.01
_FEW = 0.05
"""[share] Of right answers, or of wrong ones, that are none to speak of."""
_LONGER = 1.5
"""[factor] Length against that of the first rollouts, from where on a reward that did not rise is suspected."""
_RISE = 1e-6
"""[reward] What is less is rounding."""
_RISEN = 2
"""[standard errors] Of the difference of two means, from where on it is a rise."""
_FALLEN = 0.7
"""[share] Of the best that a watched reward came to, below which something else is learnt."""
_SURE = 7
"""[standard errors] Of a fall from the best: the best of many windows was a lucky one, and every rollout asks anew. Of
shares that never change, some 2 in 100 runs of 1000 rollouts are told to have fallen."""
_CLOSE = 0.5
"""[correlation] Of length and reward, above which length explains much of what an answer is worth."""
_PATIENCE = {"bought": 30}
"""[rollouts] In a row, where `_LONG` is too short: what is right may rise slowly, and behind a form that is rewarded
and longer, too."""
_ENOUGH = 50
"""[rollouts] With something to learn from, after which a reward that has not risen is told."""
_NEAR = 0.9
"""[share] Of the largest reward, and of right answers, from where on little is left to rise."""
_AT_FIRST = "at first"


_OF_BOUNDS = re.compile(
    r"no verdict within|ran out of memory|its process ended|more than \d+ processes started|the sandbox: |needed too "
    r"long"
)
"""What the reason of a failure says, in words of ours, that more time or memory may help against."""


def remedy(config: GRPOConfig, why: str) -> str:
    """What to do about a reward that could not judge, for the reason `why`."""
    if not _OF_BOUNDS.search(why):
        return "mend the reward"
    return (
        f"mend the reward, or raise method.reward_seconds from {config.reward_seconds:g}, or, for want of memory, "
        f"method.reward_memory from {config.reward_memory} (bytes)"
    )


@final
class FirstFailures:
    """Says at once that a reward failed, the first time that it does: what hangs costs its time with every answer."""

    def __init__(self, config: GRPOConfig) -> None:
        self._seconds, self._memory = config.reward_seconds, config.reward_memory
        self._weights = {one.name or one.kind: one.weight for one in config.rewards}
        self._told: set[str] = set()

    def __call__(self, name: str, note: str) -> None:
        """The reward `name` could not judge an answer, for the reason `note`."""
        if name in self._told:
            return
        self._told.add(name)
        becomes = "leaves its group, and is learnt as neither right nor wrong" if self._weights[name] else "stays"
        bounds = ""
        if _OF_BOUNDS.search(note):
            bounds = (
                f"Each may take {self._seconds:g} s (method.reward_seconds) and {self._memory} bytes "
                "(method.reward_memory). "
            )
        logger.warning(
            "reward %s could not judge an answer: %s. %sAn answer that is not judged %s", name, note, bounds, becomes
        )


@dataclass
class _Streak:
    """How long something has been so; it is said once, and again when it had ended and came back."""

    rollouts: int = 0

    def after(self, so: bool, long: int = _LONG) -> bool:
        """Whether it is to be said now."""
        self.rollouts = self.rollouts + 1 if so else 0
        return self.rollouts == long


@final
@dataclass
class Watch:
    """Looks at every rollout."""

    config: GRPOConfig
    _streaks: dict[str, _Streak] = field(default_factory=dict)
    _first: dict[str, list[float]] = field(default_factory=dict)
    """Of the first rollouts of the run."""
    _last: dict[str, list[float]] = field(default_factory=dict)
    """Of the newest."""
    _best: dict[str, list[float]] = field(default_factory=dict)
    """Of those in a row whose mean was the largest."""
    _worst: dict[str, float] = field(default_factory=dict)
    """Of the steps so far on the rollout of now."""

    def values(self) -> dict[str, dict[str, Any]]:
        """For a checkpoint: a run that goes on says what the unbroken one would."""
        return {
            "streaks": {name: one.rollouts for name, one in self._streaks.items()},
            "first": {name: list(found) for name, found in self._first.items()},
            "last": {name: list(found) for name, found in self._last.items()},
            "best": {name: list(found) for name, found in self._best.items()},
            "worst": dict(self._worst),
        }

    def put(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Be as `values` found it."""
        self._streaks = {name: _Streak(int(rollouts)) for name, rollouts in values["streaks"].items()}
        first, last, best = (
            {name: _listed(found) for name, found in values.get(key, {}).items()} for key in ("first", "last", "best")
        )
        if "best" not in values:  # windows were of five once, and what a reward was at best stood among the first
            watched = {name: name.replace("watched ", "reward_") for name in first if name.startswith("watched ")}
            best = {key: first.pop(name) * _WINDOW for name, key in watched.items()}
            last |= {key: last.pop(name, []) for name, key in watched.items()}
            first, last = ({name: found * 2 for name, found in of.items()} for of in (first, last))
        self._first, self._last, self._best = first, last, best
        self._worst = dict(values.get("worst", {}))

    def after(self, figures: Mapping[str, float]) -> list[str]:
        """What is to be said after a rollout with these figures."""
        self._remember(figures)
        longer = self._longer(figures)
        unreadable = max((value for name, value in figures.items() if name.startswith("unreadable_")), default=0.0)
        dead, cut = figures["dead_groups"], figures["cut_share"]
        said = {
            "dead": (dead > _DEAD, self._dead(figures)),
            "cut": (
                cut > _CUT and dead <= _DEAD,
                f"{cut:.0%} of the answers are cut at method.answer_tokens {self.config.answer_tokens}, before they "
                "end: raise it, or reward shorter ones (method.rewards of kind length)",
            ),
            "unreadable": (
                unreadable > _CUT,
                f"in {unreadable:.0%} of the answers a reward found nothing to judge: see `method.template`, or begin "
                "with a model that was shown the form (method sft)",
            ),
            "longer": (
                longer > _LONGER,
                f"answers are {longer:.1f} times as long as at first and no better "
                "rewarded: lengths are learnt and not the task; lower optimizer.learning_rate, or raise method.beta",
            ),
        }
        if self.config.order == "given":  # prompts may get harder: later answers cannot be held to earlier ones
            del said["longer"]
            return self._now(said)
        for one in self.config.rewards:
            if not one.weight and one.kind in COMPARING:
                name = one.name or one.kind
                said[f"fallen {name}"] = self._fallen(name)
        said["bought"] = self._bought()
        return self._now(said) + self._unlearnt(figures)

    @property
    def _right(self) -> list[str]:
        """Names of the rewards that say whether an answer is right, learnt or only watched."""
        return [one.name or one.kind for one in self.config.rewards if one.kind in COMPARING]

    def _remember(self, figures: Mapping[str, float]) -> None:
        """The first and the newest of what is compared; there is no reward where no answer could be judged."""
        for name in ("reward", "length", LENGTH_CORRELATION, *(f"reward_{one}" for one in self._right)):
            if name in figures:
                first, last = self._first.setdefault(name, []), self._last.setdefault(name, [])
                if len(first) < _WINDOW:
                    first.append(figures[name])
                last.append(figures[name])
                del last[:-_WINDOW]

    def _rose(self, name: str) -> bool:
        """Whether the newest are larger than the first by more than chance."""
        first = self._first.get(name, [])
        return len(first) == _WINDOW and _errors(first, self._last[name]) > _RISEN

    def _fallen(self, name: str) -> tuple[bool, str]:
        """Of a reward that says what is right and is only watched: whether it fell far below its best."""
        key = f"reward_{name}"
        last, best = self._last.get(key, []), self._best.setdefault(key, [])
        if len(last) < _WINDOW:
            return False, ""
        now = statistics.fmean(last)
        if not best or now > statistics.fmean(best):
            best[:] = last
        most = statistics.fmean(best)
        return now < _FALLEN * most and _errors(last, best) > _SURE, (
            f"{name}, which is only watched, fell from {most:.2f} to {now:.2f}: what is rewarded "
            "is not what is wanted; stop before, lower optimizer.learning_rate, raise method.beta, or set "
            'method.scale = "none"'
        )

    def _bought(self) -> tuple[bool, str]:
        """Whether reward and length rise together, and what is right does not, though it could.

        Where nothing but what is right is rewarded, that cannot be.
        """
        related = self._last.get(LENGTH_CORRELATION, [])
        paid = any(one.weight and one.kind not in COMPARING for one in self.config.rewards)
        if not paid or len(related) < _WINDOW:
            return False, ""
        known = [key for one in self._right if (key := f"reward_{one}") in self._last]
        close = statistics.fmean(related)
        so = close > _CLOSE and self._rose("reward") and self._rose("length")
        so = so and not any(self._rose(key) or statistics.fmean(self._last[key]) >= _NEAR for key in known)
        said = (
            f"answers grow longer, and the longer ones to a question are the better rewarded ({LENGTH_CORRELATION} "
            f"{close:.2f}), while "
        )
        if not known:
            return so, Note(
                f"{said}nothing says whether they are right: read some (finemoe rollouts), or watch what is right (one "
                "more of method.rewards, with weight = 0)"
            )
        name, before, now = (
            known[0][len("reward_") :],
            *(statistics.fmean(of[known[0]]) for of in (self._first, self._last)),
        )
        return so, (
            f"{said}no more of them are right ({name} {before:.2f} at first, {now:.2f} now): reward is bought by "
            "length; read some (finemoe rollouts), lower the weight of what likes length, or reward shorter ones "
            "(method.rewards of kind length)"
        )

    def _unlearnt(self, figures: Mapping[str, float]) -> list[str]:
        """Once, after enough rollouts that had something to teach: that the reward stands where it began."""
        if "reward" not in figures or figures["dead_groups"] > _DEAD:
            return []
        taught = self._streaks.setdefault("taught", _Streak())
        taught.rollouts += 1
        before, now = (statistics.fmean(of["reward"]) for of in (self._first, self._last))
        # Lengths earn nothing, they only cost; functions and models may give more than 1.
        largest = sum(max(one.weight, 0.0) for one in self.config.rewards if one.kind != "length")
        if taught.rollouts != _ENOUGH or self._rose("reward") or _NEAR * largest <= now <= largest:
            return []
        return [
            Note(
                f"nothing has been learnt so far: in {_ENOUGH} rollouts the reward has not risen by more than chance "
                f"({before:.3g} at first, {now:.3g} now); begin with a model that was taught longer (method sft), ask "
                "easier prompts, raise optimizer.learning_rate, or give it more rollouts (training.steps)"
            )
        ]

    def _dead(self, figures: Mapping[str, float]) -> str:
        """Of groups without spread, what to do about it: where all is right there is nothing to mend."""
        dead, cut = figures["dead_groups"], figures["cut_share"]
        known = [found for one in self.config.rewards if one.weight > 0 and one.kind in COMPARING
                 if (found := figures.get(f"reward_{one.name or one.kind}")) is not None]  # fmt: skip
        said = f"{dead:.0%} of the groups teach nothing, as "
        if known and min(known) >= 1 - _FEW:
            return Note(
                f"{said}nearly all answers are right: these prompts have taught what they can; stop here, or ask "
                "harder ones (of problems made in code: data.corpus.difficulty)"
            )
        shorter = f"; {cut:.0%} of the answers are cut: raise method.answer_tokens" if cut > _CUT else ""
        if known and max(known) <= _FEW:
            return (
                f"{said}nearly all answers are wrong: begin with easier prompts, or with a "
                f"model that is right now and then (method sft){shorter}"
            )
        return (
            f"{said}all of their answers are worth the same: make prompts easier or harder, "
            f"raise method.group, or set method.dynamic_sampling{shorter}"
        )

    def failures(self, share: float, why: str) -> list[str]:
        """What is to be said where so many answers of a rollout could not be judged, the last of them for `why`."""
        told = self._streaks.setdefault("failed", _Streak())
        told.rollouts = max(0, told.rollouts - 1)
        if not share or told.rollouts:
            return []
        told.rollouts = _AGAIN
        return [
            f"{share:.1%} of the answers of a rollout could not be judged and left their groups, the last as {why}: "
            f"{remedy(self.config, why)}; notes are in rollouts.jsonl"
        ]

    def step(self, terms: Mapping[str, float], within: int) -> list[str]:
        """What is to be said of how far the policy went from who wrote the answers.

        It is said after the last step on a rollout, by the worst of its steps: at the first of them the policy is still
        the one that wrote.

        Args:
            terms: of the step; none where it was passed over.
            within: how many steps on this rollout came before.
        """
        if not within:
            self._worst = {_AT_FIRST: terms.get(OFF_POLICY, 0.0)}
        for name in (MISMATCH, OFF_POLICY, CLIPPED):
            self._worst[name] = max(self._worst.get(name, 0.0), terms.get(name, 0.0))
        if within < self.config.updates - 1:
            return []
        worst, several = self._worst, self.config.updates > 1
        fewer = "take fewer steps on a rollout, or lower optimizer.learning_rate"
        by_update = (
            'method.replay = "update" makes the steps on a rollout agree with one another, and not with who wrote; '
            if self.config.replay == "update"
            else ""
        )
        said = {
            "mismatch": (
                self.config.replay != "rollout" and worst[MISMATCH] > _MISMATCH,
                f"{worst[MISMATCH]:.0%} of the experts are others than when the answers were written: "
                f'{by_update}set method.replay = "rollout"' + (f", or {fewer}" if several else ""),
            ),
            "off policy": (
                worst[OFF_POLICY] > _OFF_POLICY,
                f"the model is {worst[OFF_POLICY]:.3g} nats from who wrote the answers: "
                + (self._for_another_writer() if worst.get(_AT_FIRST, 0.0) > _OFF_POLICY or not several else fewer),
            ),
            "clipped": (
                worst[CLIPPED] > _CLIPPED,
                f"{worst[CLIPPED]:.0%} of the tokens are clipped at a step, and teach nothing there: {fewer}",
            ),
        }
        return self._now(said)

    def _for_another_writer(self) -> str:
        """The knob, where it is far before anything was learnt from an answer."""
        if self.config.importance_cap is None:
            return "set method.importance_cap = 2"
        if self.config.replay != "rollout":
            return 'set method.replay = "rollout"'
        return "let the model that is trained write them (method.server)"

    def _now(self, said: Mapping[str, tuple[bool, str]]) -> list[str]:
        return [
            text
            for name, (so, text) in said.items()
            if self._streaks.setdefault(name, _Streak()).after(so, _PATIENCE.get(name, _LONG))
        ]

    def _longer(self, figures: Mapping[str, float]) -> float:
        """How many times as long as at first answers are, where they are no better rewarded; else 0.

        Means of a few rollouts are compared.
        """
        if "reward" not in figures or len(self._last["reward"]) < _LONG:
            return 0.0
        if _errors(self._first["reward"][:_LONG], self._last["reward"][-_LONG:]) > _RISEN:
            return 0.0
        first, last = self._first["length"][:_LONG], self._last["length"][-_LONG:]
        return statistics.fmean(last) / max(statistics.fmean(first), 1e-9)


def _errors(before: Sequence[float], now: Sequence[float]) -> float:
    """By how many standard errors the mean is larger than before.

    Noise is what a rollout differs by from the one before it, so that a slow rise within the rollouts is none.
    """
    rise = statistics.fmean(now) - statistics.fmean(before)
    noise = (statistics.fmean((b - a) ** 2 for a, b in pairwise(one)) / 2 / len(one) for one in (before, now))
    return 0.0 if abs(rise) <= _RISE else rise / max(math.sqrt(sum(noise)), _RISE)


def _listed(found: float | Sequence[float]) -> list[float]:
    """What an earlier version kept is one number, of the first rollout."""
    return [found] * _LONG if isinstance(found, (int, float)) else list(found)
