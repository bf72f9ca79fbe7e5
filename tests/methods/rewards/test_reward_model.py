"""What a reward model says, and what becomes of a run when its process hangs, crashes or grows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finemoe.core import child as core
from finemoe.core.child import below
from finemoe.core.errors import ConfigError, OutageError, RunError
from finemoe.methods.grpo.rollouts import Rollouts
from finemoe.methods.reward import rewards as one_by_one
from finemoe.methods.rewards import Answer, FunctionReward, LengthReward, RewardModelReward, Rewards, Scored
from finemoe.methods.rewards.reward_model import RewardModel
from finemoe.runs.run import resume, train
from methods.grpo.tiny_policy import practising
from methods.tiny_talks import run


@pytest.fixture(scope="module")
def judge(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the method `reward`."""
    return run(base, tmp_path_factory.mktemp("judge") / "run", "reward")


def test_a_reward_model_says_of_many_what_it_says_of_one(judge: Path, base: Path) -> None:
    lines = (base.parent / "pairs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:12]]
    answers = [Answer("?", one["chosen"] * (1 + n % 3), True, 3, one, ()) for n, one in enumerate(records)]
    talks = [
        [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": given.text}]
        for one, given in zip(records, answers, strict=True)
    ]
    wanted = one_by_one(judge, talks)
    for tokens in (1, 100, 10_000):  # below every answer; some; all
        with Rewards([RewardModelReward(model=str(judge), batch_tokens=tokens, weight=2.0)]) as found:
            said = found.score(answers)
        assert [one.value for one in said] == pytest.approx([2 * value for value in wanted], abs=1e-4)
    assert {one.by_name["reward_model"].verdict for one in said} <= {"right", "wrong"}
    assert len({round(value, 3) for value in wanted}) > 6


def test_a_reward_model_reads_the_prompt_where_the_record_says_nothing(judge: Path) -> None:
    given = Answer("ant bee?", "ant.", True, 3, {"a": 1}, ())
    with Rewards([RewardModelReward(model=str(judge))]) as found:
        (said,) = found.score([given])
        (known,) = found.identity()
    assert len(known["model_sha256"]) == 64
    talk = [{"role": "user", "content": "ant bee?"}, {"role": "assistant", "content": "ant."}]
    assert said.value == pytest.approx(one_by_one(judge, [talk])[0], abs=1e-4)


def answers(number: int, words: str = "ant bee. ") -> list[Answer]:
    return [Answer("cat?", words * (1 + place % 5), True, 3, {"a": 1}, ("ant",)) for place in range(number)]


def readers() -> list[int]:
    """The processes below this one in which a reward model reads."""
    found = []
    for pid in below(os.getpid()):
        if b"finemoe.methods.rewards.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def notes(said: list[Scored]) -> list[str]:
    return [one.by_name["reward_model"].note for one in said]


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_a_conversation_that_cannot_be_read_is_told(judge: Path, tmp_path: Path, tokens: int) -> None:
    """An error of its own, among others that go well, and each answer keeps its own value."""
    shutil.copytree(judge, tmp_path / "judge")
    template = tmp_path / "judge" / "chat_template.jinja"
    refusal = '{%- for message in messages if "gnu" in message.content -%}{{ raise_exception("no gnu") }}{%- endfor -%}'
    template.write_text(refusal + template.read_text())
    told: list[tuple[str, str]] = []
    given = answers(6)
    given[1], given[4] = (replace(one, text="gnu") for one in given[:2])
    with Rewards(
        [RewardModelReward(model=str(tmp_path / "judge"), batch_tokens=tokens)],
        on_failure=lambda *what: told.append(what),
    ) as found:
        said = found.score(given)
        assert found.errors_in_a_row == 0
    read = [number for number in range(6) if number not in (1, 4)]
    talks = [[{"role": "user", "content": "cat?"}, {"role": "assistant", "content": given[one].text}] for one in read]
    assert [said[one].value for one in read] == pytest.approx(one_by_one(judge, talks), abs=1e-4)
    assert [one.value for one in (said[1], said[4])] == [None, None]
    assert [name for name, _ in told] == ["reward_model"] * 2
    assert all("no gnu" in note for note in [notes(said)[1], notes(said)[4], *(why for _, why in told)])


def test_it_ends_with_who_asked(judge: Path) -> None:
    before = set(readers())
    with Rewards([RewardModelReward(model=str(judge))]):
        (pid,) = set(readers()) - before
    assert not Path(f"/proc/{pid}").exists()
    kept = Rewards([RewardModelReward(model=str(judge))])
    (pid,) = set(readers()) - before
    del kept
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_hangs_is_ended_and_replaced(judge: Path) -> None:
    """The deadline of 32 answers read together is 32 times that of one."""
    told: list[tuple[str, str]] = []
    before = set(readers())
    with Rewards(
        [RewardModelReward(model=str(judge))], deadline_seconds=0.1, on_failure=lambda *what: told.append(what)
    ) as found:
        well = found.score(answers(40))
        (pid,) = set(readers()) - before
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        said = found.score(answers(40, "long " * 5000))  # more than a pipe holds
        assert 3.2 <= time.monotonic() - start < 20
        assert not Path(f"/proc/{pid}").exists()
        late = "no verdict within 3.2 seconds"
        assert notes(said) == [late] * 32 + [f"not tried, as before: {late}"] * 8
        assert told[0] == ("reward_model", late)
        assert found.errors_in_a_row == 40
        again = found.score(answers(40))
        (pid,) = set(readers()) - before
        os.kill(pid, signal.SIGKILL)  # a crash costs nothing but time
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        crashed = found.score(answers(40))
    assert [one.value for one in again] == [one.value for one in well]
    assert [one.value for one in crashed] == [one.value for one in well]


def test_who_is_asked_to_end_waits_for_a_moment_only(
    judge: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then a model that hangs is told of, since its deadline is long where many answers are read together."""
    monkeypatch.setattr("finemoe.methods.rewards.reward_model._LONG", 0.5)
    monkeypatch.setattr("finemoe.methods.rewards.reward_model._PATIENCE", 0.5)
    before = set(readers())
    with Rewards([RewardModelReward(model=str(judge))], deadline_seconds=1) as found:
        (pid,) = set(readers()) - before
        os.kill(pid, signal.SIGSTOP)
        rollouts = SimpleNamespace(_rewards=found)  # the run asks them
        threading.Timer(2, lambda: Rollouts.hurry(cast(Any, rollouts))).start()
        start = time.monotonic()
        with pytest.raises(OutageError, match="waited for no longer, since the run was asked to end"):
            found.score(answers(40))
        assert 2.5 <= time.monotonic() - start < 20
        assert not Path(f"/proc/{pid}").exists()
    (told,) = (one.getMessage() for one in caplog.records)
    assert re.search(r"is at 32 answers for [01] s; it is ended after 32 s, 1 for each$", told)


def test_an_answer_that_takes_too_much_memory_is_the_only_one_that_fails(
    judge: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it stands, and however many answers its question has."""
    huge = Answer("cat?", "ant " * 80_000, True, 3, {"a": 1}, ())
    given = [huge] * 2 + [replace(one, prompt=f"{number}?") for number, one in enumerate(answers(31))]
    told: list[str] = []
    with Rewards(
        [RewardModelReward(model=str(judge))],
        memory_bytes=64 << 20,
        deadline_seconds=20,
        on_failure=lambda name, why: told.append(why),
        keys="study.examination.",
    ) as found:
        said = found.score(given)
        apart = "Lower its batch_tokens from 16384, or raise study.examination.reward_memory from 67108864 (bytes)"
        assert caplog.messages[0].endswith(apart)
        assert [number for number, one in enumerate(said) if one.value is None] == [0, 1]
        assert found.errors_in_a_row == 0
        assert set(notes(said)[:2]) == set(told) == {"its process ended, perhaps for want of memory"}
        said = found.score([replace(huge, prompt=f"{number}?") for number in range(4)])
    assert [one.value for one in said] == [None] * 4
    assert [note.startswith("not tried, as before: ") for note in notes(said)] == [False] * 3 + [True]


def test_a_failure_of_the_model_is_told_in_its_own_words(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch finds no memory."""
    code = (
        "from finemoe.methods.rewards import child\n"
        "def judge(reader, talks, most):\n"
        "    raise RuntimeError('no room')\n"
        "child.Reader.judge = judge\n"
        "child.main()\n"
    )
    setup = {"model": str(judge), "labels": None, "memory": 1 << 30, "threads": 1}
    lines = [json.dumps(one) for one in (setup, {"talks": [], "tokens": 9, "seconds": 9})]
    told = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, start_new_session=True
    ).stdout.splitlines()
    assert [sorted(json.loads(one)) for one in told] == [["ready", "sha256"], ["failed"]]
    assert json.loads(told[1])["failed"].startswith("RuntimeError: no room (")

    def ask(child: subprocess.Popen[bytes], request: str, *how: Any) -> dict[str, Any] | None:
        return {"failed": "no room"} if "talks" in json.loads(request) else core.ask(child, request, *how)

    monkeypatch.setattr("finemoe.methods.rewards.reward_model.ask", ask)
    with Rewards([RewardModelReward(model=str(judge))]) as found:
        assert notes(found.score(answers(1))) == ["no room"]


def test_weights_that_changed_are_told_and_not_used(judge: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(judge, tmp_path / "judge")
    before = set(readers())
    with Rewards([RewardModelReward(model=str(tmp_path / "judge"))]) as found:
        (pid,) = set(readers()) - before
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        shutil.rmtree(tmp_path / "judge")
        (gone,) = found.score(answers(1))
        assert notes([gone])[0].startswith("the reward model does not open any more: ")
        run(base, tmp_path / "judge", "reward", seed=1)
        (other,) = found.score(answers(1))
        assert notes([other]) == [f"{tmp_path / 'judge'} is no longer the model that it was"]
        shutil.rmtree(tmp_path / "judge")
        shutil.copytree(judge, tmp_path / "judge")
        assert found.score(answers(1))[0].value is not None


def test_what_cannot_be_opened_is_told_at_once(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing"):
        Rewards([LengthReward(longest=9, cushion=3), RewardModelReward(model=str(tmp_path / "nothing"))])
    with pytest.raises(ConfigError, match=r"reward model .*run: labels: 'ant' is 3 tokens"):
        Rewards([RewardModelReward(model=str(judge), labels=("ant", "qqqqqq"))])


def test_what_is_open_ends_when_another_reward_cannot_be_made(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while somebody looks at the error; and a slip in a user's file is told before a model is read."""
    before, opened = set(readers()), list[str]()
    good, bad = RewardModelReward(model=str(judge)), RewardModelReward(model=str(tmp_path / "nothing"), name="bad")
    with pytest.raises(RunError, match="nothing") as held:
        Rewards([good, bad])
    assert set(readers()) == before, held
    monkeypatch.setattr(RewardModel, "_open", lambda model: opened.append("model") or "")
    (tmp_path / "own.py").write_text("def score(prompt, completion, record) return 1\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        Rewards([good, FunctionReward(path=f"{tmp_path / 'own.py'}:score")])
    assert opened == []


@pytest.mark.parametrize("broken", ["train", "resume"])
def test_what_judges_ends_when_a_run_cannot_begin(
    judge: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    raw = practising(base, {"rewards": [{"kind": "reward_model", "model": str(judge)}]}, training={"steps": 2})
    if broken == "resume":
        train(raw, out=tmp_path / "run", quiet=True)
    before = set(readers())

    def fails(*given: Any) -> None:
        assert len(set(readers()) - before) == 1
        raise OSError("no room")

    def begin() -> None:
        if broken == "train":
            train(raw, out=tmp_path / "run", quiet=True)
        else:
            resume(tmp_path / "run", overrides=["training.steps=4"], quiet=True)

    monkeypatch.setattr("finemoe.runs.run.kernels_for", fails)
    with pytest.raises(OSError, match="no room") as held:
        begin()
    assert set(readers()) == before, held


def test_a_run_from_before_reward_models_were_recorded_goes_on(
    judge: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = practising(base, {"rewards": [{"kind": "reward_model", "model": str(judge)}]}, training={"steps": 2})
    directory = train(raw, out=tmp_path / "run", quiet=True).directory
    whole = json.loads((directory / "data.json").read_text())
    (directory / "data.json").write_text(json.dumps({**whole, "reward_model_sha256": None}))
    with pytest.raises(RunError, match="the reward model is not what"):
        resume(directory, overrides=["training.steps=4"], quiet=True)
    older = {key: value for key, value in whole.items() if key != "reward_model_sha256"}
    (directory / "data.json").write_text(json.dumps(older))
    for steps in (4, 6):
        resume(directory, overrides=[f"training.steps={steps}"], quiet=True)
    (said,) = [one for one in caplog.messages if "what this run began with" in one]
    assert "whether the reward model is what this run began with is not known, as data.json has no reward_mod" in said
    assert json.loads((directory / "data.json").read_text()) == whole


def test_a_run_does_not_go_on_by_another_reward_model(judge: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(judge, tmp_path / "judge")
    reward = {"kind": "reward_model", "model": str(tmp_path / "judge")}
    raw = practising(base, {"rewards": [reward]}, training={"steps": 2})
    directory = train(raw, out=tmp_path / "run", quiet=True).directory
    shutil.rmtree(tmp_path / "judge")
    run(base, tmp_path / "judge", "reward", seed=1)
    with pytest.raises(RunError, match=r"the reward model is not what this run began with \(reward_model_sha256"):
        resume(directory, overrides=["training.steps=4"], quiet=True)
    shutil.rmtree(tmp_path / "judge")
    shutil.copytree(judge, tmp_path / "judge")
    resume(directory, overrides=["training.steps=4"], quiet=True)


def test_a_run_says_that_a_users_file_is_another_than_before(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been mended, and is no reason to end."""
    file = tmp_path / "own.py"
    file.write_text("def score(prompt, completion, record): return len(completion) / 9\n")
    reward = {"kind": "function", "path": f"{file}:score", "name": "mine"}
    directory = train(
        practising(base, {"rewards": [reward]}, training={"steps": 2}), out=tmp_path / "run", quiet=True
    ).directory
    resume(directory, overrides=["training.steps=4"], quiet=True)
    assert "another than before" not in caplog.text
    file.write_text("def score(prompt, completion, record): return len(completion) / 7\n")
    resume(directory, overrides=["training.steps=6"], quiet=True)
    assert "reward mine: its file is another than before; the run goes on by it" in caplog.text
