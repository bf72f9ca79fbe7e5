"""A report is whole from Python alone: each function measures and leaves results, page and figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from finemoe.analysis import reports
from finemoe.charts.numbers import clean
from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.cli.main import app
from finemoe.core.errors import ConfigError, RunError
from finemoe.text.tokenizer import Tokenizer
from oracles.models import build, small_config

TEXT = "the cat sat on the mat and the dog sat on the log. " * 12
REPORTS: dict[str, Callable[..., dict[str, Any]]] = {
    "load": lambda run, **how: reports.load([run], **how),
    "knockout": lambda run, **how: reports.knockout(run, ["active", "layers"], **how),
    "experts": lambda run, **how: reports.experts(run, **how),
    "difference": lambda run, **how: reports.difference(run, run, **how),
    "relevance": lambda run, **how: reports.relevance(run, **how),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two checkpoints of a small random model."""
    directory = tmp_path_factory.mktemp("runs") / "small"
    directory.mkdir()
    config = small_config(vocab_size=300)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 16}})
    (directory / "config.json").write_text(text)
    for step in (1, 2):
        state = RunState(build(config, step).state_dict(), {}, {"step": step}, text)
        save(directory / "checkpoints", step, state, keep=2)
    Tokenizer.train([TEXT], 300).save(directory / "tokenizer.json")
    return directory


@pytest.mark.parametrize("name", REPORTS)
def test_a_call_leaves_the_whole_folder(name: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / name
    results = REPORTS[name](run, texts=[TEXT], tokens=60, out=out)
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(clean(results)))
    assert results["kind"] == name
    assert results["command"] == ""  # none was typed
    assert "This file needs no network." in (out / "report.html").read_text(encoding="utf-8")
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".png"}
    beside = {"together.npz"} if name == "load" else set()
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", "figures"} | beside
    REPORTS[name](run, texts=[TEXT], tokens=60, out=str(out))  # the same again may be written over


@pytest.mark.parametrize("name", REPORTS)
def test_without_a_folder_nothing_is_written(name: str, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert REPORTS[name](run, texts=[TEXT], tokens=60)["kind"] == name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", REPORTS)
def test_a_folder_of_something_else_is_refused_before_anything_is_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kind": "another"}')
    with pytest.raises(RunError, match=rf"holds no report of this kind \({name}\)"):
        REPORTS[name](tmp_path / "there is no such run", out=tmp_path)


def test_an_unknown_experiment_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `masked`"):
        reports.knockout(tmp_path / "there is no such run", ["maskd"])


def test_a_selection_is_written_for_expert_tuning(run: Path, tmp_path: Path) -> None:
    found = reports.relevance(run, texts=[TEXT], tokens=60, p=0.4, selection=tmp_path / "selection.json")
    assert json.loads((tmp_path / "selection.json").read_text()) == json.loads(json.dumps(found["selection"]))


def test_a_selection_takes_the_place_of_an_older_one_and_of_nothing_else(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "new" / "selection.json"
    for p in (0.4, 0.9):
        found = reports.relevance(run, texts=[TEXT], tokens=60, p=p, selection=place)
        assert json.loads(place.read_text())["p"] == found["selection"]["p"] == p
    for content in (b'{"text": "precious"}\n', b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "task.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=r"task.jsonl holds something else, which is not written over"):
            reports.relevance(tmp_path / "no such run", selection=tmp_path / "task.jsonl")
        assert (tmp_path / "task.jsonl").read_bytes() == content
    with pytest.raises(ConfigError, match="is a folder, and a selection is a file"):
        reports.relevance(tmp_path / "no such run", selection=tmp_path)


@pytest.mark.parametrize("name", REPORTS)
def test_batches_of_nothing_are_refused(name: str, run: Path) -> None:
    with pytest.raises(ConfigError, match="a batch of 0 windows cannot be read"):
        REPORTS[name](run, texts=[TEXT], tokens=60, rows=0)


@pytest.mark.parametrize("name", REPORTS)
def test_windows_of_nothing_are_refused(name: str, run: Path) -> None:
    with pytest.raises(ConfigError, match="length 0 must both be at least 1"):
        REPORTS[name](run, texts=[TEXT], tokens=60, length=0)


def test_every_verb_of_analyze_is_a_function_here() -> None:
    verbs: Any = get_command(app)
    # what lies on which device is asked of a load and not of a model, and has tests of its own
    assert set(verbs.commands["analyze"].commands) == {*REPORTS, "placement"} == set(reports.REPORTS)
    assert all(callable(vars(reports)[name]) for name in REPORTS)
