"""`finemoe train` of a recipe with stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    again = command("train", path, "--out", tmp_path / "out", "--json")
    assert [one["stage"] for one in json.loads(again.stdout)["stages"]] == ["base", "answers", "learnt"]


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
    assert f"Not checked: {out / '1-base'} holds it already" in again.stdout
    assert "Training    256 tokens in 2 steps" in again.stdout.split("Stage 3 of 3: learnt")[1]
