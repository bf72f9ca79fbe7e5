"""Written answers: what is asked of each form of data, and what an answer is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finemoe.core.errors import DataError
from finemoe.evaluation.task import Generate, Generated, Item, Judged
from finemoe.evaluation.tasks import TASKS, closed_book, describe, mathematics


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(text), encoding="utf-8")
    return path


def request(item: Item) -> Generate:
    (found,) = item.requests
    assert isinstance(found, Generate)
    return found


def only(name: str, path: Path, shots: int | None = 0) -> Item:
    items, skipped = TASKS[name].items(path, shots, None)
    assert (len(items), skipped) == (1, 0)
    assert (request(items[0]).samples, request(items[0]).temperature) == (1, 0.0)
    json.dumps(dict(items[0].facts))
    return items[0]


def worth(name: str, item: Item, text: str) -> Judged:
    return TASKS[name].judge(item, [Generated((text,), 5)])


# ------------------------------------------------------------------------------------------- closed book, DROP

TRIVIA: dict[str, tuple[str, Any]] = {
    "official": (
        "qa.json",
        {
            "Data": [
                {
                    "Question": "Who barks?",
                    "QuestionId": "q_1",
                    "Answer": {"Value": "Dog", "Aliases": ["Dog", "A hound"]},
                }
            ]
        },
    ),
    "hub": (
        "qa.jsonl",
        {"question": "Who barks?", "question_id": "q_1", "answer": {"value": "Dog", "aliases": ["A hound"]}},
    ),
    "mosaic": (
        "qa.jsonl",
        {"context": "Question: Who barks?\nAnswer:", "answer": "Dog", "aliases": ["A hound", "Dog"]},
    ),
}


@pytest.mark.parametrize("form", TRIVIA)
def test_triviaqa(form: str, tmp_path: Path) -> None:
    name, record = TRIVIA[form]
    item = only("triviaqa", write(tmp_path / name, record))
    assert request(item).prompt == "Question: Who barks?\nAnswer:"
    assert item.facts["golds"] == ["Dog", "A hound"]
    assert worth("triviaqa", item, " the dog.\n\nQuestion: Who").scores == {"exact_match": 1.0, "f1": 1.0}
    assert worth("triviaqa", item, " hound").scores["exact_match"] == 1.0
    near = worth("triviaqa", item, " a big dog")
    assert near.scores["exact_match"] == 0.0
    assert 0 < near.scores["f1"] < 1
    assert worth("triviaqa", item, " cat").scores == {"exact_match": 0.0, "f1": 0.0}
    nothing = worth("triviaqa", item, " \n")
    assert (nothing.outcome, nothing.scores["exact_match"]) == ("no_answer", 0.0)


def test_natural_questions_with_the_pinned_examples(tmp_path: Path) -> None:
    path = write(tmp_path / "NQ-open.dev.jsonl", {"question": "who barks", "answer": ["dog", "hound"]})
    item = only("natural_questions", path, None)
    prompt = request(item).prompt
    assert item.facts["shots"] == 5
    assert prompt.count("Question: ") == 6
    assert "Answer: Jupiter\n\n" in prompt
    assert prompt.endswith("\n\nQuestion: who barks\nAnswer:")
    assert request(item).stops == ("\n",)
    assert prompt in describe(TASKS["natural_questions"], item)


def drop_answer(number: str = "", spans: tuple[str, ...] = (), day: str = "", month: str = "") -> dict[str, Any]:
    return {"number": number, "date": {"day": day, "month": month, "year": ""}, "spans": list(spans)}


def test_drop_forms(tmp_path: Path) -> None:
    passage = "Ann had 3 cats and Eve 4."
    asked = {"question": "How many cats?", "query_id": "q1", "answer": drop_answer("7")}
    asked["validated_answers"] = [drop_answer("7"), drop_answer(spans=("seven",)), drop_answer()]
    official = write(tmp_path / "drop_dataset_dev.json", {"nfl_1": {"passage": passage, "qa_pairs": [asked]}})
    item = only("drop", official)
    assert request(item).prompt == f"Passage: {passage}\nQuestion: How many cats?\nAnswer:"
    assert (item.id, item.facts["golds"]) == ("q1", [["7"], ["seven"]])
    row = {"passage": passage, "question": "Who?", "query_id": "q2", "answers_spans": {"spans": ["Ann", "Eve"]}}
    item = only("drop", write(tmp_path / "drop.jsonl", row), None)
    assert item.facts["golds"] == [["Ann", "Eve"]]
    assert request(item).prompt.startswith("Passage: The village school")
    date = {**asked, "answer": drop_answer(day="3", month="May"), "validated_answers": []}
    broken = {**asked, "answer": drop_answer(), "validated_answers": [], "query_id": "q3"}
    section = {"nfl_1": {"passage": passage, "qa_pairs": [date, broken]}}
    items, skipped = TASKS["drop"].items(write(tmp_path / "dates.json", section), 0, None)
    assert ([item.facts["golds"] for item in items], skipped) == ([[["3 May"]]], 1)


def test_drop_judging() -> None:
    one = Item("i", (), {"golds": [["7"], ["seven"]]})
    assert worth("drop", one, " 7\nQuestion").scores == {"exact_match": 1.0, "f1": 1.0}
    assert worth("drop", one, " Seven.").scores["exact_match"] == 1.0
    assert worth("drop", one, " 8").scores == {"exact_match": 0.0, "f1": 0.0}
    two = Item("i", (), {"golds": [["Ann", "Eve"]]})
    for text in ("Ann, Eve", "Eve and Ann"):
        assert worth("drop", two, text).scores == {"exact_match": 1.0, "f1": 1.0}
    for text in ("Ann", "Ann, Ann", "Ann, Eve, Bob", "Ann and Bob"):
        assert worth("drop", two, text).scores["exact_match"] == 0.0
    assert 0 < worth("drop", two, "Ann").scores["f1"] < 1


# -------------------------------------------------------------------------------------------- BIG-Bench Hard


def bbh_folder(root: Path, worked: bool) -> Path:
    examples = [{"input": f"not {n}", "target": str(n % 2 == 0)} for n in range(5)]
    write(root / "bbh/logic.json", {"canary": "x", "examples": examples})
    write(root / "bbh/dates.json", {"examples": [{"input": "when?\n(A) x\n(B) y", "target": "(B)"}] * 4})
    if worked:
        text = "Remarks.\n-----\nSay True or False.\n\nQ: not x\nA: Let's think step by step.\nWell.\n\n"
        text += "So the answer is True.\n\nQ: not y\nA: Let's think step by step.\nSo the answer is False.\n"
        write(root / "cot-prompts/logic.txt", text)
    return root


def test_bbh_without_reasoning_holds_the_first_of_each_task_out(tmp_path: Path) -> None:
    items, skipped = TASKS["bbh_direct"].items(bbh_folder(tmp_path, True), None, None)
    assert ([item.group for item in items], skipped) == (["dates", "logic", "logic"], 0)
    assert request(items[1]).prompt == ("Q: not 0\nA: True\n\nQ: not 1\nA: False\n\nQ: not 2\nA: True\n\nQ: not 3\nA:")
    assert len(TASKS["bbh_direct"].items(tmp_path, 0, None)[0]) == 9
    for text, score in ((" False\nQ:", 1.0), (" false.", 1.0), (" True", 0.0)):
        assert worth("bbh_direct", items[1], text).scores == {"exact_match": score}
    for text, score in (("(B)", 1.0), ("B", 1.0), ("(B) y", 1.0), ("(A)", 0.0), ("(", 0.0)):
        assert worth("bbh_direct", items[0], text).scores == {"exact_match": score}


def test_bbh_reasons_as_its_worked_examples_do(tmp_path: Path) -> None:
    items, skipped = TASKS["bbh"].items(bbh_folder(tmp_path, True), None, None)
    assert (len(items), skipped) == (9, 0)
    logic = next(item for item in items if item.group == "logic")
    assert request(logic).prompt == (
        "Say True or False.\n\nQ: not x\nA: Let's think step by step.\nWell.\n\nSo the answer is True.\n\n"
        "Q: not y\nA: Let's think step by step.\nSo the answer is False.\n\n"
        "Q: not 0\nA: Let's think step by step.\n"
    )
    assert [item.facts["shots"] for item in items] == [0] * 4 + [2] * 5
    assert worth("bbh", logic, "Well. So the answer is False. No, the answer is True.").scores == {"exact_match": 0.0}
    assert worth("bbh", logic, "Well.\nSo the answer is True.").scores == {"exact_match": 1.0}
    silent = worth("bbh", logic, "True")
    assert (silent.outcome, silent.scores) == ("no_answer", {"exact_match": 0.0})
    assert TASKS["bbh"].items(bbh_folder(tmp_path / "b", False), None, None)[0][0].facts["shots"] == 0


# ------------------------------------------------------------------------------------------------ mathematics


def test_gsm8k(tmp_path: Path) -> None:
    rows = [
        {"question": "Half of 3,000?", "answer": "It is <<3000/2=1500>>1500.\n#### 1,500"},
        {"question": "?", "answer": "5"},
    ]
    items, skipped = TASKS["gsm8k"].items(write(tmp_path / "gsm8k.jsonl", *rows), None, None)
    assert (len(items), skipped, items[0].facts["gold"], items[0].facts["shots"]) == (1, 1, "1,500", 8)
    assert request(items[0]).prompt.endswith("#### 230\n\nQuestion: Half of 3,000?\nAnswer:")
    for text, score in ((" It is 1500.\n#### 1500", 1.0), (" #### 1,500.00", 1.0), (" so $1500", 1.0), (" 1501", 0.0)):
        assert worth("gsm8k", items[0], text).scores == {"accuracy": score}, text
    nothing = worth("gsm8k", items[0], " I do not know")
    assert (nothing.outcome, nothing.scores) == ("no_answer", {"accuracy": 0.0})


def test_math_forms(tmp_path: Path) -> None:
    row = {"problem": "Half?", "level": "Level 2", "type": "Algebra", "solution": "It is $\\boxed{\\frac12}$."}
    write(tmp_path / "MATH/test/algebra/1.json", row)
    write(tmp_path / "MATH/test/algebra/2.json", {**row, "solution": "No box."})
    write(tmp_path / "MATH/train/algebra/3.json", {**row, "problem": "Train?"})
    items, skipped = TASKS["math"].items(tmp_path, None, None)
    assert (len(items), skipped, items[0].group, items[0].facts["shots"]) == (1, 1, "Algebra", 1)
    assert items[0].facts["level"] == "Level 2"
    assert request(items[0]).prompt == (
        "Problem:\nTrain?\n\nSolution: It is $\\boxed{\\frac12}$.\n\nProblem:\nHalf?\n\nSolution:"
    )
    hinted = "Half?\nPlease reason step by step, and put your final answer within \\boxed{}."
    item = only("math", write(tmp_path / "five.jsonl", {"prompt": hinted, "answer": "\\frac12"}))
    assert (request(item).prompt, item.facts["gold"]) == ("Problem:\nHalf?\n\nSolution:", "\\frac12")


@pytest.mark.parametrize(
    ("comparison", "outcome", "scores"),
    [
        ("equal", "answered", {"accuracy": 1.0}),
        ("different", "answered", {"accuracy": 0.0}),
        ("unreadable", "undecided", {"accuracy": 0.0}),
        ("error", "error", {}),
    ],
)
def test_a_checker_that_fails_is_no_wrong_answer(
    comparison: str, outcome: str, scores: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(mathematics, "compare_latex", lambda gold, given: seen.append((gold, given)) or comparison)
    item = Item("i", (), {"gold": "\\frac12"})
    for text in ("so \\boxed{0.5}", "The answer is $0.5$.", "the answer is: 0.5.\nOther words"):
        judged = worth("math", item, text)
        assert (judged.outcome, dict(judged.scores)) == (outcome, scores)
    assert seen == [("\\frac12", "0.5")] * 3
    assert worth("math", item, "no idea").outcome == "no_answer"


def test_math_for_real() -> None:
    item = Item("i", (), {"gold": "\\frac{1}{2}"})
    assert worth("math", item, "Thus $\\boxed{\\frac{1}{2}}$.").scores == {"accuracy": 1.0}
    assert worth("math", item, "Thus $\\boxed{\\frac{1}{3}}$.").scores == {"accuracy": 0.0}


@pytest.mark.parametrize("name", ["triviaqa", "natural_questions", "drop", "bbh", "gsm8k", "math"])
def test_nothing_generated_and_nothing_readable(name: str, tmp_path: Path) -> None:
    assert TASKS[name].judge(Item("i", (), {}), []).outcome == "error"
    with pytest.raises(DataError, match="finds no question there; 1 records were skipped"):
        TASKS[name].items(write(tmp_path / "set.jsonl", {"something": "else"}), 0, None)


def test_the_first_line_counts() -> None:
    assert closed_book.first_line("\n  one \ntwo") == "one"


def test_an_empty_answer_is_never_right() -> None:
    for name, golds in (("triviaqa", ["A", "The The"]), ("natural_questions", ["the"]), ("drop", [["a"]])):
        judged = worth(name, Item("i", (), {"golds": golds}), " \n")
        assert judged.outcome == "no_answer"
        assert judged.scores == {"exact_match": 0.0, "f1": 0.0}
