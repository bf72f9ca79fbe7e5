"""Processes that die or stop: torchrun starts all of them again, and the run goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from finemoe.__main__ import main
from finemoe.core.config import merge
from finemoe.runs import run as running
from finemoe.training.report import StepReport
from finemoe.training.trainer import Trainer
from parallel.processes import run
from runs.forking import CONTEXT, settle
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]

STEPS, MANY = 10, 40
"""Of a run that ends itself, and of one that others have to catch while it runs."""


@pytest.fixture(scope="module")
def tables(corpus: Path) -> dict[str, Any]:
    training = {"steps": STEPS, "checkpoint_every": 4, "threads": 1, "tokens_per_step": 128, "evaluate_every": MANY}
    changes = {"training": training, "parallel": {"shard": 2, "expert": 2}, "optimizer": {"learning_rate": 0.004}}
    return merge(recipe(corpus, "v3", training={}), changes)


def train(raw: dict[str, Any], out: Path) -> None:
    running.train(raw, out=out, quiet=True)


@pytest.fixture(scope="module")
def unbroken(tables: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(2, train, tables, folder, met=False)
    return folder


@pytest.fixture(scope="module")
def longer(tables: dict[str, Any]) -> dict[str, Any]:
    return merge(tables, {"training": {"steps": MANY}})


@pytest.fixture(scope="module")
def longer_unbroken(longer: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "longer"
    run(2, train, longer, folder, met=False)
    return folder


ALONE = ("--standalone", "--nproc-per-node", "2")


@contextmanager
def torchrun(
    raw: dict[str, Any], out: Path, restarts: int, how: tuple[str, ...] = ALONE, name: str = "run"
) -> Iterator[subprocess.Popen[str]]:
    """`torchrun -m finemoe train RECIPE --out OUT --continue`, on two processes; nothing of it is left behind."""
    path = out.with_suffix(".json")
    path.write_text(json.dumps(raw))
    command = [sys.executable, "-m", "torch.distributed.run", *how]
    command += ["--max-restarts", str(restarts), "-m", "finemoe", "train", str(path), "--out", str(out)]
    command += ["--continue", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = out.with_name(f"{name}.log").open("w")
    with (
        log,
        subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        ) as started,
    ):
        try:
            yield started
        finally:
            for pid in (*workers(started.pid), started.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def workers(agent: int) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children")
    try:
        found = [int(pid) for pid in children.read_text().split()]
    except FileNotFoundError:
        return []
    ranks = {}
    for pid in found:
        try:
            environ = dict(one.split(b"=", 1) for one in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if one)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if b"RANK" in environ:
            ranks[int(environ[b"RANK"])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for(what: Callable[[], Any], seconds: float = 90) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def steps_done(out: Path) -> list[int]:
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [record["step"] for line in lines if line.endswith("}") if (record := json.loads(line))["kind"] == "step"]


def killed_once(raw: dict[str, Any], out: Path, rank: int) -> str:
    with torchrun(raw, out, restarts=1) as started:
        wait_for(lambda: len(steps_done(out)) >= 5)
        os.kill(workers(started.pid)[rank], signal.SIGKILL)
        assert started.wait(120) == 0, out.with_name("run.log").read_text()
    return out.with_name("run.log").read_text()


def same(out: Path, unbroken: Path) -> None:
    last = max(steps_done(unbroken))
    assert steps_done(out) == list(range(1, last + 1))
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(one / "checkpoints" / f"step-{last:08d}" / file) for one in (out, unbroken))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours), file


def killed_at_five(recipe: str, out: str) -> None:
    """`finemoe train RECIPE --out OUT --continue`; rank 1 of the first start kills itself after the fifth step."""
    original = Trainer.step

    def step(trainer: Trainer, *arguments: Any) -> StepReport:
        report = original(trainer, *arguments)
        if report.step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            Path(f"{out}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return report

    Trainer.step = step  # type: ignore[method-assign]  # of a process that ends with the run
    sys.argv = ["finemoe", "train", recipe, "--out", out, "--continue", "--quiet"]
    with suppress(SystemExit):
        main()


def agent(*arguments: str) -> None:
    """What torchrun does, with workers that are forked and not started anew."""
    settle()
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    place = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "run_id": "one"}
    place |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 1, "start_method": "fork"}
    elastic_launch(LaunchConfig(**place), killed_at_five)(*arguments)


def test_a_run_whose_process_was_killed_goes_on_by_itself(
    tables: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    """Complaint 15 of distribution, and 5 of 8 restarts that failed where the meeting place was not new."""
    (tmp_path / "run.json").write_text(json.dumps(tables))
    process = CONTEXT.Process(target=agent, args=(str(tmp_path / "run.json"), str(tmp_path / "run")))
    process.start()
    try:
        process.join(120)
        assert process.exitcode == 0
    finally:
        process.terminate()  # which ends its workers too
        process.join()
    assert (tmp_path / "run.died").exists()
    same(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_ten_restarts_of_ten(longer: dict[str, Any], longer_unbroken: Path, tmp_path: Path) -> None:
    for number in range(10):
        killed_once(longer, tmp_path / str(number), rank=number % 2)
        same(tmp_path / str(number), longer_unbroken)


@pytest.mark.slow
def test_a_request_to_one_process_stops_all_after_the_same_step(
    longer: dict[str, Any], longer_unbroken: Path, tmp_path: Path
) -> None:
    """SIGTERM to rank 1 alone, once: nobody waits, what is saved is the last step, and the run goes on to its end."""
    out = tmp_path / "run"
    with torchrun(longer, out, restarts=0) as started:
        wait_for(lambda: len(steps_done(out)) >= 5)
        os.kill(workers(started.pid)[1], signal.SIGTERM)
        started.wait(60)
    said = (tmp_path / "run.log").read_text()
    last = steps_done(out)[-1]
    assert 5 <= last < MANY, said
    assert (out / "checkpoints" / f"step-{last:08d}").exists(), said
    assert "gave no sign of life" not in said
    assert "did not come as far" not in said
    with torchrun(longer, out, restarts=0, name="again") as started:
        assert started.wait(120) == 0, (tmp_path / "again.log").read_text()
    same(out, longer_unbroken)


@pytest.mark.slow
def test_agents_of_two_machines_start_all_again_together(
    longer: dict[str, Any], longer_unbroken: Path, tmp_path: Path
) -> None:
    """Each agent counts restarts for itself, so that no count can name a meeting."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    place = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    place += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two")
    out = tmp_path / "run"
    with torchrun(longer, out, 3, place, "first") as first, torchrun(longer, out, 3, place, "second") as second:
        wait_for(lambda: len(steps_done(out)) >= 5)
        os.kill(workers(second.pid)[0], signal.SIGKILL)
        ended = [started.wait(180) for started in (first, second)]
    assert ended == [0, 0], "\n".join((tmp_path / f"{name}.log").read_text()[-3000:] for name in ("first", "second"))
    same(out, longer_unbroken)


@pytest.mark.slow
def test_a_process_that_stands_still_is_named(longer: dict[str, Any], tmp_path: Path) -> None:
    """A stopped process is noticed by nobody but those who wait: they say whom for, within the time-out."""
    raw = merge(longer, {"parallel": {"timeout": 10.0}})
    with torchrun(raw, tmp_path / "run", restarts=0) as started:
        wait_for(lambda: len(steps_done(tmp_path / "run")) >= 5)
        os.kill(workers(started.pid)[1], signal.SIGSTOP)
        begun = time.monotonic()
        assert started.wait(10 + 60) != 0
        assert time.monotonic() - begun < 10 + 60
    said = (tmp_path / "run.log").read_text()
    assert "rank 1 gave no sign of life" in " ".join(said.split()), said


def dies_while_saving(raw: dict[str, Any], out: Path, place: int) -> None:
    """Rank 0 kills itself at the `place`-th of the things that writing the second checkpoint does."""
    from torch import distributed

    from finemoe.checkpoint.run_state import state

    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if (out / "checkpoints" / "step-00000004").exists() and distributed.get_rank() == 0:
                calls += 1
                if calls == place:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in ("write_tensors", "write_bytes", "sync"):
        setattr(state, name, counted(getattr(state, name)))
    running.train(raw, out=out, quiet=True)


@pytest.mark.parametrize("place", [2, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 3, 5, 7))])
def test_a_kill_while_saving_costs_only_the_steps_since(
    tables: dict[str, Any], unbroken: Path, tmp_path: Path, place: int
) -> None:
    """Complaint 15 of distribution: one dies in a save and the others wait for ever, or its half is what is found."""
    with pytest.raises(AssertionError, match=r"rank 0 ended without a word|closed by peer|did not come as far"):
        run(2, dies_while_saving, tables, tmp_path / "run", place, met=False)
    assert [one.name for one in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004"]
    run(2, resumed, tmp_path / "run", met=False)
    same(tmp_path / "run", unbroken)


def resumed(folder: Path) -> None:
    running.resume(folder, quiet=True)
