"""`finemoe recipe`, `train --check`, `env`, and what the shell offers after a tab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finemoe.checkpoint.kinds import COMPARISON
from finemoe.cli import completion
from finemoe.evaluation.tasks import TASKS
from finemoe.model.presets import PRESETS
from finemoe.runs.planning import machine
from finemoe.runs.planning.check import Check
from finemoe.studies.keys import recipe_keys, recipe_sections

FOUND = {"total_parameters": 5, "active_parameters": 3, "steps": 2, "tokens": 64}


def test_keys_are_printed_within_80_columns_and_can_be_searched(command: Any) -> None:
    text = command("recipe", "keys").stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for key in recipe_keys():
        assert f"{key.name} = {key.default}" in lines
    few = command("recipe", "keys", "muon").stdout
    assert few.startswith('[optimizer] kind = "muon"\n')
    assert "whole number above 0; unit: iterations. Of Newton and Schulz." in few


def test_keys_as_json_and_as_the_page(command: Any) -> None:
    listed = json.loads(command("recipe", "keys", "training", "--json").stdout)
    assert [one["name"] for one in listed][:2] == ["training.tokens", "training.steps"]
    assert {"recipe", "table", "kind", "name", "type", "default", "unit", "meaning"} == set(listed[0])
    assert command("recipe", "keys", "--markdown").stdout.startswith("# Every key of a recipe\n")
    assert command("recipe", "keys", "training", "--markdown").exit_code == 2
    wrong = command("recipe", "keys", "optimiser")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "did you mean `optimizer`?" in wrong.stderr


def spied_check(monkeypatch: pytest.MonkeyPatch, *refused: str) -> list[Any]:
    calls: list[Any] = []

    def check(*arguments: Any, **options: Any) -> Check:
        calls.append((arguments, options))
        return Check("a.toml", refused, **FOUND)  # type: ignore[arg-type]

    monkeypatch.setattr("finemoe.runs.planning.check.check", check)
    return calls


@pytest.mark.usefixtures("here")
def test_check_hands_over_prints_and_says_1_where_it_would_be_refused(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spied_check(monkeypatch)
    result = command("train", "a.toml", "--check", "--set", "a.b=1", "--out", "d", "-q")
    assert (result.exit_code, calls) == (
        0,
        [((Path("a.toml"),), {"out": Path("d"), "overrides": ["a.b=1"], "quiet": True})],
    )
    assert "nothing: the run can start" in result.stdout
    spied_check(monkeypatch, "the disk is full")
    result = command("train", "a.toml", "--check")
    assert result.exit_code == 1
    assert "Refused     the disk is full" in result.stdout
    result = command("train", "a.toml", "--check", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["refused"] == ["the disk is full"]


def test_new_refuses_to_overwrite_before_it_reads(command: Any, here: Path) -> None:
    result = command("recipe", "new", "nosuch.txt", "--out", "a.toml")
    assert result.exit_code == 2
    assert "a.toml is there already" in result.stderr
    assert (here / "a.toml").read_text() == ""


def test_new_prints_or_writes(command: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finemoe.runs.planning.starter import Choice, Starter

    starter = Starter((Choice("name", "x", "Because."),), _survey())
    monkeypatch.setattr("finemoe.runs.planning.starter.new_recipe", lambda paths, quiet: starter)
    printed = command("recipe", "new", "x.txt")
    assert 'name = "x"' in printed.stdout
    assert "finemoe train RECIPE --check" in printed.stderr
    written = command("recipe", "new", "x.txt", "--out", "mine.toml")
    assert (written.stdout, (here / "mine.toml").read_text()) == ("", printed.stdout)
    assert "finemoe train mine.toml --check" in written.stderr
    assert json.loads(command("recipe", "new", "x.txt", "--json").stdout)["recipe"] == {"name": "x"}


def _survey() -> Any:
    from finemoe.data.survey import Survey

    return Survey(("x.txt",), {".txt": 1}, 10, 1, 10, 10, 10, None, ("text",))


def test_env_says_what_a_bug_report_needs_and_no_secret(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    cache = tmp_path / "somebody" / "cache"
    (cache / "tokens").mkdir(parents=True)
    (cache / "tokens" / "a.bin").write_bytes(bytes(3000))
    monkeypatch.setenv("FINEMOE_CACHE", str(cache))
    monkeypatch.setenv("FINEMOE_API_TOKEN", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = command("env")
    assert result.exit_code == 0
    for secret in ("hunter2", "hunter3", "somebody"):
        assert secret not in result.stdout
    found = json.loads(command("env", "--json").stdout)
    assert found["variables"] == {
        name: value
        for name, value in found["variables"].items()
        if name.startswith(("FINEMOE_", "OMP", "MKL", "CXX", "TOK"))
    }
    assert found["variables"]["FINEMOE_API_TOKEN"] == "(set)"
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["cache"] == {"folder": "~/cache", "bytes": 3000, "parts": {"tokens": 3000}}
    assert found["packages"]["torch"]
    assert found["processor"]["usable"] >= 1
    assert found["memory"]["total"] > found["memory"]["available"] > 0
    assert "hunter" not in json.dumps(found)


def test_env_goes_on_where_the_cache_cannot_be_listed(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setenv("FINEMOE_CACHE", "/")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", refused)
        result = command("env")
        assert machine.env()["cache"] == {"folder": "/", "unreadable": "Permission denied"}
    assert (result.exit_code, "folder /, unreadable Permission denied" in result.stdout) == (0, True)


def test_env_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEMOE_CACHE", str(tmp_path))
    monkeypatch.setenv("FINEMOE_NATIVE", "0")
    assert machine.env()["native_kernels"] == "switched off by FINEMOE_NATIVE=0"
    monkeypatch.delenv("FINEMOE_NATIVE")
    assert machine.env()["native_kernels"].startswith(("not built yet", "no C++ compiler"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.env()["compiler"] is None


def test_names_to_complete_are_those_that_there_are() -> None:
    assert completion.complete_tasks("") == list(TASKS)
    assert completion._COMPARISON == COMPARISON
    assert completion.complete_preset("tiny-m") == ["tiny-moe"]
    assert completion.complete_preset("") == list(PRESETS)
    tables = {section.name.split(".")[0] for sections in recipe_sections().values() for section in sections}
    assert set(completion.complete_section("")) == {"run", "comparison", *tables} - {""}


def test_tasks_are_completed_after_a_comma_and_not_twice() -> None:
    assert completion.complete_tasks("hellaswag,ar") == ["hellaswag,arc_easy", "hellaswag,arc_challenge"]
    assert "arc_easy,arc_easy" not in completion.complete_tasks("arc_easy,")


def test_recipes_and_runs_are_found_below_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.toml", "recipes/b.toml", "recipes/ladder/v1.toml", ".hidden/c.toml", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("runs/one", "runs/comparison/dense/seed-0", "runs/begun"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    for name in ("runs/one", "runs/comparison/dense/seed-0"):
        (tmp_path / name / "metrics.jsonl").touch()
    assert completion.complete_recipe("") == ["a.toml", "recipes/b.toml", "recipes/ladder/v1.toml"]
    assert completion.complete_recipe("recipes/l") == ["recipes/ladder/v1.toml"]
    assert completion.complete_recipe(f"{tmp_path}/rec")[0] == f"{tmp_path}/recipes/b.toml"
    assert completion.complete_recipe("nosuch/") == []
    assert completion.complete_run("runs/") == ["runs/comparison/dense/seed-0", "runs/one"]
    assert completion.complete_run("runs/o") == ["runs/one"]
    assert completion.complete_model("recipes/b") == ["recipes/b.toml"]
    (tmp_path / "runs" / "comparison" / "compare.json").touch()
    assert completion.complete_resumable("runs/") == ["runs/comparison", "runs/one"]
    assert completion.complete_resumable("runs/comp") == ["runs/comparison"]
    assert completion.complete_resumable("runs/comparison/de") == ["runs/comparison/dense/seed-0"]


COMPLETIONS = {
    "finemoe presets tiny-mo": "tiny-moe",
    "finemoe evaluate runs/x --tasks hella": "hellaswag",
    "finemoe recipe keys sched": "schedule",
    "finemoe recipe k": "keys",
    "finemoe train --che": "--check",
    "finemoe size mini-m": "mini-moe",
    "finemoe resume runs/": "runs/both",
    "finemoe show runs/both": "runs/both",
    "finemoe analyze load runs/both/": "runs/both/one",
    "finemoe analyze difference runs/both/one runs/both/": "runs/both/one",
}


@pytest.mark.parametrize(("typed", "offered"), COMPLETIONS.items())
def test_a_tab_is_answered_without_torch(typed: str, offered: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "both" / "one").mkdir(parents=True)
    for name in ("compare.json", "one/config.json", "one/metrics.jsonl"):
        (tmp_path / "runs" / "both" / name).touch()
    words = typed.split()
    asked = {"_FINEMOE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    code = (
        "import sys\nfrom finemoe.cli.main import main\nsys.argv[:] = ['finemoe']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'pyarrow', 'scipy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert offered in done.stdout.split()
