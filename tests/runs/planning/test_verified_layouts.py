"""Which layouts `finemoe verify-parallel` runs: the usual ones, and the recipe's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.errors import ConfigError
from finemoe.runs.planning import layouts
from finemoe.runs.planning.layouts import _Done, verify_parallel
from runs.tiny_runs import recipe


def verified(corpus: Path, monkeypatch: pytest.MonkeyPatch, processes: int, **parallel: Any) -> dict[str, bool]:
    """Layouts in order, and whether each is the recipe's own; nothing is trained."""
    done = _Done([2.0], [1.0], [{"1": [3, 1]}], {"w": torch.tensor([0.5], dtype=torch.float64)}, 0.1)
    monkeypatch.setattr(layouts, "_run", lambda *given: done)
    raw = recipe(corpus, "v3", training={"steps": 2, "tokens_per_step": 256})
    found = verify_parallel({**raw, "parallel": parallel}, processes=processes)
    return {check.layout: check.own for check in found}


def test_the_recipes_own_layout_is_run_too(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "finemoe")
    usual = verified(corpus, monkeypatch, 2)
    assert not any(usual.values())
    assert "one process is compared with: replicate 2; shard 2; shard 2, expert 2" in caplog.text
    assert verified(corpus, monkeypatch, 2, shard=2) == {**usual, "shard 2": True}, "it is one of them"
    caplog.clear()
    with_own = verified(corpus, monkeypatch, 4, replicate=4, shard=1)
    assert [layout for layout, own in with_own.items() if own] == ["replicate 4"]
    assert list(with_own)[-1] == "replicate 4"
    assert "replicate 4 (the recipe's own)" in caplog.text


def test_one_that_is_too_large_for_the_machine_is_named(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "finemoe")
    found = verified(corpus, monkeypatch, 2, replicate=4, shard=2)
    assert not any(found.values())
    said = "own layout, replicate 4, shard 2, is not among them: it takes 8 processes, and 2 at most are tried"
    assert said in caplog.text
    assert "--processes 8 runs it too" in caplog.text
    caplog.clear()
    assert not any(verified(corpus, monkeypatch, 4, shard=3).values())
    assert "the recipe cannot be trained by it" in caplog.text
    with pytest.raises(ConfigError, match="does not divide shard x context = 2"):
        verified(corpus, monkeypatch, 2, shard=2, expert=3)
