"""What a stage's model is found to do: counted by hand, over answers that are made up."""

from __future__ import annotations

from finemoe.methods.rewards import Answer, Judged, Scored
from finemoe.studies.staged.examination import _counted, stated
from finemoe.studies.staged.family import line, parents


def judged(text: str, right: bool, form: float, tokens: int = 3) -> tuple[Answer, Scored]:
    by_name = {"answer": Judged.whether(right), "form": Judged("right", form)}
    return Answer("q", text, True, tokens, {}, ("1",)), Scored(None, by_name, ())


def test_figures_by_hand() -> None:
    drawn = [
        [judged("1", True, 1.0, 1), judged("2", False, 0.0, 3), judged("2", False, 0.0, 3), judged("3", False, 0.0, 5)],
        [judged("4", True, 1.0), judged("4", True, 1.0), judged("5", False, 1.0), judged("6", False, 1.0)],
    ]
    greedy = [[judged("1", True, 1.0)], [judged("5", False, 1.0)]]
    assert _counted(drawn, greedy, "answer", ["form"]) == {
        "right": 3 / 8,
        "greedy": 1 / 2,
        "majority": 1 / 2,
        "any": 1.0,
        "length": 3.0,
        "form": 5 / 8,
    }


def test_of_equally_frequent_answers_the_first_is_what_most_say() -> None:
    assert (
        _counted([[judged("7", True, 0.0), judged("8", False, 0.0)]], [[judged("7", True, 0.0)]], "answer", [])[
            "majority"
        ]
        == 1.0
    )
    assert (
        _counted([[judged("8", False, 0.0), judged("7", True, 0.0)]], [[judged("7", True, 0.0)]], "answer", [])[
            "majority"
        ]
        == 0.0
    )


def test_reasoning_that_differs_and_says_the_same_is_one_answer() -> None:
    assert stated("<1324>4") == stated("<1325>4") == "4"
    assert stated(r"so \boxed{x+1}, of 3") == "x+1"
    assert stated("I think\nblue ") == "blue"
    assert stated("") == ""


def test_the_line_of_a_stage_is_what_it_began_with_and_what_its_paths_name() -> None:
    stages = [
        {"name": "base"},
        {"name": "aside", "start_from": "base"},
        {"name": "answers", "start_from": "base", "sample": {"n": 1}},
        {"name": "learnt", "start_from": "base", "data": {"corpus": {"paths": ["{answers}/answers.jsonl"]}}},
        {"name": "worded", "start_from": "learnt", "method": {"template": "{base}/x"}},
    ]
    family = parents(stages)
    assert family["learnt"] == ["base", "answers"]
    assert family["worded"] == ["learnt"], "a template is no path"
    assert line("worded", family) == ["base", "answers", "learnt", "worded"]
