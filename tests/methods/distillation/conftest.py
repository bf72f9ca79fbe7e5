"""One teacher and one student for all tests of a process; nobody changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finemoe.checkpoint.language_model import LanguageModel, open_language_model
from finemoe.runs.run import train
from methods.distillation.tiny_pairs import distilling, write_conversations, write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`corpus`, `teacher`, `student`, `chats`."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def teacher(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """It was taught to answer, and so to end."""
    raw = distilling(models, "teacher", training={"steps": 60, "checkpoint_every": 60, "evaluate_every": 60})
    raw["method"] = {"kind": "sft"}
    folder = tmp_path_factory.mktemp("taught") / "run"
    return open_language_model(train(raw, out=folder, quiet=True).directory)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Eight sums, with answers."""
    return write_conversations(tmp_path / "asked.jsonl", 8, seed=3)
