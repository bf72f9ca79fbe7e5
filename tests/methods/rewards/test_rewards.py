"""All rewards of a run together: the sum, and what failed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from finemoe.core.config import Config, parse
from finemoe.core.errors import ConfigError
from finemoe.data.conversations.forms import read
from finemoe.data.conversations.questions import reference_of
from finemoe.methods.rewards import (
    REWARDS,
    Answer,
    AnswerReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    ProgramReward,
    Rewards,
    RewardsConfig,
    StepsReward,
)


def answer(text: str, *references: str, record: dict[str, Any] | None = None) -> Answer:
    return Answer("3142=", text, True, 5, record or {"steps": ["14", "43", "20"]}, references)


FORM = FormatReward(form="markers", opens="<", closes=">", weight=0.5)
STEPS = StepsReward(cut=2, opens="<", closes=">", weight=-2.0)


def test_the_value_is_the_weighted_sum() -> None:
    with Rewards([AnswerReward(), FORM, STEPS], workers=1) as found:
        assert found.names == ("answer", "format", "steps")
        assert found.sentence == "an answer is worth 1 x answer + 0.5 x format + -2 x steps"
        good, direct, bad = found.score([answer("<144320>0", "0"), answer("0", "0"), answer("<144321>1", "0")])
    assert good.value == pytest.approx(1 + 0.5 - 2)
    assert good.steps == ((3, -2), (5, -2), (7, -2))
    assert (direct.value, direct.steps) == (1, ())
    assert {name: one.verdict for name, one in direct.by_name.items()} == {
        "answer": "right", "format": "wrong", "steps": "unreadable",
    }  # fmt: skip
    assert bad.value == pytest.approx(0.5 - 2 * 2 / 3)
    assert bad.steps == ((3, -2), (5, -2), (7, 0))


def test_records_of_gsm8k_are_judged_as_they_are() -> None:
    record = {"question": "Six by seven?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
    references = reference_of(record, read(record))
    with Rewards([AnswerReward()], workers=1) as found:
        texts = ("It is 42.", "6 * 7 = 42\n#### 42", r"\boxed{42}", "It is 41.")
        assert [one.value for one in found.score([answer(text, *references) for text in texts])] == [1, 1, 1, 0]


def test_an_error_is_no_value_and_not_nought() -> None:
    with Rewards([AnswerReward(), FORM], workers=1) as found:
        right, failed, unreadable = found.score([answer("<1>0", "0"), answer("<1>0"), answer("", "0")])
        assert right.value == 1.5
        assert failed.value is None
        assert failed.by_name["format"].value == 1  # the others of the answer, and the others of the batch, are judged
        assert failed.steps == ()
        assert unreadable.value == 0
        assert found.errors_in_a_row == 0


def test_a_reward_without_weight_may_fail() -> None:
    with Rewards([FORM, AnswerReward(weight=0)], workers=1) as found:
        (said,) = found.score([answer("<1>0")])
    assert said.value == 0.5
    assert said.by_name["answer"].verdict == "error"


def test_a_program_that_never_ends_is_wrong_and_no_failure_of_the_judging() -> None:
    given = answer("while True: pass", record={"tests": ["assert True"]})
    with Rewards([ProgramReward()], workers=1, deadline_seconds=1.0) as found:
        (said,) = found.score([given])
    assert said.value == 0
    assert said.by_name["tests"].verdict == "wrong"


def test_a_failure_is_told_at_once(tmp_path: Path) -> None:
    """Whoever waits for an answer that hangs is to know why."""
    path = tmp_path / "own.py"
    path.write_text(
        "import time\ndef score(prompt, completion, record):\n    time.sleep(60 if completion == 'hang' else 0)\n"
        "    return 1 / len(completion)\n"
    )
    told: list[tuple[str, ...]] = []
    answers = [answer(text) for text in ("good", "hang", "", "good")]
    own = FunctionReward(path=f"{path}:score")
    with Rewards([own], workers=1, deadline_seconds=0.5, on_failure=lambda *said: told.append(said)) as found:
        assert [one.value for one in found.score(answers)] == [0.25, None, None, 0.25]
    assert [name for name, _ in told] == ["function"] * 2
    assert told[0][1] == "no verdict within 0.5 seconds"
    assert told[1][1].startswith("ZeroDivisionError: ")
    assert found.last_error == f"function: {told[1][1]}"


def test_many_errors_in_a_row_are_told_and_one_value_ends_them() -> None:
    with Rewards([AnswerReward()], workers=1) as found:
        found.score([answer("0")] * 31)
        assert (found.errors_in_a_row, found.trouble) == (31, None)
        found.score([answer("0")] * 9)
        assert found.errors_in_a_row == 40
        assert found.trouble is not None
        assert "the last 40 answers got no reward" in found.trouble
        assert "answer: its record has no answer" in found.trouble
        found.score([answer("0", "0")])
        assert (found.errors_in_a_row, found.trouble) == (0, None)


def test_two_of_one_kind_have_names(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def a(prompt, completion, record): return 1\ndef b(prompt, completion, record): return None\n")
    own = [FunctionReward(path=f"{path}:{name}", name=name) for name in "ab"]
    with Rewards(own, workers=1) as found:
        (said,) = found.score([answer("x")])
        assert {name: one.verdict for name, one in said.by_name.items()} == {"a": "right", "b": "unreadable"}
    with pytest.raises(ConfigError, match="two rewards are called 'function': give each a `name`"):
        Rewards([FunctionReward(path=f"{path}:a"), FunctionReward(path=f"{path}:b")])
    with pytest.raises(ConfigError, match="there is no reward"):
        Rewards([])


def test_a_users_file_that_changes_while_it_judges_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that ended is replaced by one that loads what the file is then."""
    path = tmp_path / "own.py"
    dies = "import os\ndef a(prompt, completion, record): return os._exit(1) if completion else "
    path.write_text(f"{dies}1.0\n")

    def marked() -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    with Rewards([FunctionReward(path=f"{path}:a", name="mine")], workers=1) as found:
        first = marked()
        found.score([answer("dies")])
        assert found.score([answer("")])[0].value == 1
        assert caplog.messages == []
        path.write_text(f"{dies}22.0\n")
        assert found.files == {"mine": first}, "what was loaded, not what lies there"
        assert found.identity()[0]["sha256"] == first
        for _ in range(3):
            found.score([answer("dies")])
        assert found.score([answer("")])[0].value == 22
        (said,) = caplog.messages
        assert f"reward mine: its file has changed (sha256 {first[:12]} before, now {marked()[:12]})" in said
        assert found.files == {"mine": marked()}


def test_rewards_are_known_again_by_all_that_decides(tmp_path: Path) -> None:
    path = tmp_path / "own.py"

    def identity(body: str, weight: float = 1.0) -> list[dict[str, Any]]:
        path.write_text(f"def a(prompt, completion, record): return {body}\n")
        with Rewards([FunctionReward(path=f"{path}:a"), AnswerReward(weight=weight)], workers=1) as found:
            return found.identity()

    first = identity("1")
    assert json.loads(json.dumps(first)) == first == identity("1")
    assert first != identity("2")
    assert first != identity("1", weight=2.0)


def test_a_recipe_names_rewards_by_kind() -> None:
    class Method(Config):
        rewards: tuple[RewardsConfig, ...] = Field(min_length=1)

    tables = [{"kind": "answer"}, {"kind": "length", "longest": 9, "cushion": 3, "weight": 0.1}]
    found = parse(Method, {"rewards": tables}, "test").rewards
    assert found == (AnswerReward(), LengthReward(longest=9, cushion=3, weight=0.1))
    with pytest.raises(ConfigError, match=r"unknown `rewards\.0.kind` 'anwser', did you mean `answer`"):
        parse(Method, {"rewards": [{"kind": "anwser"}]}, "test")
    for kind, config in REWARDS.items():
        assert config.model_fields["kind"].default == kind
        assert {"name", "weight"} <= set(config.model_fields)


def test_the_process_that_judges_loads_no_torch() -> None:
    """It is started again after every fault, and has a limit of memory."""
    code = "import sys, finemoe.judging.child; print([n for n in ('torch', 'scipy', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
