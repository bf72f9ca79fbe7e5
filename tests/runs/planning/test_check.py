"""`finemoe.check`: what a run will take is said before it is run, and nothing is left of the asking."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import finemoe
from finemoe.core import memory
from finemoe.core.errors import ConfigError
from finemoe.runs.config import resolve_run
from finemoe.runs.footprint import footprint
from finemoe.runs.planning.check import Check
from finemoe.runs.planning.machine import other_work
from finemoe.runs.planning.pace import Pace
from finemoe.training.trainer import Trainer
from runs.tiny_runs import LENGTH, recipe, steps, write_corpus

TOKENS = 4 * LENGTH


def test_figures_are_those_of_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = recipe(corpus)
    found = finemoe.check(raw, quiet=True)
    assert list(tmp_path.iterdir()) == []  # no run directory, nor anything else
    assert found.refused == ()
    run = finemoe.train(raw, out=tmp_path / "run", quiet=True)
    summary, data = run.summary, json.loads((run.directory / "data.json").read_text())
    assert found.losses == tuple(step["loss"] for step in steps(run.directory))  # its own first steps, bit for bit
    assert (found.steps, found.steps_measured, found.tokens) == (6, 6, summary["tokens"])
    for name in ("total_parameters", "active_parameters"):
        assert getattr(found, name) == summary[name]
    assert (found.training_tokens, found.validation_tokens) == (data["tokens"]["train"], data["tokens"]["validation"])
    assert found.documents == 9
    assert found.vocab_size == data["vocab_size"]
    assert found.passes == found.tokens / data["tokens"]["train"]
    assert found.seconds is not None
    assert found.tokens_per_second is not None
    assert found.validation_seconds is not None
    expected = found.tokens / found.tokens_per_second + found.validations * found.validation_seconds
    assert found.seconds == pytest.approx(expected)
    assert found.validations == 6
    assert (run.directory / "checkpoints").is_dir()


def test_ten_steps_are_measured_and_the_first_do_not_count(corpus: Path) -> None:
    found = finemoe.check(recipe(corpus), overrides=["training.steps=400"], quiet=True)
    assert (found.steps, found.steps_measured, len(found.losses)) == (400, 10, 10)
    assert found.validations == 10
    pace = Pace(lambda _: None, [9.0, 5.0, 1.0, 1.0, 3.0])
    assert pace.seconds_a_step() == 1.0
    assert Pace(lambda _: None, [9.0]).seconds_a_step() == 9.0
    assert Pace(lambda _: None, [9.0, 5.0]).seconds_a_step() == 5.0


@pytest.mark.parametrize(
    ("seconds", "enough"),
    [([], False), ([40.0], False), ([60.0], True), ([40.0, 40.0], True), ([25.0, 25.0], True), ([6.0] * 5, False)],
)
def test_slow_steps_are_not_waited_for(seconds: list[float], enough: bool) -> None:
    """Two steps where they fit, one that is slower than the limit, and no step that would pass it."""
    assert Pace(lambda _: None, seconds).is_enough(60.0) == enough


def test_a_check_says_on_how_many_steps_it_rests(corpus: Path) -> None:
    found = finemoe.check(recipe(corpus), quiet=True, seconds=0.0)
    assert (found.steps_measured, len(found.losses)) == (1, 1)
    assert found.seconds is not None
    assert "measured over 1 step\n" in str(found)
    assert "the time rests on 1 step, which took" in " ".join(str(found).split())
    assert not any("rests on" in note for note in finemoe.check(recipe(corpus), quiet=True).notes)


def test_random_numbers_and_threads_stay_as_they_were(corpus: Path) -> None:
    torch.manual_seed(7)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    try:
        finemoe.check(recipe(corpus), quiet=True, steps=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_memory_is_measured_from_here_on(corpus: Path) -> None:
    once = torch.ones(64 << 20, dtype=torch.float32)  # a quarter of a GiB that is gone before the check
    del once
    found = finemoe.check(recipe(corpus), quiet=True, steps=1)
    assert found.memory_bytes is not None
    assert found.memory_bytes > 10 << 20
    assert found.memory_available_bytes is None or found.memory_available_bytes > 10 << 20
    assert found.checkpoint_copy_bytes == 12 * found.total_parameters


def test_the_cache_is_what_the_run_finds(tmp_path: Path) -> None:
    raw = recipe(write_corpus(tmp_path / "own"))
    finemoe.check(raw, quiet=True, steps=1)
    cache = tmp_path / "own" / "cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert before
    finemoe.check(raw, quiet=True, steps=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_would_be_refused_is_said_all_at_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    overrides = ["data.corpus.paths=['/nowhere/at/all']", "training.trackers=['trackio']"]
    found = finemoe.check(recipe(corpus), out=tmp_path, overrides=overrides, quiet=True)
    assert [word for word in ("is not empty", "trackio", "/nowhere/at/all") if word in " ".join(found.refused)] == [
        "is not empty",
        "trackio",
        "/nowhere/at/all",
    ]
    assert (found.documents, found.tokens_per_second, found.seconds) == (None, None, None)
    assert found.total_parameters > 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "Refused" in str(found)
    assert "the run can start" not in str(found)


def test_a_run_in_the_way_is_refused_and_stays(corpus: Path, tmp_path: Path) -> None:
    raw = recipe(corpus)
    finemoe.train(raw, out=tmp_path / "run", quiet=True)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    found = finemoe.check(raw, out=tmp_path / "run", quiet=True, steps=1)
    assert any("this very run" in refusal for refusal in found.refused)
    assert found.tokens_per_second is not None  # all else is found out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_too_little_text_for_one_batch_is_refused(corpus: Path) -> None:
    found = finemoe.check(recipe(corpus), overrides=[f"training.tokens_per_step={LENGTH * 4096}"], quiet=True)
    assert any("one batch takes 4096" in refusal for refusal in found.refused)


def test_a_run_that_does_not_fit_in_memory_is_refused_unmeasured(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finemoe.core.memory.available_bytes", lambda: 1 << 16)
    found = finemoe.check(recipe(corpus), quiet=True)
    assert len(found.refused) == 1
    assert "GiB of memory" in found.refused[0]
    assert (found.tokens_per_second, found.documents) == (None, 9)


def test_a_loss_that_is_not_finite_is_refused(corpus: Path) -> None:
    found = finemoe.check(recipe(corpus), overrides=["model.init_std=1e30"], quiet=True)
    assert any("is not finite" in refusal for refusal in found.refused)


def test_a_recipe_that_is_none_is_an_error(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `steps`"):
        finemoe.check(recipe(corpus), overrides=["training.stps=3"], quiet=True)


def test_a_signal_ends_it_at_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step; and what SIGTERM does, which is to end the process, stays as it was."""
    before = signal.getsignal(signal.SIGTERM)
    reached: list[str] = []

    def step(self: Trainer, batches: Any, started: float | None = None) -> None:
        reached.append("a step" if signal.getsignal(signal.SIGTERM) == before else "a handler")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        reached.append("its end")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        finemoe.check(recipe(corpus), quiet=True)
    assert reached == ["a step"]


def test_the_report_is_within_80_columns_and_json(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 1.0, 1.0))
    found = finemoe.check(recipe(corpus), quiet=True, steps=3)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("9 documents", "tokens/s, measured over 3 steps", "6 validations", "Memory", "can start", "load 99.0"):
        assert part in " ".join(text.split())
    assert ("OMP_WAIT_POLICY=passive" in text) == (torch.get_num_threads() > 1)
    assert json.loads(json.dumps(found.to_dict()))["passes"] == found.passes
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 99.0, 99.0))
    assert other_work() is None


def test_a_check_that_found_nothing_out_still_prints() -> None:
    bare: dict[str, Any] = {"total_parameters": 1, "active_parameters": 1, "steps": 1, "tokens": 1}
    assert "Refused     no" in str(Check("x", ("no",), **bare))


def test_a_run_of_several_processes_is_told_what_each_takes(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure by which the run would be refused; measured is what one process can."""
    raw = recipe(corpus, parallel={"shard": 8}, model={"hidden_size": 512, "num_layers": 12})
    raw["training"]["tokens_per_step"] = 8 * LENGTH
    raw["data"]["max_validation_tokens"] = LENGTH
    found = finemoe.check(raw, quiet=True, steps=1)
    config = resolve_run(raw, "test")
    needed = footprint(config, layout=config.parallel.layout(8)).needed
    assert (found.layout, found.process_bytes) == ("shard 8", needed)
    assert "shard 8: each takes about" in str(found)
    assert found.steps_measured == 1
    assert not found.refused
    alone, share = footprint(config).needed, needed + footprint(config).copy
    assert share < alone
    monkeypatch.setattr(memory, "available_bytes", lambda: share)
    unmeasured = finemoe.check(raw, quiet=True, steps=1)
    assert not unmeasured.refused
    assert unmeasured.steps_measured == 0
    assert any("one process alone cannot hold all" in note for note in unmeasured.notes)
    monkeypatch.setattr(memory, "available_bytes", lambda: share - 1)
    assert any("GiB are available" in said for said in finemoe.check(raw, quiet=True, steps=1).refused)


def test_where_shard_is_left_out_the_fewest_processes_are_checked(corpus: Path) -> None:
    """As many as torchrun will start take their share; a check does not know how many those are."""
    found = finemoe.check(recipe(corpus, "v3", parallel={"expert": 2}), quiet=True, steps=1)
    assert not found.refused
    assert found.layout == "shard 2, expert 2"
