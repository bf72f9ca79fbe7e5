"""reasoning-gym by its own protocol: a package that does what it does, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from finemoe.core.errors import ConfigError
from finemoe.data import SkipReport
from finemoe.data.problems import problem_at
from finemoe.data.problems.corpus import ProblemsCorpus
from finemoe.judging.verdicts import Answer
from finemoe.text import gym
from judging.judged import answer, judge

CORPUS: dict[str, Any] = {"problem": "reasoning_gym", "dataset": "doubling", "options": {"most": 50}}


class Doubling:
    """A task whose rule gives half for what is near."""

    def __init__(self, size: int, seed: int, most: int = 9) -> None:
        self.size, self.seed, self.most = size, seed, most

    def __getitem__(self, number: int) -> dict[str, Any]:
        assert 0 <= number < self.size
        n = random.Random(self.seed + number).randint(1, self.most)
        return {"question": f"Twice {n}?", "answer": str(2 * n), "metadata": {"n": n}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        if answer == entry["answer"]:
            return 1.0
        return 0.5 if answer and abs(int(answer) - int(entry["answer"])) == 1 else 0.0


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    package.__spec__ = ModuleSpec("reasoning_gym", None)
    vars(package)["create_dataset"] = lambda name, **options: Doubling(**options)
    vars(factory)["DATASETS"] = {"doubling": Doubling}
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    gym._dataset.cache_clear()
    yield
    gym._dataset.cache_clear()


def records(**tables: Any) -> list[dict[str, Any]]:
    return [json.loads(one.text) for one in ProblemsCorpus(**{**CORPUS, **tables}).documents(SkipReport(), whole=True)]


@pytest.mark.usefixtures("installed")
def test_its_entries_are_problems_and_its_rule_is_the_reward() -> None:
    found = records(count=30, validation_count=0)
    assert len({one["prompt"] for one in found}) > 15
    said = judge("reasoning_gym")
    for record in found:
        n = int(record["prompt"].split()[1].removesuffix("?\n").removesuffix("?"))
        assert record["answer"] == record["completion"] == str(2 * n)

        def given(text: str, record: dict[str, Any] = record) -> Answer:
            return answer(text, record=record)

        right = said(given(f" {2 * n}\n"))
        assert (right.verdict, right.value) == ("right", 1)
        assert said(given(f"<think>x</think><answer>{2 * n}</answer>")).value == 1
        assert (said(given(f"{2 * n + 1}")).verdict, said(given(f"{2 * n + 1}")).value) == ("wrong", 0.5)
        assert said(given("\n")).verdict == "unreadable"
    assert said(answer("4")).verdict == "error"
    assert found == records(count=30, validation_count=0)


@pytest.mark.usefixtures("installed")
def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="reasoning-gym has no task 'dubling', did you mean `doubling`"):
        records(dataset="dubling")
    with pytest.raises(ConfigError, match=r"'doubling' does not take the options \{\"least\": 1\}"):
        records(options={"least": 1})


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="it is installed here")
def test_where_it_is_missing_the_command_is_named() -> None:
    gym._dataset.cache_clear()
    for make in (lambda: records(count=1), lambda: judge("reasoning_gym")):
        with pytest.raises(ConfigError, match=r"pip install 'finemoe\[rl\]'"):
            make()


@pytest.mark.parametrize("task", ["basic_arithmetic", "chain_sum", "number_sorting"])
def test_the_real_one(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    said = judge("reasoning_gym")
    for index in range(5):
        one = problem_at("reasoning_gym", 0, index, 1, dataset=task, options={})
        record = dict(one.more)
        assert said(answer(one.solution, record=record)).value == 1
        assert said(answer("no", record=record)).value < 1
