"""`finemoe paper`: what it prints of a study, whole, failed or interrupted; the study itself is tested elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finemoe.studies import paper as studies_paper
from finemoe.studies.paper import Paper
from finemoe.studies.staged import study as staged_study


def claim(verdict: str, difference: dict[str, float | None] | None, **changes: Any) -> dict[str, Any]:
    statement = f"A design of many words and of some length is {verdict} beside another one"
    return {"statement": statement, "verdict": verdict, "difference": difference, "on_training_text": None, **changes}


CLAIMS = [
    claim("reproduced", {"mean": -0.05, "low": -0.08, "high": -0.02}, on_training_text={"verdict": "undecided"}),
    claim("contradicted", {"mean": 0.5, "low": 0.4, "high": 0.6}),
    claim("undecided", {"mean": 0.01, "low": None, "high": None}),
    claim("not run", None),
]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the verb is given, and what it asked for."""
    results = {"scale": "tiny", "scale_about": "small models", "experiments": {"table1": {"claims": CLAIMS}}}
    seen: dict[str, Any] = {"paper": Paper(tmp_path / "p", results, False, {})}

    def run(scale: str, **options: Any) -> Paper:
        seen.update(options, scale=scale)
        return seen["paper"]

    monkeypatch.setattr(studies_paper, "paper", run)
    return seen


def test_a_line_a_claim_and_where_the_report_is(command: Any, study: dict[str, Any]) -> None:
    done = command("paper", "--only", "table1, figure4", "--set", "seeds=[0]", "--quiet")
    assert done.exit_code == 0
    assert (study["scale"], study["only"], study["quiet"]) == ("tiny", ["table1", "figure4"], True)
    assert list(study["overrides"]) == ["seeds=[0]"]
    lines = done.stdout.splitlines()
    assert max(map(len, lines[: lines.index("Scale tiny: small models.")])) <= 80
    assert "-0.050 ± 0.030" in done.stdout.replace("−", "-")
    assert [word for word in ("reproduced", "contradicted", "undecided") if word in done.stdout] == [
        "reproduced",
        "contradicted",
        "undecided",
    ]
    assert "is not run beside" not in " ".join(done.stdout.split())
    assert str(study["paper"].directory / "report.html") in done.stdout


def test_json_is_the_results_alone(command: Any, study: dict[str, Any]) -> None:
    assert json.loads(command("paper", "--json", "--quiet").stdout) == study["paper"].results


def test_interrupted_it_says_how_to_go_on(command: Any, study: dict[str, Any], tmp_path: Path) -> None:
    study["paper"] = replace(study["paper"], interrupted=True)
    out = tmp_path / "my study"
    done = command("paper", "--scale", "small", "--only", "table1", "--set", "seeds=[0, 1]", "--out", out, "--quiet")
    assert done.exit_code == 130
    said = "finemoe paper --scale small --only table1 --set 'seeds=[0, 1]' --out "
    assert said + f"'{out}'" in done.stderr


def test_failed_runs_are_an_error_after_the_table(command: Any, study: dict[str, Any]) -> None:
    study["paper"] = replace(study["paper"], failures={"gshard/seed-0": "a loss was not finite"})
    done = command("paper", "--quiet")
    assert done.exit_code not in (0, 130)
    assert "contradicted" in done.stdout
    assert "1 of the runs failed: gshard/seed-0: a loss was not finite" in done.stderr


def test_a_recipe_of_stages_is_a_study_of_its_own(
    command: Any, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    claims = [{**one, "on_training_text": None} for one in CLAIMS]
    done_study = Paper(tmp_path / "p", {"experiments": {"claims": {"claims": claims}}}, False, {})

    def run(recipe: Path, **options: Any) -> Paper:
        seen.update(options, recipe=recipe)
        return done_study

    monkeypatch.setattr(staged_study, "study", run)
    done = command("paper", "sums.toml", "--set", "study.seeds=[0]", "--quiet")
    assert done.exit_code == 0
    assert seen["recipe"] == Path("sums.toml")
    assert list(seen["overrides"]) == ["study.seeds=[0]"]
    assert "scale" not in study, "the other kind of study was not asked for"
    assert "Verdict" in done.stdout
    assert "Training" not in done.stdout, "nothing of it is about losses"
    assert "Of 4 claims: 1 contradicted, 1 reproduced, 1 undecided and 1 not run." in " ".join(done.stdout.split())
    monkeypatch.setattr(staged_study, "study", lambda recipe, **options: replace(done_study, interrupted=True))
    stopped = command("paper", "sums.toml", "--quiet")
    assert stopped.exit_code == 130
    assert "finemoe paper sums.toml" in stopped.stderr


@pytest.mark.parametrize("option", ["--scale", "--only"])
def test_a_recipe_says_itself_what_is_run(command: Any, option: str) -> None:
    done = command("paper", "sums.toml", option, "tiny")
    assert done.exit_code == 2
    assert f"leave {option} out, or the recipe" in " ".join(done.stderr.split())
