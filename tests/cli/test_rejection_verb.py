"""`finemoe rejection`: what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finemoe.cli.sample import show
from finemoe.methods.distillation.sampling import Sampled


def asking(
    folder: Path, name: str = "rewards.toml", text: str = '[[rewards]]\nkind = "length"\nlongest = 3\ncushion = 2\n'
) -> Path:
    """Two prompts, and a file of rewards beside them."""
    (folder / "asked.jsonl").write_text('{"prompt": "main", "answer": "no"}\n{"prompt": "return", "answer": "no"}\n')
    (folder / name).write_text(text)
    return folder / name


def test_it_says_what_was_kept_and_why_the_rest_was_not(
    run_directory: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    rewards, out = asking(tmp_path), tmp_path / "out.jsonl"
    options = ("--rewards", rewards, "--n", 2, "--max-new-tokens", 4, "--quiet")
    done = command("rejection", run_directory, tmp_path / "asked.jsonl", "--out", out, *options)
    assert done.exit_code == 0, done.output
    assert "2 prompts, 4 completions" in done.stdout
    assert "Kept                 0 (0%)" in done.stdout
    assert "4 did not end" in done.stdout
    assert "nothing was kept. 4 of 4 answers: did not end. Mind that the model has no chat template" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl", "out.jsonl", "rewards.toml"]
    again = command("rejection", run_directory, tmp_path / "asked.jsonl", "--out", out, *options, "--json")
    found = json.loads(again.stdout)
    assert (found["prompts"], found["drawn"], found["kept"], found["left_out"]) == (2, 4, 0, {"did not end": 4})


def test_it_says_what_each_reward_found(run_directory: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    text = '[[rewards]]\nkind = "length"\nlongest = 90\ncushion = 2\n[[rewards]]\nkind = "answer"\n'
    rewards, out = asking(tmp_path, text=text), tmp_path / "out.jsonl"
    options = ("--rewards", rewards, "--n", 8, "--max-new-tokens", 80, "--quiet", "--out", out)
    done = command("rejection", run_directory, tmp_path / "asked.jsonl", *options, "--at-least", "-9")
    assert re.search(r"Judged +length: right \d+, wrong \d+; answer: right 0, wrong \d+", done.stdout), done.output
    assert not list(tmp_path.glob(".*"))
    again = command("rejection", run_directory, tmp_path / "asked.jsonl", *options)
    assert again.exit_code == 2
    assert "is there already, whole or somebody else's: nothing is overwritten" in again.stderr


def test_it_says_how_what_was_kept_is_learnt(run_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who was asked by a wording learns the text, not a conversation by a template that it does not have."""
    done = Sampled(run_directory / "kept.jsonl", 4, 8, 3, {}, {})
    show(done)
    assert 'Next: a recipe with method.kind = "sft" and, in [data], corpus' in capsys.readouterr().out
    show(done, as_texts=True)
    assert (
        "Next: a recipe without [method], which reads the texts as they were, and, in [data]" in capsys.readouterr().out
    )


def test_what_cannot_be_is_one_sentence(run_directory: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    rewards, asked, out = asking(tmp_path, text="[rewards]\n"), tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    nothing = command("rejection", tmp_path / "nothing", asked, "--out", out)
    assert nothing.exit_code == 2
    assert "there is nothing here" in nothing.stderr
    wrong = command("rejection", run_directory, asked, "--out", out, "--rewards", rewards)
    assert wrong.exit_code == 2
    assert "rewards.toml" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    missing = command("rejection", run_directory, asked, "--out", out, "--rewards", tmp_path / "reward.toml")
    assert "did you mean `rewards.toml`" in missing.stderr
