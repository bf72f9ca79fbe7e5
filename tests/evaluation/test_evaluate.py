"""`evaluate` from Python: everything that the verb does but the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import VOCAB, opened, tokenizer

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.core.errors import ConfigError, RunError
from finemoe.evaluation.evaluate import evaluate
from finemoe.evaluation.runner import Settings
from finemoe.evaluation.tasks import choose_tasks


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of small random models."""
    made = []
    for seed, name in enumerate(("first", "second")):
        directory = tmp_path_factory.mktemp("runs") / name
        directory.mkdir()
        model = opened(seed=seed).model
        text = json.dumps({"model": model.config.model_dump(mode="json"), "data": {"sequence_length": 24}})
        (directory / "config.json").write_text(text)
        save(directory / "checkpoints", 1, RunState(model.state_dict(), {}, {"step": 1}, text), keep=1)
        tokenizer().save(directory / "tokenizer.json")
        made.append(directory)
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"query": f"the cat {n}", "choices": ["cat", "dog", "mat", "log"], "gold": n % 4} for n in range(6)]
    (tmp_path / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_call_leaves_the_whole_folder(runs: list[Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    found = evaluate(runs, ["hellaswag"], data=data, settings=Settings(limit=5), out=out, quiet=True)
    assert VOCAB == 300
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "results.json", "report.html", "figures", "items", "answers"
    }  # fmt: skip
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert found["command"] == ""  # none was typed
    assert set(found["scores"]) == {"first", "second"}
    assert len(found["differences"]) == 1
    for name in found["scores"]:
        lines = (out / "items" / name / "hellaswag.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 5
    again = evaluate(runs[:1], ["hellaswag"], data={"hellaswag": data}, settings=Settings(limit=5), out=out, quiet=True)
    assert again["scores"]["first"]["hellaswag"]["tokens"] == 0  # every answer was kept


def test_one_model_and_one_task_need_no_list(runs: list[Path], data: Path) -> None:
    listed = evaluate(runs[:1], ["hellaswag"], data=data, settings=Settings(limit=3), quiet=True)
    for tasks in ("hellaswag", "hellaswag, hellaswag"):
        found = evaluate(str(runs[0]), tasks, data=data, settings=Settings(limit=3), quiet=True)
        assert found["scores"]["first"]["hellaswag"]["value"] == listed["scores"]["first"]["hellaswag"]["value"]
    with pytest.raises(ConfigError, match="no task is named 'hellaswga'"):
        evaluate(runs[0], "hellaswga")


def test_without_a_folder_nothing_is_written(runs: list[Path], data: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    evaluate(runs[:1], ["hellaswag"], data=str(data), settings=Settings(limit=2), quiet=True)
    assert sorted(data.rglob("*")) == before


def test_what_cannot_work_is_said_before_a_model_is_read(runs: list[Path], data: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "no model"
    with pytest.raises(ConfigError, match="no task given"):
        evaluate([nowhere], [])
    with pytest.raises(ConfigError, match="no task is named 'hellaswga'"):
        evaluate([nowhere], ["hellaswga"])
    with pytest.raises(ConfigError, match="named twice"):
        evaluate([runs[0], runs[0]], ["hellaswag"], data=data)
    (data / "results.json").write_text('{"kind": "load"}')
    with pytest.raises(RunError, match=r"holds no report of this kind \(evaluation\)"):
        evaluate([nowhere], ["hellaswag"], out=data)


def test_no_model_is_said() -> None:
    with pytest.raises(ConfigError, match="no model to evaluate: name at least one"):
        evaluate([], ["hellaswag"])


def test_several_samples_are_drawn_at_the_papers_temperature_unless_another_is_given() -> None:
    drawn = {
        (samples, heat): choose_tasks(["humaneval"], samples, heat)[0]
        for samples, heat in ((1, None), (5, None), (5, 0.3))
    }
    assert {asked: (task.samples, task.temperature) for asked, task in drawn.items()} == {
        (1, None): (1, 0.0), (5, None): (5, 0.8), (5, 0.3): (5, 0.3)
    }  # fmt: skip
    with pytest.raises(ConfigError, match="does nothing without --samples"):
        choose_tasks(["humaneval"], None, 0.3)
    assert [task.name for task in choose_tasks(["text", "hellaswag", "text"])] == ["text", "hellaswag"]
