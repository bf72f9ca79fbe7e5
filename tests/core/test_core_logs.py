"""Metric files: one record a line, and what a kill leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finemoe.core import logs
from finemoe.core.logs import JsonLines, progress, read_json_lines


def test_records_come_back_in_order_across_reopening(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for start in (0, 2):
        lines = JsonLines(path)
        lines.write({"step": start})
        lines.write({"step": start + 1, "name": "é"})
        lines.close()
    assert [record["step"] for record in read_json_lines(path)] == [0, 1, 2, 3]


def test_a_record_is_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"step": 1})
    assert read_json_lines(lines.path) == [{"step": 1}]
    lines.close()


@pytest.mark.parametrize("cut", range(1, len('{"step": 2, "name": "é"}'.encode()) + 1))
def test_a_file_cut_anywhere_in_its_last_line_keeps_the_others(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    whole = b'{"step": 1}\n'
    path.write_bytes(whole + '{"step": 2, "name": "é"}\n'.encode()[:cut])
    assert read_json_lines(path)[:1] == [{"step": 1}]


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b'{"a": "\xc3', b'{"step": 2}'])
def test_writing_goes_on_after_a_torn_last_line(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    lines = JsonLines(path)
    lines.write({"step": 3})
    lines.close()
    steps = [record["step"] for record in read_json_lines(path)]
    assert steps[0] == 1
    assert steps[-1] == 3


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_json_lines(path)


def test_progress_on_a_pipe_yields_a_counter(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", 10, "files") as advance:
        advance(3)
        advance(7)
    assert capsys.readouterr().out == ""  # results go to standard output, progress never


def test_what_is_said_twice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with logs.each_once():
        for number in (1, 2, 1):
            logs.logger.warning("said %d", number)
    logs.logger.warning("said 1")
    assert [one.getMessage() for one in caplog.records] == ["said 1", "said 2", "said 1"]
    caplog.clear()
    with logs.each_once("said"):
        for word in ("said", "told", "said", "told"):
            logs.logger.warning("%s so", word)
    assert caplog.messages == ["said so", "told so", "told so"], "of what begins so"
