"""The verb from end to end: tables, JSON, resuming, and mistakes answered in one plain message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

TASKS = ("--tasks", "hellaswag,text")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "sets"
    folder.mkdir()
    words = ("def main():", "    return 1", "def a(", "return", "main")
    rows = [
        {"query": f"{word} {number}", "choices": ["return 1", "main()", "def", "11"], "gold": number % 4}
        for number, word in enumerate(words * 2)
    ]
    lines = [json.dumps(row) for row in rows] + ["not json"]
    (folder / "hellaswag_val.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [{"text": "def main():\n    return 1\n" * count} for count in (1, 3, 9)]
    (folder / "held.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return folder


def options(data: Path) -> tuple[Any, ...]:
    return (*TASKS, "--data", data, "--data", f"text={data / 'held.jsonl'}", "--quiet")


def test_a_table_of_80_columns_and_the_same_as_json(command: Any, run_directory: Path, data: Path) -> None:
    shown = command("evaluate", run_directory, *options(data))
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for word in ("hellaswag", "acc norm", "25.0 %", "text", "bits/byte", "±"):
        assert word in shown.stdout
    found = json.loads(command("evaluate", run_directory, *options(data), "--json").stdout)
    (scores,) = found["scores"].values()
    assert scores["hellaswag"]["n"] == 10
    assert scores["hellaswag"]["skipped"] == 1
    assert scores["text"]["n"] == 3
    assert found["schema"] == 1
    assert found["settings"]["batch"] == 16
    for metric in scores["hellaswag"]["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]


def test_no_certainty_is_claimed_where_nothing_was_right(command: Any, run_directory: Path, tmp_path: Path) -> None:
    rows = [{"text": f"def number_{n} zebra{n}"} for n in range(2)]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = command("evaluate", run_directory, "--tasks", "lambada", "--data", tmp_path, "--quiet").stdout
    assert "0.0 (≤ 65.8) %" in shown
    assert "± 0.0" not in shown
    assert "the end of the 95 %" in shown


def test_a_folder_keeps_answers_and_the_report(command: Any, run_directory: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    first = command("evaluate", run_directory, *options(data), "--out", out)
    assert first.exit_code == 0
    assert {path.name for path in out.iterdir()} >= {"results.json", "report.html", "figures", "items", "answers"}
    assert (out / "figures" / "scores.svg").exists()
    before = json.loads((out / "results.json").read_text(encoding="utf-8"))
    command("evaluate", run_directory, *options(data), "--batch", "1", "--out", out)
    after = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (name,) = before["scores"]
    for task in ("hellaswag", "text"):
        old, new = before["scores"][name][task], after["scores"][name][task]
        assert new["reused_answers"] > 0
        assert new["tokens"] == 0
        assert new["metrics"] == old["metrics"]
    items = out / "items" / name / "hellaswag.jsonl"
    assert len(items.read_text(encoding="utf-8").splitlines()) == 10


def test_two_models_are_compared_item_by_item(command: Any, run_directory: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    shutil.copytree(run_directory, other)
    shown = command("evaluate", run_directory, other, *options(data))
    assert shown.exit_code == 0
    assert "undecided" in shown.stdout  # the same weights
    found = json.loads(command("evaluate", run_directory, other, *options(data), "--json").stdout)
    assert [pair["value"] for pair in found["differences"]] == [0.0, 0.0]
    assert set(found["scores"]) == {"tiny", "copy"}


def test_the_prompt_is_shown_without_a_model(command: Any, data: Path) -> None:
    shown = command("evaluate", "--show", "--tasks", "hellaswag", "--data", data)
    assert shown.exit_code == 0
    assert "def main(): 0" in shown.stdout
    as_json = json.loads(command("evaluate", "--show", "--tasks", "hellaswag", "--data", data, "--json").stdout)
    assert as_json["hellaswag"] in shown.stdout
    assert "' return 1'" in shown.stdout


def test_the_list_names_every_task(command: Any) -> None:
    from finemoe.evaluation.tasks import TASKS as known

    shown = command("evaluate", "--list")
    assert all(name in shown.stdout for name in known)
    assert {row["task"] for row in json.loads(command("evaluate", "--list", "--json").stdout)} == set(known)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("MODEL",), "no task given"),
        (("--tasks", "hellaswag"), "no model given"),
        (("MODEL", "--tasks", "helaswag"), "hellaswag"),
        (("MODEL", "--tasks", "hellaswag", "--data", "mmlu=DATA"), "not among the tasks asked"),
        (("MODEL", "--tasks", "hellaswag", "--data", "DATA", "--data", "DATA"), "only one place"),
        (("MODEL", "--tasks", "hellaswag", "--data", "nowhere"), "nowhere"),
        (("MODEL", "--tasks", "hellaswag", "--data", "DATA", "--samples", "4"), "code"),
        (("MODEL", "--tasks", "hellaswag", "--data", "DATA", "--temperature", "1"), "--samples"),
        (("MODEL", "--tasks", "hellaswag", "--data", "DATA", "--batch", "0"), "--batch"),
        (("MODEL", "--tasks", "text", "--data", "DATA", "--limit", "-1"), "--limit is -1"),
        (("MODEL", "--tasks", "hellaswag", "--data", "DATA", "--shots", "-1"), "--shots is -1"),
        (("MODEL", "--tasks", "text", "--data", "text=gone", "--data", "text=away"), "only one place for a task"),
        (("MODEL", "MODEL", "--tasks", "hellaswag", "--data", "DATA"), "named twice"),
        (("gone", "--tasks", "hellaswag", "--data", "DATA"), "gone"),
    ],
)
def test_mistakes_are_answered_plainly(
    command: Any, run_directory: Path, data: Path, arguments: tuple[str, ...], said: str, capsys: Any
) -> None:
    filled = [str(run_directory) if a == "MODEL" else a.replace("DATA", str(data)) for a in arguments]
    result = command("evaluate", *filled)
    assert result.exit_code == 2
    message = result.stderr + capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


@pytest.mark.parametrize("missing", ["lambada", "infilling"])
def test_what_a_later_task_lacks_is_said_before_any_work(
    command: Any, run_directory: Path, data: Path, tmp_path: Path, missing: str, capsys: Any
) -> None:
    (data / "held.py").write_text("def main():\n    return number_of_things\n", encoding="utf-8")
    out = tmp_path / "eval"
    result = command(
        "evaluate", run_directory, "--tasks", f"hellaswag,{missing}", "--data", data, "--out", out, "--quiet"
    )
    assert result.exit_code == 2
    said = {"lambada": "no file whose name is this set's", "infilling": "infilling: the model's tokenizer has no fill"}
    assert said[missing] in result.stderr + capsys.readouterr().err
    assert not (out / "answers").exists()


def test_where_no_code_can_be_run_that_is_said_before_any_work(
    command: Any, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from finemoe.sandbox import sandbox

    monkeypatch.setattr(sandbox, "supported", lambda: "the sandbox needs another system")
    problem = {"task_id": "a/0", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(problem) + "\n", encoding="utf-8")
    result = command("evaluate", run_directory, "--tasks", "humaneval", "--data", tmp_path, "--quiet")
    assert result.exit_code == 2
    assert "humaneval: the sandbox needs another system" in result.stderr + capsys.readouterr().err
