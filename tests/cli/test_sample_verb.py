"""`finemoe sample`: what it writes and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_it_says_what_was_kept_and_why_the_rest_was_not(
    run_directory: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "main", "answer": "no"}\n{"prompt": "return", "answer": "no"}\n')
    options = ("--n", 2, "--keep", "answer", "--max-new-tokens", 4, "--quiet")
    done = command("sample", run_directory, asked, "--out", out, *options)
    assert done.exit_code == 0, done.output
    assert "2 prompts, 4 completions" in done.stdout
    assert "Kept                 0 (0%)" in done.stdout
    assert "did not end" in done.stdout
    assert "Next" not in done.stdout
    assert out.read_text() == ""


def test_json_says_the_same(run_directory: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    asked.write_text('{"prompt": "main"}\n')
    done = command("sample", run_directory, asked, "--out", out, "--max-new-tokens", 8, "--json", "--quiet")
    found = json.loads(done.stdout)
    assert (found["prompts"], found["drawn"], found["kept"]) == (1, 1, len(out.read_text().splitlines()))


def test_what_cannot_be_is_one_sentence(tmp_path: Path, command: Callable[..., Any]) -> None:
    done = command("sample", tmp_path / "nothing", "asked.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.exit_code == 2
    assert "there is nothing here" in done.stderr
