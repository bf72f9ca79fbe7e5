"""All rewards of a run together: each answer's verdict by each of them, and their weighted sum."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from finemoe.core.errors import ConfigError
from finemoe.judging import KINDS
from finemoe.judging.pool import Pool
from finemoe.judging.verdicts import Answer, Bounds, Judged
from finemoe.methods.rewards.reward_model import RewardModel

_MANY = 32
_FEWEST, _MOST = 2, 8  # processes that judge


@dataclass(frozen=True)
class Scored:
    """What one answer is worth."""

    value: float | None
    """The weighted sum; None where a reward that has a weight failed: such an answer leaves its group, and is no 0."""
    by_name: Mapping[str, Judged]
    steps: tuple[tuple[int, float], ...]
    """Of each step, where it ends, in characters of the text, and its weighted value; in the order of the text."""
    outcome: float | None = None
    """The weighted sum of the rewards that say nothing of steps; None where there is no such reward."""
    failed: str | None = None
    """The name of the first reward with a weight that failed."""


def require_made(configs: Iterable[Any]) -> None:
    """Check that rewards can be made of which that may fail, in a process of their own; reward models are not opened.

    Raises:
        ConfigError: one cannot.
    """
    own = {one.model_dump_json(): one for one in configs if one.kind in KINDS and KINDS[one.kind].may_fail}
    if own:
        Pool({name: one.model_dump(mode="json") for name, one in own.items()}, Bounds(), 1).close()


class Rewards:
    """The rewards of a run, computed in processes of their own: each reward model in its, the others together."""

    def __init__(
        self,
        configs: Sequence[Any],
        *,
        deadline_seconds: float = 10.0,
        memory_bytes: int = 1 << 30,
        workers: int | None = None,
        on_failure: Callable[[str, str], object] = lambda name, note: None,
        keys: str | None = None,
    ) -> None:
        """Check that every reward can be computed.

        A process is started for it where making a reward may fail, and else with the first answer.

        Args:
            configs: of REWARDS.
            deadline_seconds: for one answer and one reward; of a program under test it is the program's own time.
            memory_bytes: for the same.
            workers: processes at most; None: as many as there are processors, two at least and eight at most. More than
                two are there only where an answer takes long.
            on_failure: is told at once when a reward cannot judge an answer: its name, and why.
            keys: for advice: what stands before `reward_seconds` and `reward_memory` where people set the two bounds,
                such as "method."; None: nowhere.

        Raises:
            ConfigError: there is none, two have one name, or one cannot be made: a user's file that fails, a package
                that is missing, a reward model without a template.
            FinemoeError: a reward model that cannot be opened.
        """
        if not configs:
            raise ConfigError("there is no reward: write at least one [[method.rewards]]")
        self._configs = {one.name or one.kind: one for one in configs}
        twice = [name for name, number in Counter(one.name or one.kind for one in configs).items() if number > 1]
        if twice:
            raise ConfigError(f"two rewards are called {twice[0]!r}: give each a `name` of its own")
        bounds = Bounds(deadline_seconds, memory_bytes)
        self.errors_in_a_row = 0
        """Answers one after the other, up to the last, that got no value because a reward failed."""
        specs = {name: one.model_dump(mode="json") for name, one in self._configs.items() if one.kind in KINDS}
        most = workers or min(max(_FEWEST, os.cpu_count() or 1), _MOST)
        self._make_pool = partial(Pool, specs, bounds, most, on_failure)
        self._has_rules = bool(specs)
        self._pool: Pool | None = None
        self._models: dict[str, RewardModel] = {}
        try:
            if any(KINDS[one["kind"]].may_fail for one in specs.values()):
                self._pool = self._make_pool()  # first: a slip in a user's file is told before gigabytes are read
            for name, one in self._configs.items():
                if one.kind == "reward_model":
                    self._models[name] = RewardModel(one, bounds, partial(on_failure, name), keys)
        except BaseException:
            self.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Of the rewards, in their order."""
        return tuple(self._configs)

    @property
    def sentence(self) -> str:
        """The weights in words, for a run's notes."""
        return "an answer is worth " + " + ".join(f"{one.weight:g} x {name}" for name, one in self._configs.items())

    @property
    def trouble(self) -> str | None:
        """What to tell of many failures in a row; None where there are not so many."""
        if self.errors_in_a_row < _MANY:
            return None
        return f"the last {self.errors_in_a_row} answers got no reward, as computing it failed: {self._last_error}"

    @property
    def last_error(self) -> str:
        """Of the last answer that got no value: which reward, and why."""
        return self._last_error

    _last_error = ""

    def identity(self) -> list[dict[str, Any]]:
        """JSON-able: equal where others say the same of every answer, a user's file and a model's weights included."""
        marks = {name: {"sha256": mark} for name, mark in self.files.items()}
        marks |= {name: {"model_sha256": model.sha256} for name, model in self._models.items()}
        return [{**one.identity(), **marks.get(name, {})} for name, one in self._configs.items()]

    @property
    def files(self) -> dict[str, str]:
        """By reward, the sha256 of the user's file that says what an answer is worth, as it was loaded last."""
        return {} if self._pool is None else dict(self._pool.files)

    @property
    def models_sha256(self) -> str | None:
        """Of the weights of all reward models, in their order; None where there is none."""
        marks = [model.sha256 for model in self._models.values()]
        return hashlib.sha256(" ".join(marks).encode()).hexdigest() if marks else None

    def score(self, answers: Sequence[Answer]) -> list[Scored]:
        """What each answer is worth; nothing that a reward does or meets is raised.

        Raises:
            ConfigError: no process can be started on this machine, for the first answers.
            OutageError: a reward model is waited for no longer, since the run was asked to end.
        """
        if self._pool is None and self._has_rules and answers:
            self._pool = self._make_pool()
        by_name = self._pool.judge(answers) if self._pool is not None else [{} for _ in answers]
        for name, model in self._models.items():
            for found, judged in zip(by_name, model.judge(answers), strict=True):
                found[name] = judged
        return [self._summed({name: found[name] for name in self._configs}) for found in by_name]

    def _summed(self, by_name: Mapping[str, Judged]) -> Scored:
        total, steps = 0.0, []
        outcome: float | None = None
        failed: str | None = None
        for name, judged in by_name.items():
            weight = self._configs[name].weight
            if weight == 0:
                continue
            if judged.verdict == "error":
                failed = failed or name
            total += weight * judged.value
            if not judged.steps:
                outcome = (outcome or 0.0) + weight * judged.value
            steps += [(place, weight * value) for place, value in judged.steps]
        self.errors_in_a_row = self.errors_in_a_row + 1 if failed else 0
        if failed is not None:
            self._last_error = f"{failed}: {by_name[failed].note}"
            return Scored(None, by_name, (), outcome, failed)
        return Scored(total, by_name, tuple(sorted(steps)), outcome)

    def hurry(self) -> None:
        """A person asks the run to end."""
        for model in self._models.values():
            model.hurry()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()
        for model in self._models.values():
            model.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
