"""One teacher and one student for all tests of a process; nobody changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from methods.distillation.tiny_pairs import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`corpus`, `teacher`, `student`, `chats`."""
    return write_models(tmp_path_factory.mktemp("models"))
