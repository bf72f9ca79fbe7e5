"""When a run learns nothing, or not what it should, in plain words, with the knob that helps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from finemoe.core.logs import logger
from finemoe.methods.grpo.config import GRPOConfig
from finemoe.methods.grpo.objective import MISMATCH
from finemoe.methods.grpo.surrogate import CLIPPED, OFF_POLICY
from finemoe.training.method import Note

_LONG = 5
"""[rollouts] In a row before anything is said; and over which lengths and rewards are averaged, as one is noise."""
_AGAIN = 50
"""[rollouts] After which failures of rewards are told again, where there still are some."""
_DEAD, _CUT, _MISMATCH, _CLIPPED, _OFF_POLICY = 0.9, 0.5, 0.1, 0.5, 0.01
_COMPARING = ("answer", "number", "latex", "expression", "tests", "reasoning_gym")
"""Kinds of rewards that say whether an answer is right, 0 to 1."""
_FEW = 0.05
"""[share] Of right answers, or of wrong ones, that are none to speak of."""
_LONGER = 1.5
"""[factor] Length against that of the first rollouts, from where on a reward that did not rise is suspected."""
_RISE = 1e-6
"""[reward] What is less is rounding."""
_FALLEN = 0.7
"""[share] Of the best that a watched reward came to, below which something else is learnt."""
_AT_FIRST = "at first"


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
        logger.warning(
            "reward %s could not judge an answer: %s. Each may take %g s (method.reward_seconds) and %d bytes "
            "(method.reward_memory); an answer that is not judged %s",
            name,
            note,
            self._seconds,
            self._memory,
            becomes,
        )


@dataclass
class _Streak:
    """How long something has been so; it is said once, and again when it had ended and came back."""

    rollouts: int = 0

    def after(self, so: bool) -> bool:
        """Whether it is to be said now."""
        self.rollouts = self.rollouts + 1 if so else 0
        return self.rollouts == _LONG


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
    _worst: dict[str, float] = field(default_factory=dict)
    """Of the steps so far on the rollout of now."""

    def values(self) -> dict[str, dict[str, Any]]:
        """For a checkpoint: a run that goes on says what the unbroken one would."""
        return {
            "streaks": {name: one.rollouts for name, one in self._streaks.items()},
            "first": {name: list(found) for name, found in self._first.items()},
            "last": {name: list(found) for name, found in self._last.items()},
            "worst": dict(self._worst),
        }

    def put(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Be as `values` found it."""
        self._streaks = {name: _Streak(int(rollouts)) for name, rollouts in values["streaks"].items()}
        self._first, self._last = ({name: _listed(found) for name, found in values.get(key, {}).items()}
                                   for key in ("first", "last"))  # fmt: skip
        self._worst = dict(values.get("worst", {}))

    def after(self, figures: Mapping[str, float]) -> list[str]:
        """What is to be said after a rollout with these figures."""
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
        for one in self.config.rewards:
            if not one.weight and one.kind in _COMPARING:
                name = one.name or one.kind
                said[f"fallen {name}"] = self._fallen(name, figures)
        return self._now(said)

    def _fallen(self, name: str, figures: Mapping[str, float]) -> tuple[bool, str]:
        """Of a reward that says what is right and is only watched: whether it fell far below its best."""
        last, best = self._last.setdefault(f"watched {name}", []), self._first.setdefault(f"watched {name}", [])
        if (found := figures.get(f"reward_{name}")) is not None:
            last.append(found)
            del last[:-_LONG]
        mean = statistics.fmean(last or [0.0])
        if len(last) == _LONG and (not best or mean > best[0]):
            best[:] = [mean]
        so = bool(best) and mean < _FALLEN * best[0]
        return so, (
            f"{name}, which is only watched, fell from {best[0] if best else mean:.2f} to {mean:.2f}: what is rewarded "
            "is not what is wanted; stop before, lower optimizer.learning_rate, raise method.beta, or set "
            'method.scale = "none"'
        )

    def _dead(self, figures: Mapping[str, float]) -> str:
        """Of groups without spread, what to do about it: where all is right there is nothing to mend."""
        dead, cut = figures["dead_groups"], figures["cut_share"]
        known = [found for one in self.config.rewards if one.weight > 0 and one.kind in _COMPARING
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
            "mend the reward, or raise method.reward_seconds or method.reward_memory; notes are in rollouts.jsonl"
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
        said = {
            "mismatch": (
                self.config.replay == "off" and worst[MISMATCH] > _MISMATCH,
                f"{worst[MISMATCH]:.0%} of the experts are others than when the answers were written: "
                'set method.replay = "rollout"' + (f", or {fewer}" if several else ""),
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
        return [text for name, (so, text) in said.items() if self._streaks.setdefault(name, _Streak()).after(so)]

    def _longer(self, figures: Mapping[str, float]) -> float:
        """How many times as long as at first answers are, where they are no better rewarded; else 0.

        Means of a few rollouts are compared. A reward has risen where the difference is above two standard errors.
        """
        for name in ("reward", "length"):
            if name in figures:  # there is no reward where no answer could be judged
                first, last = self._first.setdefault(name, []), self._last.setdefault(name, [])
                if len(first) < _LONG:
                    first.append(figures[name])
                last.append(figures[name])
                del last[:-_LONG]
        if "reward" not in figures or len(self._first["reward"]) < _LONG:
            return 0.0
        before, now = self._first["reward"], self._last["reward"]
        error = math.sqrt((statistics.pvariance(before) + statistics.pvariance(now)) / _LONG)
        rise = statistics.fmean(now) - statistics.fmean(before)
        if rise > max(2 * error, _RISE):
            return 0.0
        return statistics.fmean(self._last["length"]) / max(statistics.fmean(self._first["length"]), 1e-9)


def _listed(found: float | Sequence[float]) -> list[float]:
    """What an earlier version kept is one number, of the first rollout."""
    return [found] * _LONG if isinstance(found, (int, float)) else list(found)
