"""Runs whose answers come from a server: they train as with the engine in process, and survive the server's end."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finemoe.core.errors import ConfigError, OutageError, RunError
from finemoe.runs.planning.check import check
from finemoe.runs.run import resume, train
from methods.grpo.tiny_policy import base, practising
from methods.grpo.tiny_servers import between, serving
from methods.tiny_talks import weights
from runs.tiny_runs import steps
from server.conftest import Live

COMPLETE, RENEW = "/v1/completions", "/update_weights_from_disk"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return base(corpus, tmp_path_factory.mktemp("served-runs"))


@pytest.fixture(scope="module")
def live(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(start, tmp_path_factory.getbasetemp()) as server:
        yield server


def recipe(start: Path, address: str | None, server: dict[str, Any] | None = None, **method: Any) -> Any:
    """Four steps, two on each rollout."""
    if address is not None:
        method["server"] = {"url": address, "patience_seconds": 0.3, **(server or {})}
    length = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 4, "evaluate_every": 4}
    return practising(start, {"inner_epochs": 2, "keep_rollouts": 1, **method}, training=length)


@pytest.fixture(scope="module")
def alone(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the engine in process."""
    return train(recipe(start, None), out=tmp_path_factory.mktemp("alone") / "run", quiet=True).directory


@pytest.fixture(scope="module")
def served(start: Path, live: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by a server, which is gone when it has ended."""
    with between(live.address) as gate:
        out = tmp_path_factory.mktemp("served") / "run"
        return train(recipe(start, gate.address), out=out, quiet=True).directory


def answers(run: Path) -> list[list[int]]:
    found = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    return [one["completion_ids"] for one in found if one["kind"] == "answer"]


def are_alike(run: Path, other: Path, atol: float) -> bool:
    expected, found = weights(other), weights(run)
    return all(torch.allclose(found[name], tensor, atol=atol, rtol=0) for name, tensor in expected.items())


def test_a_run_is_that_with_the_engine_in_process(start: Path, served: Path, alone: Path) -> None:
    firsts = [step for step in steps(served) if step["step"] % 2]
    assert len(firsts) == 2
    for step in firsts:
        assert step["terms"]["off_policy_kl"] < 1e-8
        assert step["terms"]["expert_mismatch"] == 0
    assert answers(served) == answers(alone)
    assert len(answers(served)) == 16
    assert are_alike(served, alone, 1e-5)
    assert not (served / "served").exists(), "a copy of the weights, which nobody reads any more"
    assert not are_alike(served, start, 1e-3)


def test_weights_that_stay_are_another_policy(start: Path, tmp_path: Path, live: Live) -> None:
    with between(live.address) as gate:
        way = recipe(start, gate.address, {"weights": "fixed", "bound": 100.0}, importance_cap=2.0, replay="rollout")
        run = train(way, out=tmp_path / "run", quiet=True).directory
        assert RENEW not in [path for path, _ in gate.asked]
        assert all(step["terms"]["off_policy_kl"] > 1e-6 for step in steps(run)[2:])


def test_weights_that_stay_need_a_correction(start: Path, live: Live) -> None:
    with pytest.raises(ConfigError, match=r"another policy's .* importance_cap = 2, or off_policy_bound"):
        train(recipe(start, live.address, {"weights": "fixed"}), quiet=True)


def test_a_check_asks_no_server(start: Path) -> None:
    found = check(recipe(start, "http://127.0.0.1:9"), steps=1, quiet=True)
    assert found.refused == ()
    assert found.steps_measured == 1


def test_a_server_that_dies_leaves_the_run_saved(start: Path, tmp_path: Path, live: Live, alone: Path) -> None:
    """And no answer of the rollout that was learnt is asked for again."""
    with between(live.address) as gate:
        given = lambda: [path for path, _ in gate.asked].count(RENEW)  # noqa: E731
        gate.change = lambda path, answer: None if given() > 1 and path == COMPLETE else answer
        way = recipe(start, gate.address)
        way["training"]["checkpoint_every"] = 100
        with pytest.raises(OutageError, match=r"method.server.patience_seconds.*saved after step 2: `finemoe resume"):
            train(way, out=tmp_path / "torn", quiet=True)
    with between(live.address) as gate:  # which is now elsewhere
        with pytest.raises(RunError, match=r"method.server.weights cannot be changed"):
            resume(tmp_path / "torn", overrides=["method.server.weights=fixed"], quiet=True)
        resume(tmp_path / "torn", overrides=[f"method.server.url={gate.address}"], quiet=True)
        asked = [path for path, _ in gate.asked]
    assert asked.count(RENEW) == 1
    assert asked.count(COMPLETE) == 4, "looked at, given its weights, looked at again, and asked two prompts"
    assert are_alike(tmp_path / "torn", alone, 1e-5)


def test_who_ends_a_run_does_not_wait_for_a_server_that_is_away(start: Path, tmp_path: Path, live: Live) -> None:
    signals = [signal.SIGINT]  # a second one would end it anyhow

    def change(path: str, answer: Any) -> Any:
        if path == RENEW or [path for path, _ in gate.asked].count(RENEW) < 2:
            return answer
        if signals:
            signal.pthread_kill(threading.main_thread().ident or 0, signals.pop())
        return None

    with between(live.address, change) as gate:
        way = recipe(start, gate.address, {"patience_seconds": 60.0})
        done = train(way, out=tmp_path / "run", quiet=True)
    assert done.interrupted, "as by any Ctrl-C, and no outage"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert (tmp_path / "run" / "served").is_dir()


def test_a_rollout_in_a_checkpoint_needs_no_server(served: Path, tmp_path: Path) -> None:
    """What is left to learn of it is learnt while the server is gone."""
    torn = tmp_path / "torn"
    shutil.copytree(served, torn, ignore=shutil.ignore_patterns("summary.json", "step-00000004"))
    resume(torn, quiet=True)
    assert are_alike(torn, served, 0.0)
