"""Whatever a reward does, its own answer alone is without a verdict, and nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from finemoe.core.child import below
from finemoe.core.errors import ConfigError
from finemoe.judging import pool as pool_module
from finemoe.judging.pool import Pool
from finemoe.judging.verdicts import Bounds, Judged
from judging.judged import answer

REWARDS = """
import ctypes, os, signal, subprocess, sys, threading, time

def score(prompt, completion, record):
    print("noise", completion)
    print('{"judged": {"verdict": "right", "value": 9, "note": "", "steps": []}, "fit": true}', file=sys.stderr)
    own = {**globals(), "completion": completion}
    exec(record.get("do", ""), own)
    return own.get("returned", float(completion))

def nothing(prompt, completion, record):
    return None
"""
HOW_TO_FAIL = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "leaves": ("sys.exit(3)", "SystemExit"),
    "is interrupted": ("os.kill(os.getpid(), signal.SIGINT)", "KeyboardInterrupt"),
    "hangs": ("time.sleep(60)", "no verdict within"),
    "hangs in C": ("signal.signal(signal.SIGALRM, signal.SIG_IGN); (2**(1 << 34))", "no verdict within|memory"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "its process ended"),
    "crashes": ("ctypes.string_at(0)", "its process ended"),
    "ends at once": ("os._exit(0)", "its process ended"),
    "closes everything": ("os.closerange(0, 64)", "its process ended"),
    "fills memory": ("x = ['a' * 10_000_000 + str(n) for n in range(1000)]", "ran out of memory"),
    "is a fork bomb": ("while True: os.fork()", "more than 64 processes started|BlockingIOError"),
    "starts many": ("[subprocess.Popen(['sleep', '60']) for _ in range(80)]; time.sleep(60)", "more than 64 processes"),
    "writes to every pipe": (
        "[os.write(n, b'{}\\n') for n in (3, 4) if os.readlink(f'/proc/self/fd/{n}').startswith('pipe')]",
        "something else than a verdict|Bad file",
    ),
    "returns text": ("returned = completion", "it returned str"),
    "returns nan": ("returned = float('nan')", "own_rewards.py:score: it returned nan, which is no finite number"),
}  # fmt: skip
SECONDS = 1.5


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "own_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One for all faults: it has to come through every one of them."""
    path = tmp_path_factory.mktemp("rewards") / "own_rewards.py"
    path.write_text(REWARDS)
    found = made(path)
    yield found
    found.close()


def made(rewards: Path, name: str = "score", seconds: float = SECONDS, workers: int = 1) -> Pool:
    specs = {"own": {"kind": "function", "path": f"{rewards}:{name}"}}
    return Pool(specs, Bounds(seconds, 256 << 20), workers)


def judged(judging: Pool, *does: str) -> list[Judged]:
    given = [answer(str(number + 0.5), record={"do": one}) for number, one in enumerate(does)]
    return [one["own"] for one in judging.judge(given)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and processes are Linux's")
@pytest.mark.parametrize("way", HOW_TO_FAIL)
def test_a_fault_costs_its_own_answer_alone(judging: Pool, way: str) -> None:
    do, words = HOW_TO_FAIL[way]
    before = judged(judging, *[""] * 40)  # quick, so that many wait in the process when it fails
    assert [one.value for one in before] == [n + 0.5 for n in range(40)]
    does = [""] * 12
    does[5] = do
    found = judged(judging, *does)
    bad = found.pop(5)
    assert bad.verdict == "error"
    assert re.search(words, bad.note), bad.note
    assert [one.value for one in found] == [n + 0.5 for n in range(12) if n != 5]
    assert {one.verdict for one in found} == {"right"}
    assert [one.value for one in judged(judging, "", "")] == [0.5, 1.5]


def test_one_that_ends_while_nobody_asks_costs_nothing(judging: Pool) -> None:
    """The system ends who is large when memory is short, and the parent may be training then."""
    judged(judging, "")
    for pid in below(os.getpid()):
        if b"finemoe.judging.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert [one.verdict for one in judged(judging, "", "", "")] == ["right"] * 3


def hanging(judging: Pool, questions: Sequence[str]) -> tuple[list[Judged], float]:
    """Verdicts on answers to these questions, of which `hang` lets the reward hang; seconds that they took."""
    began = time.monotonic()
    given = [
        replace(answer(str(number + 1), record={"do": "time.sleep(60)" if one == "hang" else ""}), prompt=one)
        for number, one in enumerate(questions)
    ]
    return [one["own"] for one in judging.judge(given)], time.monotonic() - began


def test_a_reward_that_hangs_on_everything_is_not_waited_for_every_time(
    rewards: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    judging = made(rewards, seconds=1.0, workers=2)
    request.addfinalizer(judging.close)
    found, took = hanging(judging, ["hang"] * 128)
    assert took < 30, "a minute and more if each were waited for"
    assert {one.verdict for one in found} == {"error"}
    tried = [one for one in found if one.note == "no verdict within 1 seconds"]
    assert 5 <= len(tried) <= 6
    said = re.compile(r"reward own: [56] of 128 answers could not be judged, and none could: no verdict within 1 s")
    assert any(map(said.match, caplog.messages))
    again, _ = hanging(judging, ["hang"] * 40)
    assert sum(one.note == "no verdict within 1 seconds" for one in again) <= 2, "it is known by now"
    assert [one.verdict for one in hanging(judging, ["a", "b", "c", "d"])[0]] == ["right"] * 4
    assert hanging(judging, ["hang"] * 5)[0][0].note.startswith("no verdict"), "and it has said something since"


def test_a_question_on_which_a_reward_hangs_costs_no_other(rewards: Path, request: pytest.FixtureRequest) -> None:
    judging = made(rewards, seconds=SECONDS, workers=2)
    request.addfinalizer(judging.close)
    found, _ = hanging(judging, [*["hang"] * 8, *["other"] * 8])
    assert [one.verdict for one in found] == [*["error"] * 8, *["right"] * 8]
    assert {one.note for one in found[:8]} == {f"no verdict within {SECONDS} seconds"}


def test_slow_rewards_are_given_more_processes(
    rewards: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging = made(rewards, seconds=10, workers=4)
    request.addfinalizer(judging.close)
    monkeypatch.setattr(pool_module, "_SLOW_SECONDS", 9)  # however busy the machine is
    judged(judging, *[""] * 60)
    assert len(judging._workers) == 2, "what is quick needs no more"
    monkeypatch.setattr(pool_module, "_SLOW_SECONDS", 0.3)
    judged(judging, *["time.sleep(0.8)"] * 8)
    assert len(judging._workers) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_is_started_ends_with_its_process(rewards: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In its group, in a session of its own, and as an orphan."""
    marks = [tmp_path / f"pid{n}" for n in range(3)]
    sleeper = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    start = "subprocess.Popen([sys.executable, '-c', {!r}], start_new_session={})"
    do = [start.format(sleeper.format(str(marks[n])), n == 1) for n in range(2)]
    do.append(f"subprocess.run(['sh', '-c', {f'sleep 60 & echo $! > {marks[2]}'!r}], stdout=subprocess.DEVNULL)")
    judging = made(rewards)
    request.addfinalizer(judging.close)
    assert {one.verdict for one in judged(judging, *do)} == {"right"}
    until = time.monotonic() + 20
    while not all(mark.exists() and mark.read_text().strip() for mark in marks) and time.monotonic() < until:
        time.sleep(0.02)
    pids = [int(mark.read_text()) for mark in marks]
    assert all(alive(pid) for pid in pids)
    judging.close()
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_a_process_started_ends_though_it_ended_first(judging: Pool, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    do = f"open({str(mark)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid)); os._exit(0)"
    assert judged(judging, do)[0].verdict == "error"
    until = time.monotonic() + 10
    while alive(int(mark.read_text())) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(int(mark.read_text()))


def test_a_fork_that_comes_back_says_nothing_twice(judging: Pool) -> None:
    assert [one.value for one in judged(judging, "os.fork()", "", "os.fork()", "")] == [0.5, 1.5, 2.5, 3.5]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_quick_answers_that_leave_processes_behind_are_noticed(judging: Pool) -> None:
    found = judged(judging, *["subprocess.Popen(['sleep', '60'])"] * 90)
    assert sum(one.verdict == "error" for one in found) <= 2
    assert len(pool_module.below(os.getpid())) < 70


def test_two_processes_share_the_work(rewards: Path) -> None:
    judging = made(rewards, workers=2)
    try:
        judged(judging, *["time.sleep(0.2)"] * 4)
        pids = {worker.process.pid for worker in judging._workers}
        assert len(pids) == 2
        slow = judged(judging, "time.sleep(60)", *[""] * 30)
        assert [one.verdict for one in slow] == ["error"] + ["right"] * 30
    finally:
        judging.close()


def test_none_is_unreadable(rewards: Path) -> None:
    judging = made(rewards, "nothing")
    try:
        assert judging.judge([answer("x")])[0]["own"].verdict == "unreadable"
    finally:
        judging.close()


def test_a_large_record_goes_through(judging: Pool) -> None:
    given = [answer("1", record={"text": "x" * 3_000_000}) for _ in range(3)]
    assert [one["own"].value for one in judging.judge(given)] == [1, 1, 1]


def test_a_file_that_fails_is_an_error_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "own_rewards.py"
    path.write_text("import os\nos._exit(3)\n")
    with pytest.raises(ConfigError, match="the rewards cannot be computed: its process ended"):
        made(path)
    path.write_text("def score(prompt, completion, record)\n    return 1\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        made(path)


def test_a_file_that_fails_later_is_no_end_of_the_run(rewards: Path) -> None:
    judging = made(rewards)
    rewards.write_text("raise ValueError('edited')")
    found = judged(judging, "", "os._exit(1)", "", "")
    assert [one.verdict for one in found] == ["right", "error", "error", "error"]
    assert "edited" in found[3].note
    rewards.write_text(REWARDS)
    assert judged(judging, "")[0].verdict == "right"
    judging.close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_an_interrupt_leaves_nobody_behind(rewards: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of an answer that hangs."""
    mark = tmp_path / "pid"
    program = f"""
import sys
from finemoe.judging.pool import Pool
from finemoe.judging.verdicts import Answer, Bounds
pool = Pool({{"own": {{"kind": "function", "path": {f"{rewards}:score"!r}}}}}, Bounds(60.0), 2)
do = "open({str(mark)!r} + completion, 'w').write(str(os.getpid())); time.sleep(60)"
try:
    pool.judge([Answer("", str(n), True, 1, {{"do": do}}, ()) for n in range(2)])
except KeyboardInterrupt:
    sys.exit(7)
"""
    running = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    until = time.monotonic() + 30
    files = [Path(f"{mark}{n}") for n in range(2)]
    while not all(one.exists() and one.read_text() for one in files) and time.monotonic() < until:
        time.sleep(0.02)
    pids = [int(one.read_text()) for one in files]
    assert all(alive(pid) for pid in pids)
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 7
    assert not any(alive(pid) for pid in pids)
