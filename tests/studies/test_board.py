"""The live picture of a study's runs: lines of 80 columns on a terminal, plain ones on a pipe."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finemoe.runs.config import resolve_run
from finemoe.studies import fleet
from finemoe.studies.fleet import Job, _Board, _newest, ended
from runs.tiny_runs import recipe

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SUMMARY = dict.fromkeys(("steps", "tokens", "seconds", "tokens_per_second", "total_parameters", "active_parameters"), 6)
STEP = {"kind": "step", "step": 3, "tokens": 300, "seconds": 1.0, "loss": 4.5, "tokens_per_second": 12_345.0}
VALIDATION = {"kind": "validation", "step": 2, "tokens": 200, "seconds": 1.0, "validation_loss": 5.25}


def jobs(corpus: Path, folder: Path, names: list[str]) -> list[Job]:
    made = []
    for name in names:
        (folder / name).mkdir()
        made.append(Job(name, resolve_run(recipe(corpus, "dense"), name), folder / name))
    return made


def write(job: Job, *records: dict[str, Any]) -> None:
    (job.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_terminal_shows_every_active_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(fleet, "console", lambda: Console(file=screen, force_terminal=True, width=80))
    ended, active, waiting = jobs(corpus, tmp_path, ["ended", "a-run-with-quite-a-long-name", "waiting"])
    (ended.directory / "summary.json").write_text(json.dumps(SUMMARY))
    write(active, VALIDATION, STEP)
    board = _Board([ended, active, waiting], "comparing", quiet=False)
    board.refresh([active, waiting])
    assert board._progress is not None
    board._progress.refresh()
    board.refresh([waiting])
    board._progress.refresh()
    board.close()
    lines = [line.rstrip() for line in re.split(r"[\r\n]", ESCAPES.sub("", screen.getvalue())) if line.strip()]
    assert max(map(len, lines)) <= 80
    shown = [line for line in lines if line.startswith("a-run-with") and "4.500 val 5.250 12.3k/s" in line]
    assert any(" 50%" in line for line in shown)  # step 3 of 6
    assert any(line.startswith("waiting") and "starting" in line for line in lines)
    assert any(line.startswith("comparing") and " 50%" in line for line in lines)  # one and a half of three
    last = len(lines) - 1 - next(i for i, line in enumerate(reversed(lines)) if line.startswith("comparing"))
    assert not any(line.startswith("a-run-with") for line in lines[last:])


def test_a_pipe_hears_now_and_then(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet, "_PLAIN_SECONDS", 0.0)
    [one, two] = jobs(corpus, tmp_path, ["one", "two"])
    write(one, STEP)
    board = _Board([one, two], "comparing", quiet=False)
    with caplog.at_level(logging.INFO, "finemoe"):
        board.refresh([one, two])
    assert re.search(r"comparing 25 %, \d+ s left: one +4\.500 val   -   12\.3k/s; two +starting", caplog.text)
    caplog.clear()
    with caplog.at_level(logging.INFO, "finemoe"):
        _Board([one, two], "comparing", quiet=True).refresh([one, two])
    assert caplog.text == ""


def test_the_newest_of_a_file_whose_last_line_is_torn(corpus: Path, tmp_path: Path) -> None:
    [job] = jobs(corpus, tmp_path, ["one"])
    assert _newest(job) == {}
    write(job, {**STEP, "step": 1}, VALIDATION, STEP)
    with (job.directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    found = _newest(job)
    assert (found["step"], found["loss"], found["validation_loss"]) == (3, 4.5, 5.25)


def test_a_process_without_a_word_is_spoken_for() -> None:
    assert "memory" in ended(-9)
    assert ended(-15) == "was ended by signal 15"
    assert ended(3) == "ended with exit status 3"
