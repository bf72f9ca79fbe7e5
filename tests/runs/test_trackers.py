"""Mirrors of metrics.jsonl, with stand-ins for their packages."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from finemoe.core.errors import ConfigError
from finemoe.runs.trackers import TRACKERS, open_tracker

RECORD = {"kind": "step", "step": 7, "loss": 2.5, "terms": {"expert": 0.01}, "load": {"0": [1, 2]}}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_scalars_are_logged_under_their_kind(name, monkeypatch, tmp_path):
    calls: dict = {}
    module = SimpleNamespace(
        init=lambda **options: calls.update(init=options),
        log=lambda values, step: calls.update(values=values, step=step),
        finish=lambda: calls.update(finished=True),
    )
    monkeypatch.setitem(sys.modules, name, module)
    tracker = open_tracker(name, tmp_path / "run-1", {"seed": 3})
    tracker.write(RECORD)
    tracker.close()
    assert calls["init"] == {"project": "finemoe", "name": "run-1", "config": {"seed": 3}}
    assert calls["values"] == {"step/step": 7, "step/loss": 2.5, "step/terms/expert": 0.01}
    assert calls["step"] == 7
    assert calls["finished"]


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_package_is_named_with_the_extra(name, monkeypatch, tmp_path):
    blocked = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed.*\[track\]"):
        open_tracker(name, tmp_path, {})
