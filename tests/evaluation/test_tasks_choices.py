"""Multiple choice: what is asked of each form of data, and how answers are judged."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.core.errors import ConfigError, DataError
from finemoe.evaluation.forms.choices import ChoiceTask, credit
from finemoe.evaluation.task import Item, Judged, LogLikelihood, Scored, Task
from finemoe.evaluation.tasks import TASKS, describe, find_task

CHOICES = [task for task in TASKS.values() if isinstance(task, ChoiceTask)]


def write(path: Path, *records: Any) -> Path:
    """JSON Lines, or for a text what it says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(text), encoding="utf-8")
    return path


def table(path: Path, *rows: Sequence[str]) -> Path:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return write(path, out.getvalue())


def pairs(item: Item) -> list[tuple[str, str]]:
    return [(r.context, r.continuation) for r in item.requests if isinstance(r, LogLikelihood)]


def gold_pair(item: Item) -> tuple[str, str]:
    return pairs(item)[item.facts["gold"]]


def judged(task: Task, item: Item, logprobs: Sequence[float], tokens: Sequence[int] | None = None) -> Judged:
    counts = tokens or [1] * len(logprobs)
    return task.judge(item, [Scored(value, n, False) for value, n in zip(logprobs, counts, strict=True)])


# -------------------------------------------------------------------- one question of each set, in each of its forms

SCIENCE = ("Question: What melts?\nAnswer:", " ice")
RACE = {"article": "A fox ran.", "question": "Who ran?", "options": ["A cat", "A fox"], "answer": "B"}
CHID = "他#idiom#地走了。"
WSC = {"target": {"span1_text": "猫", "span2_text": "它", "span1_index": 0, "span2_index": 2}, "text": "猫说它饿了。"}
EXAM = ["1+1?", "1", "2", "3", "4", "B"]
MMLU = "The following are multiple choice questions (with answers) about some physics.\n\n"
LETTERED = "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n"
CHINESE = "以下是单项选择题，每题只有一个正确答案。\n\n" + LETTERED + "答案："

FORMS: list[tuple[str, str, Any, tuple[str, str]]] = [
    (
        "hellaswag",
        "official",
        {
            "ind": 7,
            "activity_label": "Roof",
            "ctx_a": "[header] How [title] Climb.",
            "ctx_b": "the Man",
            "ctx": "unused",
            "endings": ["a", "b [step] c  d", "e", "f"],
            "label": 1,
        },
        ("Roof: How. Climb. The man", " b c d"),
    ),
    ("hellaswag", "hub", {"activity_label": "R", "ctx": "x y", "endings": ["a", "b"], "label": "1"}, ("R: x y", " b")),
    ("hellaswag", "mosaic", {"query": "R: x y", "choices": ["a", "b"], "gold": 1}, ("R: x y", " b")),
    (
        "piqa",
        "hub",
        {"goal": "Dry?", "sol1": "Wet it.", "sol2": "Wait.", "label": 1},
        ("Question: Dry?\nAnswer:", " Wait."),
    ),
    (
        "piqa",
        "mosaic",
        {"query": "Question: Dry?", "choices": ["Wet it.", "Wait."], "gold": 1},
        ("Question: Dry?\nAnswer:", " Wait."),
    ),
    (
        "arc_easy",
        "official",
        {
            "id": "x",
            "question": {
                "stem": "What melts?",
                "choices": [{"text": "ash", "label": "1"}, {"text": "ice", "label": "2"}],
            },
            "answerKey": "2",
        },
        SCIENCE,
    ),
    (
        "arc_challenge",
        "hub",
        {"question": "What melts?", "choices": {"text": ["ash", "ice"], "label": ["A", "B"]}, "answerKey": "B"},
        SCIENCE,
    ),
    ("arc_easy", "mosaic", {"query": "Question: What melts?", "choices": ["ash", "ice"], "gold": 1}, SCIENCE),
    (
        "openbookqa",
        "hub",
        {"question_stem": "What melts?", "choices": {"text": ["ash", "ice"], "label": ["A", "B"]}, "answerKey": "B"},
        SCIENCE,
    ),
    (
        "winogrande",
        "official",
        {"qID": "q-1", "sentence": "Ann saw Eve as _ sang.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        ("Ann saw Eve as Eve", " sang."),
    ),
    (
        "winogrande",
        "mosaic",
        {"context_options": ["Ann saw Eve as Ann", "Ann saw Eve as Eve"], "continuation": "sang.", "gold": 1},
        ("Ann saw Eve as Eve", " sang."),
    ),
    (
        "race_middle",
        "rows",
        {"example_id": "middle1.txt", **RACE},
        ("Article: A fox ran.\nQuestion: Who ran?\nAnswer:", " A fox"),
    ),
    (
        "race_high",
        "official",
        {
            "id": "high1.txt",
            "article": "A fox ran.",
            "questions": ["Who ran?"],
            "options": [RACE["options"]],
            "answers": ["B"],
        },
        ("Article: A fox ran.\nQuestion: Who ran?\nAnswer:", " A fox"),
    ),
    (
        "mmlu",
        "rows",
        {"subject": "some_physics", "question": " 1+1?", "choices": EXAM[1:5], "answer": 1},
        (MMLU + LETTERED + "Answer:", " B"),
    ),
    ("ceval", "rows", dict(zip(["question", *"ABCD", "answer"], EXAM, strict=True)), (CHINESE, "B")),
    ("cmmlu", "rows", dict(zip(["Question", *"ABCD", "Answer"], EXAM, strict=True)), (CHINESE, "B")),
    ("cluewsc", "official", {**WSC, "label": "false"}, ("猫说它饿了。\n问：句中的“它”指的是“猫”吗？\n答：", "否")),
    ("cluewsc", "hub", {**WSC, "label": 0}, ("猫说它饿了。\n问：句中的“它”指的是“猫”吗？\n答：", "是")),
    (
        "chid",
        "original",
        {"content": CHID, "candidates": [["一心一意", "一言不发"]], "groundTruth": ["一言不发"]},
        ("他", "一言不发地走了。"),
    ),
    ("chid", "few", {"content": CHID, "candidates": ["一心一意", "一言不发"], "answer": 1}, ("他", "一言不发地走了。")),
]


@pytest.mark.parametrize(("name", "form", "record", "right"), FORMS, ids=[f"{f[0]}-{f[1]}" for f in FORMS])
def test_every_form_asks_the_same(name: str, form: str, record: Any, right: tuple[str, str], tmp_path: Path) -> None:
    items, skipped = TASKS[name].items(write(tmp_path / "set.jsonl", record), 0, None)
    assert skipped == 0
    assert gold_pair(items[0]) == right
    json.dumps(dict(items[0].facts))  # plain values only


@pytest.mark.parametrize("task", CHOICES, ids=lambda task: task.name)
def test_a_perfect_scorer_is_right_and_its_opposite_wrong(task: ChoiceTask, tmp_path: Path) -> None:
    record = next(record for name, _, record, _ in FORMS if name == task.name)
    item = task.items(write(tmp_path / "set.jsonl", record), 0, None)[0][0]
    options = len(item.facts["lengths"])
    rest = [-1.0] * (len(item.requests) - options)
    gold = [-1.0 if n == item.facts["gold"] else -50.0 for n in range(options)]
    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        scores = judged(task, item, [sign * value for value in gold] + rest).scores
        assert task.metric in scores
        assert set(scores.values()) == {expected}, scores


def test_text_form_of_hellaswag(tmp_path: Path) -> None:
    text = "Roof: a man. he\n1\na\nb\nc\nd\nSki: it\n3\ne\nf\ng\nh\n"
    items, skipped = TASKS["hellaswag"].items(write(tmp_path / "hellaswag.txt", text), None, None)
    assert [gold_pair(item) for item in items] == [("Roof: a man. he", " b"), ("Ski: it", " h")]
    assert (skipped, [item.id for item in items]) == (0, ["hellaswag.txt:1", "hellaswag.txt:2"])
    with pytest.raises(DataError, match="7 lines: the text form has 6"):
        TASKS["hellaswag"].items(write(tmp_path / "hellaswag.txt", text[: text.index("3")]), None, None)


def test_piqa_takes_its_labels_from_beside(tmp_path: Path) -> None:
    rows = [{"goal": f"g{n}", "sol1": "x", "sol2": "y"} for n in range(3)]
    path = write(tmp_path / "valid.jsonl", *rows)
    with pytest.raises(DataError, match="no label: its file of labels"):
        TASKS["piqa"].items(path, None, None)
    write(tmp_path / "valid-labels.lst", "1\n0\n")
    items, skipped = TASKS["piqa"].items(tmp_path, None, None)
    assert ([item.facts["gold"] for item in items], skipped) == ([1, 0], 1)


def test_race_folder_and_levels(tmp_path: Path) -> None:
    passage = {"article": "A.", "questions": ["q1", "q2"], "options": [["x", "y"]] * 2, "answers": ["A", "B"]}
    write(tmp_path / "RACE/test/middle/1.txt", {"id": "middle1.txt", **passage})
    write(tmp_path / "RACE/test/high/2.txt", {"id": "high2.txt", **passage})
    write(tmp_path / "RACE/test/high/3.txt", "{broken")
    write(tmp_path / "RACE/train/high/4.txt", {"id": "high4.txt", **passage, "article": "Train."})
    middle, skipped = TASKS["race_middle"].items(tmp_path, 0, None)
    assert ([item.id for item in middle], skipped) == (["middle1.txt/1", "middle1.txt/2"], 0)
    high, skipped = TASKS["race_high"].items(tmp_path, 1, None)
    assert ([item.id for item in high], skipped) == (["high2.txt/1", "high2.txt/2"], 1)
    assert pairs(high[0])[0] == (
        "Article: Train.\nQuestion: q1\nAnswer: x\n\nArticle: A.\nQuestion: q1\nAnswer:",
        " x",
    )


def test_mmlu_is_asked_as_its_harness_does(tmp_path: Path) -> None:
    for subject in ("some_physics", "law"):
        dev = [[f"{subject} {n}?", "a", "b", "c", "d", "C"] for n in range(6)]
        table(tmp_path / f"data/dev/{subject}_dev.csv", *dev)
        table(tmp_path / f"data/test/{subject}_test.csv", EXAM, ["too", "short"])
        table(tmp_path / f"data/val/{subject}_val.csv", ["never read", "a", "b", "c", "d", "C"])
    items, skipped = TASKS["mmlu"].items(tmp_path, 2, None)
    assert ([item.group for item in items], skipped) == (["law", "some_physics"], 2)
    shots = "".join(f"some_physics {n}?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n" for n in range(2))
    assert pairs(items[1]) == [(MMLU + shots + LETTERED + "Answer:", f" {letter}") for letter in "ABCD"]
    assert items[1].facts["shots"] == 2
    assert TASKS["mmlu"].items(tmp_path, None, None)[0][0].facts["shots"] == 5
    one_file = TASKS["mmlu"].items(tmp_path / "data/test/law_test.csv", None, None)[0]
    assert one_file[0].facts["shots"] == 5  # from the file beside it, in the other split's folder


def test_chinese_exams_read_their_folders(tmp_path: Path) -> None:
    head = ["id", "question", *"ABCD", "answer", "explanation"]
    table(tmp_path / "ceval/val/law_val.csv", head, ["0", *EXAM, ""])
    table(tmp_path / "ceval/dev/law_dev.csv", head, ["0", "2+2?", "1", "2", "3", "4", "D", "so"])
    table(tmp_path / "ceval/test/law_test.csv", head[:-2], ["0", *EXAM[:-1]])
    table(tmp_path / "cmmlu/test/law.csv", ["", "Question", *"ABCD", "Answer"], ["0", *EXAM])
    items, skipped = TASKS["ceval"].items(tmp_path, None, None)
    assert (len(items), skipped, items[0].group, items[0].facts["shots"]) == (1, 0, "law", 1)
    assert "2+2?\nA. 1\nB. 2\nC. 3\nD. 4\n答案：D\n\n1+1?" in pairs(items[0])[0][0]
    items, _ = TASKS["cmmlu"].items(tmp_path, None, None)
    assert (items[0].group, items[0].facts["shots"]) == ("law", 0)


@pytest.mark.parametrize(("label", "gold"), [("true", 0), ("False", 1), (True, 0), (False, 1), (0, 0), (1, 1)])
def test_labels_of_cluewsc(label: object, gold: int, tmp_path: Path) -> None:
    items, _ = TASKS["cluewsc"].items(write(tmp_path / "dev.json", {**WSC, "label": label}), 0, None)
    assert items[0].facts["gold"] == gold
    with pytest.raises(DataError, match=r"which is none of the 2 options|not true or false"):
        TASKS["cluewsc"].items(write(tmp_path / "dev.json", {**WSC, "label": {0: -1, 1: "1"}[gold]}), 0, None)


def test_chid_fills_the_other_blanks_and_reads_answers_beside(tmp_path: Path) -> None:
    record = {"candidates": ["甲", "乙", "丙"], "content": ["一#idiom01#二#idiom02#三", "四#idiom03#"]}
    path = write(tmp_path / "chid/dev.json", record)
    write(tmp_path / "chid/dev_answer.json", {"#idiom01#": 0, "#idiom02#": 2, "#idiom03#": 1})
    items, skipped = TASKS["chid"].items(path, None, None)
    assert [gold_pair(item) for item in items] == [("一", "甲二丙三"), ("一甲二", "丙三"), ("四", "乙")]
    assert (skipped, len({item.id for item in items})) == (0, 3)
    original = {"content": CHID, "candidates": [["一心一意", "一言不发"]], "groundTruth": ["一言不发"]}
    text = write(tmp_path / "dev_data.txt", original, "broken\n", original)
    lines, skipped = TASKS["chid"].items(text, None, None)
    assert (len(lines), skipped) == (2, 1)
    hub = {**record, "answers": {"text": ["甲", "丙", "乙"], "candidate_id": [0, 2, 1]}}
    again, _ = TASKS["chid"].items(write(tmp_path / "hub.jsonl", hub), None, None)
    assert [gold_pair(item) for item in again] == [gold_pair(item) for item in items]


# --------------------------------------------------------------------------------------------------------- judging


def choice_item(*options: str, gold: int, uncond: bool = False) -> Item:
    requests = [LogLikelihood("c", " " + option) for option in options] * (2 if uncond else 1)
    return Item("i", tuple(requests), {"gold": gold, "lengths": [len(option) for option in options], "shots": 0})


def test_length_normalisation_changes_the_winner() -> None:
    item = choice_item("no", "certainly not", gold=1)
    scores = judged(TASKS["hellaswag"], item, [-4.0, -6.0], [1, 2]).scores
    assert scores == {"accuracy": 0.0, "accuracy_norm": 1.0, "accuracy_token": 1.0}  # -2, -0.46; -4, -3
    scores = judged(TASKS["hellaswag"], item, [-4.0, -6.0], [2, 2]).scores
    assert scores == {"accuracy": 0.0, "accuracy_norm": 1.0, "accuracy_token": 0.0}  # tokens: -2, -3


def test_unconditional_normalisation_changes_the_winner() -> None:
    item = choice_item("common", "seldom", gold=1, uncond=True)
    scores = judged(TASKS["arc_easy"], item, [-3.0, -7.0, -2.0, -9.0]).scores
    assert (scores["accuracy"], scores["accuracy_norm"], scores["accuracy_uncond"]) == (0.0, 0.0, 1.0)


def test_science_asks_the_bare_options_too(tmp_path: Path) -> None:
    record = {"query": "Question: What melts?", "choices": ["ash", "ice"], "gold": 1}
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        item = TASKS[name].items(write(tmp_path / "set.jsonl", record), None, None)[0][0]
        assert pairs(item)[2:] == [("Answer:", " ash"), ("Answer:", " ice")]


def test_ties_share_the_credit() -> None:
    item = choice_item("ab", "cd", "ef", gold=1)
    assert judged(TASKS["piqa"], item, [-2.0, -2.0, -3.0]).scores["accuracy"] == 0.5
    assert judged(TASKS["piqa"], item, [-2.0] * 3).scores["accuracy"] == pytest.approx(1 / 3)
    assert judged(TASKS["piqa"], item, [-2.0, -3.0, -2.0]).scores["accuracy"] == 0.0


@given(st.lists(st.floats(-1e3, 0), min_size=1, max_size=6))
def test_credit_adds_up_to_one_over_the_options(values: list[float]) -> None:
    assert math.fsum(credit(values, gold) for gold in range(len(values))) == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_score_that_is_no_number_is_an_error_not_a_wrong_answer(bad: float) -> None:
    found = judged(TASKS["piqa"], choice_item("a", "b", gold=0), [bad, -1.0])
    assert (found.outcome, dict(found.scores)) == ("error", {})


# ----------------------------------------------------------------------------------------------------- the table


def test_the_table() -> None:
    assert all(task.name == name for name, task in TASKS.items())
    shots = {name: task.shots for name, task in TASKS.items() if task.shots}
    assert shots == {
        "race_middle": 5,
        "race_high": 5,
        "mmlu": 5,
        "ceval": 5,
        "cmmlu": 5,
        "cluewsc": 5,
        "triviaqa": 5,
        "natural_questions": 5,
        "drop": 1,
        "bbh": 3,
        "bbh_direct": 3,
        "gsm8k": 8,
        "math": 4,
        "mbpp": 3,
    }
    uncond = [name for name, task in TASKS.items() if task.metric == "accuracy_uncond"]
    assert uncond == ["arc_easy", "arc_challenge", "openbookqa"]
    with pytest.raises(ConfigError, match="did you mean hellaswag"):
        find_task("hellaswg")
    with pytest.raises(ConfigError, match="the tasks are text, lambada"):
        find_task("zzz")


def test_what_is_shown_is_what_is_sent(tmp_path: Path) -> None:
    record = {"query": "Question: What melts?", "choices": ["ash", "ice"], "gold": 1}
    task = TASKS["arc_easy"]
    item = task.items(write(tmp_path / "arc_easy.jsonl", record), None, None)[0][0]
    assert describe(task, item).split("\n") == [
        "arc_easy arc_easy.jsonl:1: requests 4, worked examples 0",
        "--- 1 of 4: context",
        "Question: What melts?",
        "Answer:",
        "--- 1 of 4: scored: ' ash'",
        "--- 2 of 4: context as in 1",
        "--- 2 of 4: scored: ' ice'",
        "--- 3 of 4: context",
        "Answer:",
        "--- 3 of 4: scored: ' ash'",
        "--- 4 of 4: context as in 3",
        "--- 4 of 4: scored: ' ice'",
        "--- end",
    ]
