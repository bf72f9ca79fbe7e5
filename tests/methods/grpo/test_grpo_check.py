"""`finemoe train --check` of GRPO: processes that judge are started where they are needed, and end with the check."""

from __future__ import annotations

import math
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import finemoe
from finemoe.core.errors import RunError
from finemoe.judging.pool import Pool
from finemoe.methods.grpo.source import OwnEngine
from methods.grpo.tiny_policy import LENGTH, base, practising


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("checked"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that judges, as it starts."""
    found: list[subprocess.Popen[bytes]] = []
    starting = Pool._start

    def noted(self: Pool) -> None:
        starting(self)
        found.append(self._workers[-1].process)

    monkeypatch.setattr(Pool, "_start", noted)
    return found


RULE: dict[str, Any] = {"rewards": [{"kind": "answer"}]}


def test_steps_are_measured_with_rewards_that_end_with_it(start: Path, started: list[subprocess.Popen[bytes]]) -> None:
    found = finemoe.check(practising(start, RULE), quiet=True, steps=1)
    assert not found.refused
    assert found.tokens_per_second is not None
    assert started
    assert all(one.poll() is not None for one in started)


def test_the_writing_of_answers_is_part_of_a_step(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check promised ten times the real speed, as it timed what comes after the answers alone."""
    writing = OwnEngine.__call__

    def slow(self: OwnEngine, *arguments: Any) -> Any:
        time.sleep(0.3)
        return writing(self, *arguments)

    monkeypatch.setattr(OwnEngine, "__call__", slow)
    found = finemoe.check(practising(start, RULE, training={"steps": 40}), quiet=True, steps=3)
    assert found.seconds_a_step is not None
    assert found.seconds is not None
    assert found.seconds_a_step > 0.3
    assert found.seconds > 40 * 0.3
    assert list(found.shares) == ["writing answers", "judging them", "all else"]
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.shares["writing answers"] > 0.3
    assert found.tokens_per_second is not None
    assert found.tokens_per_second < 8 * LENGTH / found.seconds_a_step, "answers are shorter than what they may be"
    assert (found.losses, len(found.rewards)) == ((), 3)
    text = " ".join(str(found).split())
    assert f"Training at most {40 * 8 * LENGTH / 1000:.1f}K tokens in 40 steps" in text
    assert "s a step, " in text
    assert "a step's time: writing answers " in text
    assert "reward 0.000 at first" in text
    assert "answers may grow longer while it learns" in text


def test_short_answers_need_more_steps_to_read_what_they_may(start: Path, tmp_path: Path) -> None:
    most, length = 6 * 8 * LENGTH, {"steps": 300, "evaluate_every": 300}
    found = finemoe.check(practising(start, training={**length, "max_tokens": most}), quiet=True, steps=4)
    run = finemoe.train(practising(start, training={"steps": 4}), out=tmp_path / "run", quiet=True)
    assert found.steps == math.ceil(most / (run.summary["tokens"] / 4)) > 6
    assert found.tokens == most
    assert found.validations == 1
    plain = finemoe.check(practising(start, training=length), quiet=True, steps=1)
    assert (plain.steps, plain.tokens) == (300, 300 * 8 * LENGTH)


def test_where_nothing_is_measured_nothing_is_started(
    start: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: Any) -> None:
        raise RunError("there is no room for it")

    monkeypatch.setattr("finemoe.runs.planning.check.check_memory", no_room)
    found = finemoe.check(practising(start, RULE), quiet=True)
    assert found.refused == ("there is no room for it",)
    assert not started


def test_a_file_of_rewards_that_fails_is_refused_all_the_same(
    start: Path, started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    (tmp_path / "rules.py").write_text("import nothing_of_that_name\n")
    method = {"rewards": [{"kind": "function", "path": f"{tmp_path / 'rules.py'}:score"}]}
    found = finemoe.check(practising(start, method), quiet=True)
    assert any("nothing_of_that_name" in one for one in found.refused)
    assert all(one.poll() is not None for one in started)
