"""What the tests of this folder begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from methods.tiny_talks import begin, write_pairs
from runs.tiny_runs import corpus

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in miniature, with prediction modules and a bias, and pairs beside it."""
    folder = tmp_path_factory.mktemp("base")
    write_pairs(folder / "pairs.jsonl")
    return begin(corpus, folder, "v3")
