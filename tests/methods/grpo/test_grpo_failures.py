"""Rewards that fail: told at once, never counted as nothing, and no run that learns nothing goes on for hours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.charts.run.page import run_page
from finemoe.core.errors import OutageError
from finemoe.methods.grpo.reading import find_answers
from finemoe.runs.listing import list_runs
from finemoe.runs.report import run_results
from finemoe.runs.run import resume, train
from finemoe.training.directory import read_metrics
from methods.grpo.tiny_policy import base, practising
from runs.tiny_runs import steps


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("failing"))


def own(folder: Path, body: str) -> dict[str, Any]:
    path = folder / "own.py"
    path.write_text(f"def score(prompt, completion, record):\n    {body}\n")
    return {"kind": "function", "path": f"{path}:score"}


BROKEN = "raise KeyError('no such field')"
WHY = (
    "KeyError: 'no such field' (own.py, line 2); the record has prompt, completion, answer, problem, difficulty, "
    "steps, tests"
)


def test_a_reward_that_judges_nothing_ends_the_run_and_mended_it_goes_on(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = practising(start, {"rewards": [own(tmp_path, BROKEN)]}), tmp_path / "run"
    with pytest.raises(OutageError) as ended:
        train(recipe, out=out, quiet=True)
    said = str(ended.value)
    assert "no answer of a rollout could be judged" in said
    assert f"the last as function: {WHY}: mend the reward; the run is" in said
    assert f"saved after step 0: `finemoe resume {out}` goes on" in said
    (first,) = [one for one in caplog.messages if one.startswith("reward function could not judge an answer")]
    assert f"an answer: {WHY}. An answer that is not judged leaves its group" in first
    assert not [one for one in (said, *caplog.messages) if "method.reward_" in one], "no time helps against a slip"
    (measured,) = [one for one in read_metrics(out) if one["kind"] == "validation"]
    assert measured["validation_reward"] is None, "not 0, which would say that all answers were wrong"
    assert measured["validation_failed_share"] == 1
    failed = list(find_answers(out, which="failed"))
    assert {one["step"] for one in failed} == {1}
    assert {one["rewards"]["function"]["note"] for one in failed} == {WHY}
    own(tmp_path, "return float(len(completion))")
    assert resume(out, overrides=["method.reward_seconds=20"], quiet=True).summary["steps"] == 6
    assert not list(find_answers(out, which="failed")), "the step was done again"


def test_a_run_that_learnt_before_ends_after_a_few_such_rollouts(start: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    counted = (
        f"file = {str(count)!r}; import os; number = os.path.getsize(file) if os.path.exists(file) else 0; "
        "open(file, 'a').write('x'); return 1 / (number < 20)"
    )
    method = {"rewards": [own(tmp_path, counted)], "validation_prompts": 2}
    out = tmp_path / "run"
    with pytest.raises(OutageError, match="no answer of the last 3 rollouts could be judged"):
        train(practising(start, method, training={"steps": 9, "evaluate_every": 9}), out=out, quiet=True)
    kinds = [one["kind"] for one in read_metrics(out) if one["kind"] in ("step", "skipped")]
    assert kinds == ["step", "step", "skipped", "skipped"], "and the fifth ends it"
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    last = [one for one in rollouts if one["kind"] == "rollout"][-1]
    assert last["failed_share"] == 1
    assert "reward" not in last
    with pytest.raises(OutageError, match="no answer of the last 3 rollouts"):
        resume(out, quiet=True)


def test_a_summary_says_how_many_were_not_judged(start: Path, tmp_path: Path) -> None:
    method = {"rewards": [own(tmp_path, "return 1 / (len(completion) % 2)")], "validation_prompts": 4}
    run = train(practising(start, method, training={"steps": 2, "evaluate_every": 2}), out=tmp_path / "run", quiet=True)
    shares = [one["figures"]["failed_share"] for one in steps(run.directory)]
    assert 0 < sum(shares) < 2
    assert run.summary["failed_share"] == pytest.approx(sum(shares) / 2)


def test_what_was_not_measured_is_a_dash(start: Path, tmp_path: Path) -> None:
    run = train(practising(start, training={"steps": 2}), out=tmp_path / "run", quiet=True).directory
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for one in lines:
        if one["kind"] == "validation":
            one["validation_reward"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "final_validation_reward": None}))
    (listed,) = list_runs(tmp_path)
    assert listed.loss is None, "and no other figure in its place"
    assert "Reward of held-out questions – at step 2" in run_page(run_results(run))
