"""When a reward model that fails or hangs is given up, by a stand-in for its process, and what is said of it then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.child import below
from finemoe.core.errors import OutageError
from finemoe.methods.rewards import Answer, RewardModelReward, Rewards, reward_model

Says = Callable[[list[str]], dict[str, Any] | None]
ENDED = "its process ended, perhaps for want of memory"
FINE = {"verdict": "right", "value": 1.0, "note": ""}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Says], Rewards]:
    """Rewards by a model that says what a function says to texts of answers; None: it has ended, or is late."""

    def made(says: Says) -> Rewards:
        def ask(child: subprocess.Popen[bytes], request: str, *how: Any) -> dict[str, Any] | None:
            talks = json.loads(request).get("talks")
            return {"ready": True, "sha256": ""} if talks is None else says([talk[-1]["content"] for talk in talks])

        monkeypatch.setattr(reward_model, "ask", ask)
        return Rewards([RewardModelReward(model="judge")], deadline_seconds=0.3)

    return made


def notes(found: Rewards, questions: str, texts: str) -> list[str]:
    """Of answers of a letter each, to questions of a letter each."""
    given = [Answer(question, text, True, 1, {}, ()) for question, text in zip(questions, texts, strict=True)]
    return [one.by_name["reward_model"].note for one in found.score(given)]


def test_an_answer_that_is_late_by_itself_costs_no_other(stand_in: Callable[[Says], Rewards]) -> None:
    """After several together ended it: by itself it takes longer than others together may."""

    def says(texts: list[str]) -> dict[str, Any] | None:
        if texts == ["s"]:
            time.sleep(0.3)
        return None if "s" in texts else {"judged": [FINE] * len(texts)}

    with stand_in(says) as found:
        assert notes(found, "abcdef", "xsxxxx") == ["", "no verdict within 0.3 seconds", "", "", "", ""]


@pytest.mark.parametrize(
    ("questions", "tried"),
    [("a" * 8, 5), ("ab" * 4, 5), ("abcdefgh", 3)],
    ids=["one question", "two questions", "many questions"],
)
def test_one_that_fails_on_everything_is_given_up(
    stand_in: Callable[[Says], Rewards], questions: str, tried: int
) -> None:
    """However few questions there are: each failure costs the opening of the model."""
    with stand_in(lambda texts: None) as found:
        assert notes(found, questions, "x" * 8) == [ENDED] * tried + [f"not tried, as before: {ENDED}"] * (8 - tried)


def test_one_that_says_something_in_between_is_not_given_up(stand_in: Callable[[Says], Rewards]) -> None:
    with stand_in(lambda texts: None if "x" in texts else {"judged": [FINE]}) as found:
        assert notes(found, "a" * 9, "xxxxyxxxx") == [*[ENDED] * 4, "", *[ENDED] * 4]
        assert notes(found, "abcde", "xxyxx") == [ENDED, ENDED, "", ENDED, ENDED]


def test_one_that_ends_after_the_run_was_asked_to_is_no_wait(stand_in: Callable[[Says], Rewards]) -> None:
    """Who reads that it was waited for in vain looks for the wrong reason."""
    with stand_in(lambda texts: None) as found:
        found.hurry()
        assert notes(found, "a", "x") == [ENDED]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found there")
def test_one_that_hangs_while_it_is_opened_anew_is_waited_for_no_longer_than_another(
    stand_in: Callable[[Says], Rewards], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = reward_model.ask
    with stand_in(lambda texts: None) as found:
        found.close()
        monkeypatch.setattr(reward_model, "ask", ask)
        monkeypatch.setattr(reward_model, "_PATIENCE", 0.5)
        hangs = tmp_path / "hangs"
        hangs.write_text("#!/bin/sh\nexec sleep 60\n")
        hangs.chmod(0o755)
        monkeypatch.setattr(reward_model.sys, "executable", str(hangs))
        threading.Timer(0.5, found.hurry).start()
        with pytest.raises(OutageError, match="waited for no longer, since the run was asked to end"):
            notes(found, "a", "x")
        assert not [pid for pid in below(os.getpid()) if "sleep" in Path(f"/proc/{pid}/comm").read_text()]


def test_one_that_does_not_read_what_it_is_asked_is_waited_for_no_longer_either(
    stand_in: Callable[[Says], Rewards], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question longer than its pipe holds."""
    ask = reward_model.ask
    with stand_in(lambda texts: None) as found:
        (child,) = found._models["reward_model"]._children
        child.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(reward_model, "ask", lambda child, request, seconds, look: ask(child, request, 60, look))
        monkeypatch.setattr(reward_model, "_PATIENCE", 0.5)
        threading.Timer(0.5, found.hurry).start()
        start = time.monotonic()
        with pytest.raises(OutageError):
            found.score([Answer("a", "x" * 1_000_000, True, 1, {}, ())])
        assert time.monotonic() - start < 30
