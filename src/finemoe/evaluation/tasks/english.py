"""English multiple choice: HellaSwag, PIQA, ARC, OpenBookQA, WinoGrande, RACE. Zero worked examples but for RACE."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finemoe.evaluation.forms.choices import ChoiceTask
from finemoe.evaluation.forms.finding import TEST, TRAIN, VALIDATION, DataForm, Hub
from finemoe.evaluation.forms.questions import Question, QuestionReader, put, question_of
from finemoe.evaluation.records import Record, Unreadable, choice_of, text_of, texts_of

_TEXT_LINES = 6  # of a HellaSwag task in the text form: context, index of the right ending, four endings


def _mosaic(record: Record) -> tuple[str, tuple[str, ...], int] | None:
    """Query, options and gold of a record in the form {query, choices, gold}; None in any other form."""
    if "query" not in record.value or "gold" not in record.value:
        return None
    options = texts_of(record, "choices")
    return text_of(record, "query"), options, choice_of(record.value["gold"], len(options))


# ------------------------------------------------------------------------------------------------- HellaSwag


def _clean(text: str) -> str:
    """Without the marks of the WikiHow part: a title is a new sentence, other marks are nothing."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag_parts(record: Record) -> Iterable[Record]:
    """The text form holds all tasks in one file, six lines each."""
    if set(record.value) != {"text"}:
        return (record,)
    lines = record.value["text"].removesuffix("\n").split("\n")
    if len(lines) % _TEXT_LINES:
        raise Unreadable(f"{len(lines)} lines: the text form has {_TEXT_LINES} for each task")
    parts = []
    for number in range(len(lines) // _TEXT_LINES):
        query, gold, *endings = lines[number * _TEXT_LINES : (number + 1) * _TEXT_LINES]
        value = {"query": query, "gold": gold, "choices": endings}
        where = f"{record.where.rpartition(':')[0]}:{number * _TEXT_LINES + 1}"
        parts.append(Record(value, where, record.path, number + 1))
    return parts


def _hellaswag(record: Record) -> Question:
    plain = _mosaic(record)
    if plain:
        return question_of(record, *plain)
    endings = texts_of(record, "endings")
    first, second = record.value.get("ctx_a"), record.value.get("ctx_b")
    if isinstance(first, str) and isinstance(second, str):
        context = first + " " + second.capitalize()
    else:
        context = text_of(record, "ctx")
    query = _clean(f"{text_of(record, 'activity_label')}: {context}")
    gold = choice_of(record.value.get("label"), len(endings))
    return question_of(record, query, [_clean(ending) for ending in endings], gold)


# ------------------------------------------------------------------------------------------------------ PIQA


def _piqa_labels(path: Path) -> Callable[[int], Mapping[str, Any]]:
    """The right answers stand in a file beside the questions: valid.jsonl, valid-labels.lst."""
    labels = path.with_name(path.name.split(".")[0] + "-labels.lst")
    lines = labels.read_text(encoding="utf-8").split("\n") if labels.is_file() else []
    return lambda number: {"label": lines[number - 1]} if number <= len(lines) else {}


def _piqa(record: Record) -> Question:
    plain = _mosaic(record)
    if plain:
        query, options, gold = plain
        return question_of(record, put(query), options, gold)
    if "label" not in record.value:
        raise Unreadable("no label: its file of labels (NAME-labels.lst) is not beside it, or too short")
    options = (text_of(record, "sol1"), text_of(record, "sol2"))
    return question_of(record, put(text_of(record, "goal")), options, choice_of(record.value["label"], 2))


# ------------------------------------------------------------------------------------ ARC and OpenBookQA


def _science(record: Record) -> Question:
    plain = _mosaic(record)
    if plain:
        query, options, gold = plain
        return question_of(record, put(query), options, gold)
    nested = record.value.get("question")
    if isinstance(nested, dict):  # the published form: {"question": {"stem", "choices": [{"text", "label"}]}}
        stem, choices = nested.get("stem"), nested.get("choices")
        listed = choices if isinstance(choices, list) else []
        texts = [choice.get("text") for choice in listed if isinstance(choice, dict)]
        labels = [choice.get("label") for choice in listed if isinstance(choice, dict)]
    else:  # the hub's: {"question" or "question_stem", "choices": {"text": [...], "label": [...]}}
        stem = text_of(record, "question", "question_stem")
        choices = record.value.get("choices")
        choices = choices if isinstance(choices, dict) else {}
        texts, labels = list(choices.get("text") or []), list(choices.get("label") or [])
    answer = record.value.get("answerKey")
    if not isinstance(stem, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise Unreadable("no question with a list of choices")
    if answer not in labels:
        raise Unreadable(f"the right answer is {answer!r}, which is none of the labels {labels}")
    return question_of(record, put(stem), [str(text) for text in texts], labels.index(answer))


# ------------------------------------------------------------------------------------------------ WinoGrande


def _winogrande(record: Record) -> Question:
    """The option stands within the context, and the rest of the sentence is scored: the same words for both."""
    if "context_options" in record.value:
        contexts = texts_of(record, "context_options")
        gold = choice_of(record.value.get("gold"), len(contexts))
        rest = " " + text_of(record, "continuation").strip()
    else:
        before, blank, after = text_of(record, "sentence").partition("_")
        if not blank:
            raise Unreadable("no blank `_` in the sentence")
        contexts = (before + text_of(record, "option1"), before + text_of(record, "option2"))
        gold = choice_of(record.value.get("answer"), 2, first=1)
        rest = " " + after.strip()
    name = record.value.get("qID", record.name)
    pairs = tuple((context, rest) for context in contexts)
    return Question(str(name), "", contexts[gold] + rest, None, pairs, {"gold": gold})


# ------------------------------------------------------------------------------------------------------ RACE


def _race_parts(record: Record) -> Iterable[Record]:
    """The published form holds a passage with all its questions in a file."""
    value: Any = record.value
    if set(value) == {"text"}:
        try:
            value = json.loads(value["text"])
        except ValueError as error:
            raise Unreadable(f"not a JSON passage: {error}") from error
    if not isinstance(value, dict):
        raise Unreadable("not a JSON object")
    if "questions" not in value:
        return (Record(value, record.where, record.path, record.number),)
    lists = [value.get(key) for key in ("questions", "options", "answers")]
    if not all(isinstance(entries, list) and len(entries) == len(lists[0] or []) for entries in lists):
        raise Unreadable("questions, options and answers are not lists of one length")
    parts = []
    for number, (question, options, answer) in enumerate(zip(*(entries or [] for entries in lists), strict=True)):
        part = {"article": value.get("article"), "question": question, "options": options, "answer": answer}
        part["id"] = f"{value.get('id', record.name)}/{number + 1}"
        parts.append(Record(part, record.where, record.path, record.number))
    return parts


def _race(level: str) -> Callable[[Record], Question | None]:
    other = {"middle": "high", "high": "middle"}[level]

    def read(record: Record) -> Question | None:
        source = str(record.value.get("example_id", record.value.get("id", "")))
        if source.startswith(other) or other in record.path.lower().split("/")[:-1]:
            return None
        options = texts_of(record, "options")
        gold = choice_of(record.value.get("answer"), len(options))
        article = text_of(record, "article").strip()
        asked = f"Article: {article}\nQuestion: {text_of(record, 'question').strip()}\nAnswer:"
        return question_of(record, asked, [option.strip() for option in options], gold)

    return read


def _form(pattern: str, asked: tuple[str, ...], forms: str, dataset: str, config: str | None = None) -> DataForm:
    split = "test" if asked == TEST else "validation"
    return DataForm((pattern,), asked, TRAIN, forms, Hub(dataset, config, split, "train"))


_SCIENCE_FORMS = "the published JSON Lines (question.stem), rows of the hub, {query, choices, gold}"


def _science_task(name: str, title: str, chance: float, pattern: str, dataset: str, config: str) -> ChoiceTask:
    form = _form(pattern, TEST, _SCIENCE_FORMS, dataset, config)
    return ChoiceTask(
        name, title, "accuracy_uncond", 0, chance, QuestionReader(form, _science), unconditional="Answer:"
    )


def _race_task(level: str) -> ChoiceTask:
    forms = "RACE's folder (test/middle/1.txt ...), its files, rows {article, question, options, answer}"
    form = replace(
        _form(r"(?<![a-z])race(?![a-z])", TEST, forms, "ehovy/race", level),
        patterns=(rf"(?<![a-z])race(?![a-z]).*{level}", r"(?<![a-z])race(?![a-z])"),
        suffixes=(".txt", ".jsonl", ".ndjson", ".json", ".parquet"),
    )
    reader = QuestionReader(form, _race(level), _race_parts, pinned="race.jsonl")
    return ChoiceTask(f"race_{level}", f"RACE-{level}", "accuracy_norm", 5, 0.25, reader)


_HELLASWAG = replace(
    _form(
        r"hella[-_ ]?swag",
        VALIDATION,
        "HellaSwag's JSON Lines, rows of the hub, text of six lines a task, {query, choices, gold}",
        "Rowan/hellaswag",
    ),
    suffixes=(".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt"),
)
_PIQA = replace(
    _form(r"piqa", VALIDATION, "valid.jsonl with valid-labels.lst beside it, rows of the hub", "baber/piqa"),
    beside=_piqa_labels,
)
_WINOGRANDE = _form(
    r"wino[-_ ]?grande",
    VALIDATION,
    "WinoGrande's JSON Lines, rows of the hub, {context_options, continuation, gold}",
    "allenai/winogrande",
    "winogrande_xl",
)

ENGLISH: tuple[ChoiceTask, ...] = (
    ChoiceTask(
        "hellaswag", "HellaSwag", "accuracy_norm", 0, 0.25, QuestionReader(_HELLASWAG, _hellaswag, _hellaswag_parts)
    ),
    ChoiceTask("piqa", "PIQA", "accuracy_norm", 0, 0.5, QuestionReader(_PIQA, _piqa)),
    _science_task("arc_easy", "ARC-easy", 0.25, r"(?<![a-z])arc[-_ ]?e(asy)?(?![a-z])", "allenai/ai2_arc", "ARC-Easy"),
    _science_task(
        "arc_challenge",
        "ARC-challenge",
        0.25,
        r"(?<![a-z])arc[-_ ]?c(hallenge)?(?![a-z])",
        "allenai/ai2_arc",
        "ARC-Challenge",
    ),
    _science_task(
        "openbookqa", "OpenBookQA", 0.25, r"open[-_ ]?book[-_ ]?qa|(?<![a-z])obqa", "allenai/openbookqa", "main"
    ),
    ChoiceTask("winogrande", "WinoGrande", "accuracy", 0, 0.5, QuestionReader(_WINOGRANDE, _winogrande)),
    _race_task("middle"),
    _race_task("high"),
)
"""Chance is that of the usual number of options; a few ARC questions have three or five."""
