"""`finemoe data show`: what is learnt is seen, on the terminal, in JSON and on a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finemoe.cli.main import app
from finemoe.runs.excerpts import data_excerpts
from methods.grpo.tiny_policy import practising
from methods.tiny_talks import adapting, begin, write_pairs
from runs.tiny_runs import corpus, recipe

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    write_pairs(folder / "pairs.jsonl")
    return begin(corpus, folder, "dense")


def written(base: Path, folder: Path, method: str) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(adapting(base, base.parent / "pairs.jsonl", {"kind": method})))
    return path


def learnt(sample: dict[str, Any]) -> str:
    return "".join(piece["text"] for piece in sample["pieces"] if piece["learnt"])


def test_answers_are_learnt_and_questions_only_read(base: Path, tmp_path: Path) -> None:
    found = data_excerpts(written(base, tmp_path, "sft"), samples=3)
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        whole = "".join(piece["text"] for piece in sample["pieces"])
        assert whole.startswith("User:\n")
        question = whole.split("\n")[1]
        assert learnt(sample) == question.split(" ", 1)[1].removesuffix("?") + ".<|end_of_text|>"
        assert sample["learnt"] < sample["tokens"]
    assert found["samples"][1] == data_excerpts(written(base, tmp_path, "sft"), samples=1, skip=1)["samples"][0]


def test_a_pair_is_shown_as_two(base: Path, tmp_path: Path) -> None:
    found = data_excerpts(written(base, tmp_path, "dpo"), samples=2)["samples"]
    assert [sample["part"] for sample in found] == ["the better answer", "the worse answer"] * 2
    assert [sample["number"] for sample in found] == [0, 0, 1, 1]
    assert found[0]["pieces"][0] == found[1]["pieces"][0]
    assert found[2:] == data_excerpts(written(base, tmp_path, "dpo"), samples=1, skip=1)["samples"]


def test_documents_are_learnt_whole(corpus: Path) -> None:
    (sample,) = data_excerpts(recipe(corpus, "dense"), samples=1)["samples"]
    assert [piece["learnt"] for piece in sample["pieces"]] == [False, True]
    assert sample["tokens"] == sample["learnt"] + 1 == 17


def test_prompts_are_shown_as_they_are_asked(base: Path, tmp_path: Path) -> None:
    """A model that answers itself has no batch before it trains."""
    path = tmp_path / "recipe.json"
    tables = practising(base, {"template": "Q: {prompt}", "order": "given"})
    path.write_text(json.dumps(tables))
    found = data_excerpts(path, samples=2, skip=1)
    assert len(found["samples"]) == 2
    for sample in found["samples"]:
        (piece,) = sample["pieces"]
        assert not piece["learnt"]
        digits = piece["text"].removeprefix("Q: ").removesuffix("=\n")
        assert sample["tokens"] == len(piece["text"])
        assert sample["right"] == [str(sum(map(int, digits)) % 5)]
    assert len(found["lengths"]) == found["report"]["items"]["train"], "a prompt counts once, and not each answer"
    shown = CliRunner().invoke(app, ["data", "show", str(path), "-n", "1", "--out", str(tmp_path / "page")])
    assert shown.exit_code == 0, shown.output
    assert "Prompt 1: 11 tokens; right: " in shown.stdout
    assert "[[" not in shown.stdout
    assert "As the model is asked" in (tmp_path / "page" / "report.html").read_text()
    shuffled = data_excerpts({**tables, "method": {**tables["method"], "order": "shuffled"}}, samples=2, skip=1)
    assert shuffled["samples"] != found["samples"]


def test_prompts_of_a_student_are_shown_too(base: Path) -> None:
    method = {"kind": "distill", "teacher": str(base), "policy": "on", "answer_tokens": 8}
    (sample,) = data_excerpts(adapting(base, base.parent / "pairs.jsonl", method), samples=1)["samples"]
    assert sample["pieces"][0]["text"].startswith("User:\n")
    assert sample["learnt"] == 0


def test_the_terminal_marks_what_is_learnt_and_the_page_does_too(base: Path, tmp_path: Path) -> None:
    path, out = written(base, tmp_path, "sft"), tmp_path / "page"
    done = CliRunner().invoke(app, ["data", "show", str(path), "-n", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("[[") == 2
    assert ".<|end_of_text|>]]" in done.stdout
    assert "form: pairs (60)" in done.stdout
    page = (out / "report.html").read_text()
    assert page.count("<mark>") == 2
    assert (out / "figures" / "lengths.svg").exists()
    assert json.loads((out / "results.json").read_text())["kind"] == "data"
    assert CliRunner().invoke(app, ["data", "show", str(path), "--json"]).stdout.startswith("{")
