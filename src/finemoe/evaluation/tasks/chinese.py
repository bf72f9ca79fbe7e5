"""Chinese multiple choice: CLUEWSC (whom does a pronoun mean) and ChID (which idiom fits)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from finemoe.evaluation.forms.choices import ChoiceTask
from finemoe.evaluation.forms.finding import TRAIN, VALIDATION, DataForm, Hub
from finemoe.evaluation.forms.questions import Question, QuestionReader
from finemoe.evaluation.records import Record, Unreadable, choice_of, text_of, texts_of

_YES_NO = ("是", "否")
_BLANK = re.compile(r"#idiom\d*#")


def _cluewsc(record: Record) -> Question:
    target = record.value.get("target")
    if not isinstance(target, dict):
        raise Unreadable("no `target` with the two spans")
    spans = [target.get(key) for key in ("span1_text", "span2_text")]
    if not all(isinstance(span, str) and span for span in spans):
        raise Unreadable("`target` lacks span1_text or span2_text")
    label = record.value.get("label")
    if isinstance(label, int) and not isinstance(label, bool):  # the hub numbers the words "true", "false": 0 is yes
        gold = choice_of(label, len(_YES_NO))
    elif (word := str(label).lower()) in ("true", "false"):
        gold = ("true", "false").index(word)
    else:
        raise Unreadable(f"label is {label!r}, not true or false")
    context = f"{text_of(record, 'text').strip()}\n问：句中的“{spans[1]}”指的是“{spans[0]}”吗？\n答："
    pairs = tuple((context, word) for word in _YES_NO)
    return Question(record.name, context, "".join(pairs[gold]), None, pairs, {"gold": gold})


def _chid_answers(path: Path) -> Callable[[int], Mapping[str, Any]]:
    """CLUE's form has the answers in a file beside the passages: dev.json, dev_answer.json."""
    name, dot, suffix = path.name.partition(".")
    beside = path.with_name(f"{name}_answer{dot}{suffix}")
    if not beside.is_file():
        return lambda number: {}
    try:
        answers = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        return lambda number: {}  # each passage is then skipped, as one without an answer
    return lambda number: {"answers": answers}


def _chid_parts(record: Record) -> Iterable[Record]:
    """One record a blank. Other blanks of the same passage hold their right idioms."""
    contents = record.value.get("content")
    candidates = record.value.get("candidates")
    passages = [text for text in (contents if isinstance(contents, list) else [contents]) if isinstance(text, str)]
    if not isinstance(candidates, list) or not candidates:
        raise Unreadable("no list of `candidates`")
    if not passages or not all(_BLANK.search(passage) for passage in passages):
        raise Unreadable("no `content` with a blank #idiom#")
    parts: list[Record] = []
    for passage in passages:
        between = _BLANK.split(passage)
        options, golds = [], []
        for number, mark in enumerate(_BLANK.findall(passage)):
            several = isinstance(candidates[0], list)
            options.append(candidates[number % len(candidates)] if several else candidates)
            golds.append(_chid_gold(record.value, mark, len(parts) + number, options[-1]))
        right = [words[gold] for words, gold in zip(options, golds, strict=True)]
        filled = [word + text for word, text in zip(right, between[1:], strict=True)]
        for number, words in enumerate(options):
            part = {
                "before": between[0] + "".join(filled[:number]),
                "after": between[number + 1] + "".join(filled[number + 1 :]),
                "options": words,
                "gold": golds[number],
            }
            parts.append(Record(part, record.where, record.name, len(parts) + 1))
    return parts


def _chid_gold(value: Mapping[str, Any], mark: str, number: int, options: list[str]) -> int:
    """Of blank `number` of the record: the idiom itself, or its index, by mark or by place."""
    truth, answers = value.get("groundTruth"), value.get("answers")
    if isinstance(truth, list) and number < len(truth) and truth[number] in options:
        return options.index(truth[number])
    found = value.get("answer")
    if isinstance(answers, dict):
        listed = answers.get("candidate_id")
        in_order = isinstance(listed, list)
        found = dict(enumerate(listed or [])).get(number) if in_order else answers.get(mark)
    return choice_of(found, len(options))


def _chid(record: Record) -> Question:
    """The text before the blank is common to all, so its words need no scoring."""
    options = texts_of(record, "options")
    before, after, gold = (record.value[key] for key in ("before", "after", "gold"))
    pairs = tuple((before, option + after) for option in options)
    return Question(record.name, before, before + pairs[gold][1], None, pairs, {"gold": gold})


_CLUEWSC = DataForm(
    (r"clue[-_]?wsc|(?<![a-z])wsc",),
    VALIDATION,
    TRAIN,
    "CLUEWSC2020's JSON Lines {target, text, label}, rows of the hub",
    Hub("clue/clue", "cluewsc2020", "validation", "train"),
)
_CHID = DataForm(
    (r"(?<![a-z])chid(?![a-z])",),
    (*VALIDATION, "test"),
    TRAIN,
    "ChID's JSON Lines {content, candidates, groundTruth}, CLUE's with NAME_answer.json beside it, "
    "FewCLUE's {content, candidates, answer}, rows of the hub",
    Hub("clue/clue", "chid", "validation", "train"),
    suffixes=(".jsonl", ".ndjson", ".json", ".parquet", ".txt"),
    text_lines=True,
    beside=_chid_answers,
)

CHINESE: tuple[ChoiceTask, ...] = (
    ChoiceTask("cluewsc", "CLUEWSC", "accuracy", 5, 0.5, QuestionReader(_CLUEWSC, _cluewsc, pinned="cluewsc.jsonl")),
    ChoiceTask("chid", "CHID", "accuracy", 0, None, QuestionReader(_CHID, _chid, _chid_parts)),
)
"""Chance in ChID is one over the candidates: 0.1 in CLUE's form, 1/7 in FewCLUE's."""
