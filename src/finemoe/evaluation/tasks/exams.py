"""Exams with lettered options: MMLU, C-Eval, CMMLU. The letter is scored, after five questions of the same subject."""

from __future__ import annotations

import re
from collections.abc import Callable

from finemoe.evaluation.forms.choices import ChoiceTask
from finemoe.evaluation.forms.finding import EVERY, TEST, DataForm, Hub
from finemoe.evaluation.forms.questions import Question, QuestionReader
from finemoe.evaluation.records import Record, Unreadable, choice_of, text_of, texts_of

_LETTERS = "ABCD"


def _subject(record: Record) -> str:
    """Of the record itself, else of the file's name without the split."""
    named = record.value.get("subject")
    stem = re.sub(r"[-_.](test|val|dev)$", "", record.stem)
    return named if isinstance(named, str) and named else stem


def _lettered(record: Record, options: tuple[str, ...], answer: str, blank: str) -> Question:
    """The question, its options a line each, and the letters to choose from."""
    if len(options) != len(_LETTERS):
        raise Unreadable(f"{len(options)} options, not {len(_LETTERS)}")
    gold = choice_of(record.value.get("answer", record.value.get("Answer")), len(options))
    lines = [text_of(record, "question", "Question").strip()]
    lines += [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    context = "\n".join([*lines, answer])
    pairs = tuple((context, blank + letter) for letter in _LETTERS)
    subject = _subject(record)
    name = f"{subject}/{record.value['id']}" if "id" in record.value else record.name
    return Question(name, context, "".join(pairs[gold]), subject, pairs, {"gold": gold})


def _mmlu(record: Record) -> Question:
    cells = record.value.get("cells")
    if isinstance(cells, list):  # the published CSV: question, four options, letter; no header
        if len(cells) != len(_LETTERS) + 2:
            raise Unreadable(f"{len(cells)} cells, not question, four options and a letter")
        value = {"question": cells[0], "choices": cells[1:-1], "answer": cells[-1]}
        record = Record(value, record.where, record.path, record.number)
    return _lettered(record, texts_of(record, "choices"), "Answer:", " ")


def _chinese_exam(record: Record) -> Question:
    options = tuple(str(record.value[letter]) for letter in _LETTERS if record.value.get(letter) is not None)
    return _lettered(record, options, "答案：", "")


def _english_header(group: str | None) -> str:
    subject = (group or "").replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _chinese_header(group: str | None) -> str:
    return "以下是单项选择题，每题只有一个正确答案。\n\n"


def _exam(
    name: str, title: str, form: DataForm, read: Callable[[Record], Question], header: Callable[[str | None], str]
) -> ChoiceTask:
    return ChoiceTask(name, title, "accuracy", 5, 0.25, QuestionReader(form, read, by_group=True), header)


_DEV = ("dev",)
_MMLU = DataForm(
    (r"(?<![a-z])mmlu(?![a-z])",),
    TEST,
    _DEV,
    "MMLU's folder of CSV files (test/, dev/), rows {subject, question, choices, answer}",
    Hub("cais/mmlu", "all", "test", "dev"),
    header=False,
)
_CEVAL = DataForm(
    (r"(?<![a-z])c[-_]?eval(?![a-z])",),
    ("val", "validation"),
    _DEV,
    "C-Eval's folder of CSV files (val/, dev/), rows {question, A, B, C, D, answer}; the test split has no answers",
    Hub("ceval/ceval-exam", EVERY, "val", "dev"),
)
_CMMLU = DataForm(
    (r"(?<![a-z])cmmlu(?![a-z])",),
    TEST,
    _DEV,
    "CMMLU's folder of CSV files (test/, dev/), rows {Question, A, B, C, D, Answer}",
    Hub("haonan-li/cmmlu", EVERY, "test", "dev"),
)

EXAMS: tuple[ChoiceTask, ...] = (
    _exam("mmlu", "MMLU", _MMLU, _mmlu, _english_header),
    _exam("ceval", "C-Eval", _CEVAL, _chinese_exam, _chinese_header),
    _exam("cmmlu", "CMMLU", _CMMLU, _chinese_exam, _chinese_header),
)
