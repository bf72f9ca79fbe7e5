"""`finemoe train` of a recipe with stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.cli.output import and_rollouts
from finemoe.cli.train import _came_to
from finemoe.core import config
from finemoe.training.trainer import Trainer
from runs.tiny_runs import write_corpus
from studies.test_recipe_stages import staged


def test_stages_are_trained_one_after_the_other(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    path = tmp_path / "staged.json"
    path.write_text(json.dumps(staged(corpus)))
    reads, reading = [], config.read_tables
    with monkeypatch.context() as patched:
        patched.setattr(config, "read_tables", lambda path: (reads.append(path), reading(path))[1])
        refused = command("train", path, "--quiet")
    assert reads == [path], "once is enough to see what it is"
    assert refused.exit_code == 2
    assert "say --out DIR" in refused.stderr
    done = command("train", path, "--out", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert "40 of 40 answers kept" in done.stdout
    assert "Next: finemoe show" in done.stdout
    shown = command("show", tmp_path / "out", "--json")
    assert [Path(one["directory"]).name for one in json.loads(shown.stdout)] == ["1-base", "3-learnt"]
    go_on = command("resume", tmp_path / "out").stderr
    assert f"all stages go on by the command that began them, `finemoe train RECIPE --out {tmp_path / 'out'}`" in go_on
    assert "those of stages that read other texts cannot be compared" in done.stdout
    again = command("train", path, "--out", tmp_path / "out", "--json")
    assert [one["stage"] for one in json.loads(again.stdout)["stages"]] == ["base", "answers", "learnt"]
    monkeypatch.setattr("finemoe.parallel.seat.speaks", lambda: False)
    other = command("train", path, "--out", tmp_path / "out", "--quiet")
    assert (other.exit_code, other.stdout) == (0, ""), "of several processes the first says it"


def test_a_stage_that_is_interrupted_says_how_to_go_on(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "staged.json", tmp_path / "out"
    path.write_text(json.dumps(staged(write_corpus(tmp_path / "corpus"))))
    real = Trainer.step

    def interrupted(self: Trainer, *given: Any) -> Any:
        self.request_stop()
        return real(self, *given)

    monkeypatch.setattr(Trainer, "step", interrupted)
    done = command("train", path, "--out", out, "--quiet", "--set", "seed=5")
    assert done.exit_code == 130
    assert "Interrupted, nothing is lost: stage base was interrupted and is saved" in done.stderr
    assert f"goes on with it: finemoe train {path} --out {out} --set seed=5" in done.stderr
    assert "error" not in done.stderr


def test_stages_are_looked_at_where_their_beginning_is_there(tmp_path: Path, command: Callable[..., Any]) -> None:
    path, out = tmp_path / "staged.json", tmp_path / "out"
    path.write_text(json.dumps(staged(write_corpus(tmp_path / "corpus"))))

    def shown(*words: Any) -> Any:
        return command("data", "show", path, "-n", "1", *words)

    first = command("train", path, "--check", "--json", "--quiet")
    assert first.exit_code == 0, first.stderr
    base, answers, learnt = json.loads(first.stdout)["stages"]
    assert base["check"]["steps"] == 2
    assert (answers["check"], answers["why"]) == (None, "it writes answers and trains nothing")
    assert "say --out DIR too" in learnt["why"]
    assert not out.exists()
    assert "stage 1 of 3, base; the stages are: base, answers, learnt" in shown().stdout
    assert "say --in DIR" in shown("--stage", "learnt").stderr
    assert "no stage that trains is called 'lernt'" in shown("--stage", "lernt").stderr
    assert "writes answers and trains nothing" in shown("--stage", "answers").stderr
    assert command("train", path, "--out", out, "--quiet").exit_code == 0
    assert "[[" in shown("--stage", "learnt", "--in", out).stdout
    shutil.rmtree(out / "3-learnt")
    again = command("train", path, "--check", "--out", out, "--quiet")
    assert again.exit_code == 0, again.stderr
    assert f"Not checked: {out / '1-base'} holds it already" in " ".join(again.stdout.split())
    names_a_path = [line for line in again.stdout.splitlines() if str(out) in line]
    assert all(len(line) <= 80 for line in again.stdout.splitlines() if line not in names_a_path)
    assert "Training    256 tokens in 2 steps" in again.stdout.split("Stage 3 of 3: learnt")[1]


FIRST = {"validation_reward": 0.28, "validation_reward_answer": 0.276, "validation_length": 3.447}
LAST = {"final_validation_reward": 0.98, "final_validation_reward_answer": 0.985, "final_validation_length": 14.0,
        "final_validation_failed_share": 0.0, "final_training_loss": 0.1, "seconds": 32.4}  # fmt: skip


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (FIRST, LAST, "right 28 % -> 98 %, length 3.45 -> 14"),
        ({}, LAST, "right 98 %, length 14"),
        (FIRST, {name: value for name, value in LAST.items() if "answer" not in name},
         "reward 0.280 -> 0.980, length 3.45 -> 14"),
        ({"validation_loss": 3.5}, {"final_validation_loss": 1.016, "seconds": 32.4}, "loss 3.500 -> 1.016"),
        ({"validation_loss": None}, {"final_validation_loss": 1.016, "seconds": 32.4}, "loss 1.016"),
    ],
)  # fmt: skip
def test_a_stage_came_from_somewhere(tmp_path: Path, first: Any, last: Any, said: str) -> None:
    """`reward 0.995, reward answer 0.995, greedy reward answer 0.995` told one thing three times, and not the gain."""
    begun = {"step": 0, **first} if first else {"step": 10, **FIRST}
    record = {"kind": "validation", "tokens": 0, "seconds": 0.0, **begun}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert _came_to({"stage": "zero", "folder": str(tmp_path), "summary": last}) == ["zero", said, "32 s"]
    (tmp_path / "metrics.jsonl").unlink()
    assert "->" not in _came_to({"stage": "zero", "folder": str(tmp_path), "summary": last})[1]


def test_what_was_learnt_from_is_there_to_be_read(tmp_path: Path) -> None:
    assert and_rollouts(tmp_path) == ""
    (tmp_path / "rollouts.jsonl").touch()
    assert and_rollouts(tmp_path) == f"\n      finemoe rollouts {tmp_path}"
