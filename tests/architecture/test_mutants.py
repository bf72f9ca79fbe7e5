"""The list of mutants fits the code, and what runs it tells a survivor from a kill; `make mutants` runs them all."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "mutants"
SEEDS = "core/seeds.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants_run"] = module
    spec.loader.exec_module(module)
    return module


runner: Any = load()
LINE = next(
    line.strip()
    for line in (runner.ROOT / runner.PACKAGE / SEEDS).read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("return ")
)


def entry(name: str, now: str, **changes: str) -> str:
    fields = {"name": name, "file": SEEDS, "was": LINE, "now": now, "why": "a test", **changes}
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["[[mutant]]", *lines, 'tests = ["test_core_seeds.py"]', ""])


def test_every_mutant_has_its_line_and_its_tests() -> None:
    mutants = runner.read_list(FOLDER / "mutants.toml")
    assert len(mutants) >= 60
    assert runner.check(mutants) == []


def pretend(monkeypatch: pytest.MonkeyPatch, status: dict[str, int | None]) -> list[Path]:
    """Instead of tests: the exit status that belongs to what stands in the copy."""
    copies: list[Path] = []

    def pytest_of(copy: Path, tests: Sequence[str], deadline: float) -> tuple[int | None, str]:
        copies.append(copy)
        text = (copy / runner.PACKAGE / SEEDS).read_text(encoding="utf-8")
        found = next((value for word, value in status.items() if word in text), 0)
        return found, "FAILED tests/core/test_core_seeds.py::test_it[a] - assert\n" if found == 1 else ""

    monkeypatch.setattr(runner, "_pytest", pytest_of)
    return copies


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_survivor_is_named_and_the_exit_status_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    names = {"dies": 1, "hangs": None, "lives": 0}
    (tmp_path / "list.toml").write_text("".join(entry(name, f"return '{name}'") for name in names))
    copies = pretend(monkeypatch, {f"'{name}'": status for name, status in names.items()})
    before = (runner.ROOT / runner.PACKAGE / SEEDS).read_bytes()
    options = ["--list", str(tmp_path / "list.toml"), "--jobs", jobs, "--json", str(tmp_path / "out.json")]
    assert runner.main(options) == 1
    outcomes = {one["name"]: (one["killed"], one["by"]) for one in json.loads((tmp_path / "out.json").read_text())}
    assert outcomes == {
        "dies": (True, "test_core_seeds.py::test_it"),
        "hangs": (True, "deadline"),
        "lives": (False, ""),
    }
    out = capsys.readouterr().out
    assert "SURVIVED: lives" in out
    assert "2 of 3 killed" in out
    assert max(len(line) for line in out.split("SURVIVED: ")[0].splitlines()) <= 80
    assert len(copies) == 4  # and once without a mutant
    assert not any(copy.is_relative_to(runner.ROOT) or copy.exists() for copy in copies)
    assert (runner.ROOT / runner.PACKAGE / SEEDS).read_bytes() == before


def test_all_killed_is_a_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text(entry("dies", "return 'dies'") + entry("lives", "return 'lives'"))
    pretend(monkeypatch, {"'dies'": 1})
    assert runner.main(["--list", str(tmp_path / "list.toml"), "--only", "dies"]) == 0


def test_tests_that_fail_anyhow_are_no_kill(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.toml").write_text(entry("dies", "return 'dies'"))
    pretend(monkeypatch, {"": 1})
    assert runner.main(["--list", str(tmp_path / "list.toml")]) == 2
    assert "fail without any mutant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"was": "return nothing"}, "0 times in core/seeds.py"),
        ({"was": ""}, r"\d+ times in core/seeds.py"),
        ({"file": "core/none.py"}, "0 times in core/none.py"),
        ({"now": "return ("}, "is no Python"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    (tmp_path / "list.toml").write_text(entry("one", **{"now": "return 1", **changes}))
    assert runner.main(["--list", str(tmp_path / "list.toml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_names_occur_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.toml").write_text(entry("one", "return 1") * 2)
    assert runner.main(["--list", str(tmp_path / "list.toml")]) == 2
    assert "occur twice: one" in capsys.readouterr().err
