"""GRPO until so many tokens are read: its answers are short, so that it takes more steps than their nominal length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.methods.grpo.rollouts import Rollouts
from finemoe.runs.run import resume, train
from methods.grpo.tiny_policy import LENGTH, base, practising
from methods.tiny_talks import weights
from runs.tiny_runs import steps

NOMINAL = 8 * LENGTH
METHOD = {"steps_per_rollout": 2, "inner_epochs": 2, "replay": "update"}
OFTEN = {"evaluate_every": 20, "checkpoint_every": 2}


def test_it_reads_as_many_tokens_as_it_may_to_the_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run of as many steps, and after a kill inside of a rollout; raised, it learns from the same rollout on."""
    start = base(corpus, tmp_path)
    most = 2 * NOMINAL

    def bounded(tokens: int, **training: Any) -> dict[str, Any]:
        return practising(start, METHOD, training={"steps": 60, "max_tokens": tokens, **OFTEN, **training})

    run = train(bounded(most), out=tmp_path / "run", quiet=True)
    read = [one["tokens"] for one in steps(run.directory)]
    assert read[-2] < most <= read[-1] == run.summary["tokens"]
    assert 2 < len(read) == run.summary["steps"] < 60
    flops = run.summary["training_flops"] / run.summary["tokens"]
    plain = train(practising(start, METHOD, training={"steps": len(read), **OFTEN}), out=tmp_path / "plain", quiet=True)
    assert plain.summary["training_flops"] == flops * read[-1]
    _assert_same(plain.directory, run.directory)
    real = Rollouts.batch

    def torn(self: Rollouts, position: int, num: int) -> Any:
        if position >= 3 * 8:
            raise KeyboardInterrupt
        return real(self, position, num)

    with monkeypatch.context() as patched:
        patched.setattr(Rollouts, "batch", torn)
        with pytest.raises(KeyboardInterrupt):
            train(bounded(most), out=tmp_path / "torn", quiet=True)
    assert resume(tmp_path / "torn", quiet=True).summary["tokens"] == read[-1]
    _assert_same(run.directory, tmp_path / "torn")
    longer = train(bounded(most + 200), out=tmp_path / "longer", quiet=True)
    again = resume(run.directory, overrides=[f"training.max_tokens={most + 200}"], quiet=True)
    assert again.summary["steps"] == longer.summary["steps"] > len(read)
    _assert_same(longer.directory, run.directory)


def _assert_same(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [(step["loss"], step["tokens"]) for step in steps(one)] == [
        (step["loss"], step["tokens"]) for step in steps(other)
    ]
    assert (one / "rollouts.jsonl").read_text() == (other / "rollouts.jsonl").read_text()
