"""A run directory with a random model, and ways to call the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.cli.main import app
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer

Command = Callable[..., Any]


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    directory.mkdir()
    config = expand(resolve({"preset": "tiny-moe", "vocab_size": 300, "init_std": 0.08}, "test"))
    model = Transformer(config)
    initialize(model, seed=1)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": 64}})
    (directory / "config.json").write_text(text)
    save(directory / "checkpoints", 1, RunState(model.state_dict(), {}, {"step": 1}, text), keep=1)
    Tokenizer.train(["def main():\n    return 1\n"] * 5, vocab_size=290).save(directory / "tokenizer.json")
    return directory


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a verb in this process, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str | Path, text: str | None = None) -> Any:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with an empty recipe `a.toml` and the beginning of a run `x`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").touch()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").touch()
    return tmp_path


@pytest.fixture
def process() -> Command:
    """Run a verb in a process of its own, from its first line on."""

    def call(*arguments: str | Path, input: str | None = None) -> Any:
        words = [sys.executable, "-m", "finemoe", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, input=input)

    return call
