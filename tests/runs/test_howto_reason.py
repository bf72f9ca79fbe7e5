"""What docs/howto/teach-to-reason.md says of GSM8K: its tables make a run, and its records can be asked and judged."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.config import merge, read_toml, to_json
from finemoe.data import corpora
from finemoe.data.conversations.questions import question_in
from finemoe.data.documents.document import SkipReport
from finemoe.judging.comparing import AnswerReward, answer
from finemoe.judging.verdicts import Answer, Bounds
from finemoe.runs.config import resolve_run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/howto/teach-to-reason.md"
ROWS = ROOT / "src/finemoe/evaluation/prompts/gsm8k.jsonl"


def table(word: str) -> dict[str, Any]:
    """The one block of the page that holds `word`."""
    found = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in found if word in block]
    return tomllib.loads(block)


def test_the_corpus_of_the_page_is_asked_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def rows(*named: Any) -> Iterator[dict[str, Any]]:
        asked.append(named)
        yield from map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())

    monkeypatch.setattr(corpora, "rows", rows)
    (tmp_path / "config.json").write_text(to_json(resolve_run(read_toml(ROOT / "recipes/tiny.toml"), "tiny")))
    raw = merge(table('start_from = "runs/tuned"'), {**table("openai/gsm8k"), "start_from": str(tmp_path)})
    config = resolve_run(raw, "the page")
    assert config.method.kind == "grpo"
    documents = list(config.data.corpus.documents(SkipReport(quiet=True), whole=True))
    assert asked == [("openai/gsm8k", "main", "train", None)]
    judge = answer(AnswerReward(), Bounds())
    for one in documents:
        question = question_in(one.text)
        right = json.loads(one.text)["answer"].rpartition("#### ")[2]
        assert question.text == json.loads(one.text)["question"]

        def said(number: str, references: tuple[str, ...] = question.references) -> str:
            return judge(Answer("?", f"First this, then that.\nSo it is {number}", True, 9, {}, references)).verdict

        assert (said(right), said(str(int(right) + 1))) == ("right", "wrong")
