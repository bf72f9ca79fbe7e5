"""The page on distillation can be followed: its program, recipes and commands, in their order, each cut short."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finemoe.cli.main import app

PAGE = Path(__file__).parents[3] / "docs/howto/distil-a-model.md"
RECIPES = ("teacher", "student-base", "distilled", "taught")
"""In the order in which the page has them; each is named before it comes."""
ENOUGH = 200
"""Sums, so that a step has what it takes."""


def test_the_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    recipes = [text for kind, text in blocks if kind == "toml"]
    for name, text in zip(RECIPES, recipes, strict=True):
        assert page.index(f"`{name}.toml`") < page.index(text)
        Path(f"{name}.toml").write_text(text)
    (program,) = (text for kind, text in blocks if kind == "python")
    exec(program, {})
    sums = Path("sums.jsonl").read_text().splitlines(keepends=True)
    assert len(sums) == 900
    assert {**json.loads(sums[0]), "answer": ""}.keys() == {"question", "answer"}
    Path("sums.jsonl").write_text("".join(sums[:ENOUGH]))
    commands = [line for kind, text in blocks if not kind for line in text.splitlines() if line.startswith("finemoe ")]
    made = []
    for command in commands:
        _, *words = shlex.split(command)
        # so short a teacher gives no right answer
        short = ["--set", "training.steps=2"] if words[0] == "train" else ["--keep", "all", "--max-new-tokens", "2"]
        done = CliRunner().invoke(app, [*words, *short, "--quiet"])
        assert done.exit_code == 0, (command, done.output)
        made.append(words[words.index("--out") + 1])
    assert made == [f"runs/{name}" for name in ("teacher", "student-base", "distilled", "kept", "own")] + [
        "right.jsonl",
        "runs/taught",
    ]
    assert all(Path(path).exists() for path in made)
