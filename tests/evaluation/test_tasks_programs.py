"""HumanEval, MBPP and lines to fill in: what is run, and what runs are worth."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.core.errors import ConfigError, DataError
from finemoe.evaluation.task import Generate, Generated, Item, Judged
from finemoe.evaluation.tasks import TASKS, describe, pass_at_k, programs, sampled
from finemoe.sandbox.sandbox import Execution, Limits

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(n):\n    """Twice n."""\n',
    "entry_point": "double",
    "canonical_solution": "    m = n\n\n    return m + n\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


def mbpp(number: int) -> dict[str, Any]:
    return {
        "task_id": number,
        "text": f"Write f{number}.",
        "code": f"def f{number}():\r\n    return {number}\r\n",
        "test_setup_code": "import math",
        "test_list": [f"assert f{number}() == {number}", f"assert math.isfinite(f{number}())"],
    }


def write(path: Path, *records: Any) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def request(item: Item) -> Generate:
    (found,) = item.requests
    assert isinstance(found, Generate)
    return found


def runs_here(program: str, limits: Limits) -> Execution:
    """Only for programs written in this file."""
    try:
        exec(compile(program, "program", "exec"), {})
    except Exception as error:
        return Execution("failed", 1, 0.0, "", repr(error))
    return Execution("passed", 0, 0.0, "", "")


def verdicts(*names: Any) -> Callable[[str, Limits], Execution]:
    waiting = list(names)
    return lambda program, limits: Execution(waiting.pop(0), 1, 0.0, "", "as told")


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int, data: st.DataObject) -> None:
    passed = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    draws = list(combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_stable_where_factorials_are_not() -> None:
    assert pass_at_k(100_000, 0, 100) == 0.0
    assert pass_at_k(100_000, 1, 100) == pytest.approx(0.001)
    assert pass_at_k(200, 200, 100) == 1.0


def test_humaneval_runs_the_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "execute", runs_here)
    items, skipped = TASKS["humaneval"].items(write(tmp_path / "HumanEval.jsonl.gz", HUMANEVAL), None, None)
    assert (items[0].id, skipped, request(items[0]).prompt) == ("HumanEval/0", 0, HUMANEVAL["prompt"])
    assert "\ndef " in request(items[0]).stops
    for text, worth in ((HUMANEVAL["canonical_solution"], 1.0), ("    return n\n", 0.0), ("    return (", 0.0)):
        judged = TASKS["humaneval"].judge(items[0], [Generated((text,), 9)])
        assert (judged.scores, judged.outcome) == ({"pass@1": worth}, "answered")


def test_mbpp_examples_are_the_first_of_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "execute", runs_here)
    rows = [mbpp(number) for number in (11, 12, 1, 2, 3, 4, 510, 511, 700)]
    broken = {**mbpp(13), "test_list": None}
    items, skipped = TASKS["mbpp"].items(write(tmp_path / "mbpp.jsonl", *rows, broken), None, None)
    assert ([item.id for item in items], skipped) == (["MBPP/11", "MBPP/12", "MBPP/510"], 1)
    prompt = request(items[0]).prompt
    assert [prompt.count(f"Write f{n}.") for n in (1, 2, 3, 4, 11)] == [1, 1, 1, 0, 1]
    assert "[BEGIN]\ndef f1():\n    return 1\n[DONE]\n\n" in prompt
    assert prompt.endswith("assert math.isfinite(f11())\n[BEGIN]\n")
    good = TASKS["mbpp"].judge(items[0], [Generated(("def f11():\n    return 11\n",), 9)])
    bad = TASKS["mbpp"].judge(items[0], [Generated(("def f11():\n    return 12\n",), 9)])
    assert (good.scores, bad.scores) == ({"pass@1": 1.0}, {"pass@1": 0.0})


def judged_as(*names: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Judged:
    monkeypatch.setattr(programs, "execute", verdicts(*names))
    task = sampled(TASKS["humaneval"], len(names), 0.8)
    item = task.items(write(tmp_path / "HumanEval.jsonl", HUMANEVAL), None, None)[0][0]
    assert (request(item).samples, request(item).temperature) == (len(names), 0.8)
    return task.judge(item, [Generated(("x",) * len(names), 9)])


def test_verdicts_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*names: str) -> Judged:
        return judged_as(*names, monkeypatch=monkeypatch, tmp_path=tmp_path)

    for name in ("timeout", "crash", "violation"):
        found = judge(name)
        assert (found.outcome, found.scores) == (name, {"pass@1": 0.0})
        assert found.note == f"1 {name} (as told)"
    assert judge("timeout", "timeout", "crash").outcome == "timeout"
    assert judge("timeout", "crash").outcome == "crash"
    mixed = judge("timeout", "passed", "failed", "crash", "failed")
    assert mixed.outcome == "answered"
    assert mixed.scores == {"pass@1": pytest.approx(0.2), "pass@5": 1.0}
    assert mixed.note == "1 crash, 2 failed, 1 passed, 1 timeout (as told)"


def test_a_sandbox_that_breaks_is_no_failure_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged_as("passed", "error", monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert (found.outcome, dict(found.scores)) == ("error", {})
    assert "1 error" in found.note


def test_nothing_generated_is_an_error(tmp_path: Path) -> None:
    item = TASKS["humaneval"].items(write(tmp_path / "HumanEval.jsonl", HUMANEVAL), None, None)[0][0]
    assert TASKS["humaneval"].judge(item, []).outcome == "error"


def test_sampling_is_for_programs() -> None:
    with pytest.raises(ConfigError, match="greedy completions are all the same"):
        sampled(TASKS["humaneval"], 5, 0.0)
    with pytest.raises(ConfigError, match="samples is 0"):
        sampled(TASKS["humaneval"], 0, 0.5)
    with pytest.raises(ConfigError, match="code that is run: humaneval, mbpp"):
        sampled(TASKS["gsm8k"], 5, 0.5)


def test_infilling_masks_each_line_of_a_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "execute", runs_here)
    task = TASKS["infilling"]
    items, _ = task.items(write(tmp_path / "HumanEval.jsonl", HUMANEVAL), None, None)
    assert [item.id for item in items] == ["HumanEval/0/L1", "HumanEval/0/L3"]
    whole = HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]
    for item, line in zip(items, ("    m = n", "    return m + n"), strict=True):
        asked = request(item)
        assert asked.prompt + line + str(asked.suffix) == whole
        assert task.judge(item, [Generated((line,), 3)]).scores == {"exact_match": 1.0, "pass@1": 1.0}
    other = task.judge(items[1], [Generated(("    return 2 * n",), 3)])
    assert other.scores == {"exact_match": 0.0, "pass@1": 1.0}
    assert "text after the gap" in describe(task, items[0])


def test_infilling_of_source_files(tmp_path: Path) -> None:
    lines = ["# a remark that is long", "import os", "", "def work(value):", "    return os.path.join(value)", "}"]
    (tmp_path / "a.py").write_text("\r\n".join(lines), encoding="utf-8")
    (tmp_path / "b.py").write_text("x\n", encoding="utf-8")
    task = TASKS["infilling"]
    items, skipped = task.items(tmp_path, None, None)
    assert (len(items), skipped) == (1, 1)
    asked = request(items[0])
    line = items[0].facts["line"]
    assert line in lines[1:5]
    assert asked.prompt + line + str(asked.suffix) == "\n".join(lines)
    assert task.judge(items[0], [Generated((f" {line.strip()} ",), 3)]).scores == {"exact_match": 1.0}
    assert task.judge(items[0], [Generated(("pass",), 3)]).scores == {"exact_match": 0.0}
    assert task.items(tmp_path, None, None)[0] == items


def test_a_made_infilling_set(tmp_path: Path) -> None:
    row = {
        **HUMANEVAL,
        "task_id": "SingleLineInfilling/0/L0",
        "suffix": "\n    return m + n\n",
        "canonical_solution": "    m = n",
    }
    items, _ = TASKS["infilling"].items(write(tmp_path / "HumanEval-SingleLineInfilling.jsonl.gz", row), None, None)
    assert (items[0].id, request(items[0]).suffix) == ("SingleLineInfilling/0/L0", row["suffix"])
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="no file whose name is this set's"):
        TASKS["humaneval"].items(tmp_path / "sub", None, None)
