"""`finemoe train` of a recipe with stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.core import config
from runs.tiny_runs import write_corpus
from studies.test_recipe_stages import staged


def test_stages_are_trained_one_after_the_other(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    path = tmp_path / "staged.json"
    path.write_text(json.dumps(staged(corpus)))
    reads, reading = [], config.read_tables
    with monkeypatch.context() as patched:
        patched.setattr(config, "read_tables", lambda path: (reads.append(path), reading(path))[1])
        refused = command("train", path, "--quiet")
    assert reads == [path], "once is enough to see what it is"
    assert refused.exit_code == 2
    assert "say --out DIR" in refused.stderr
    done = command("train", path, "--out", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert "40 of 40 answers kept" in done.stdout
    assert "Next: finemoe show" in done.stdout
    again = command("train", path, "--out", tmp_path / "out", "--json")
    assert [one["stage"] for one in json.loads(again.stdout)["stages"]] == ["base", "answers", "learnt"]
    checked = command("train", path, "--check")
    assert checked.exit_code == 2
    assert "--check one of them alone" in checked.stderr
