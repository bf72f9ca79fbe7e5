"""Short written answers: TriviaQA and NaturalQuestions without a document, DROP with its passage, BIG-Bench Hard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from finemoe.evaluation.forms.finding import EVERY, TEST, TRAIN, VALIDATION, WORKED, DataForm, Hub
from finemoe.evaluation.forms.generation import GenerationTask
from finemoe.evaluation.forms.questions import Question, QuestionReader, put
from finemoe.evaluation.records import Record, Unreadable, text_of
from finemoe.evaluation.task import Judged
from finemoe.text.answers import compare_words, drop_exact_match, drop_f1, exact_match, split_list, token_f1


def _texts(value: object) -> list[str]:
    """The texts of a list, or the one text; nothing of anything else."""
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, str) and entry.strip()]


def _short(record: Record, question: str, golds: list[str], name: object) -> Question:
    if not golds:
        raise Unreadable("no answer")
    prompt = put(question)
    distinct = list(dict.fromkeys(golds))
    return Question(str(name or record.name), prompt, f"{prompt} {distinct[0]}", facts={"golds": distinct})


def _triviaqa(record: Record) -> Question:
    value = record.value
    question = text_of(record, "question", "Question", "context")
    answer = value.get("answer", value.get("Answer"))
    if isinstance(answer, dict):  # the published form (Value, Aliases) and the hub's (value, aliases)
        golds = [text for key in ("value", "Value", "aliases", "Aliases") for text in _texts(answer.get(key))]
    else:
        golds = _texts(answer) + _texts(value.get("aliases"))
    return _short(record, question, golds, value.get("question_id", value.get("QuestionId")))


def _natural_questions(record: Record) -> Question:
    golds = _texts(record.value.get("answer", record.value.get("answers")))
    return _short(record, text_of(record, "question"), golds, None)


def first_line(text: str) -> str:
    """What is written before the first line end."""
    return text.strip().split("\n")[0].strip()


def _worth_of_short(facts: Mapping[str, Any], text: str) -> Judged:
    given = first_line(text)
    if not given:  # a gold answer of articles alone, normalised, is nothing too
        return Judged({"exact_match": 0.0, "f1": 0.0}, "no_answer")
    golds = facts["golds"]
    return Judged({"exact_match": float(exact_match(given, golds)), "f1": token_f1(given, golds)})


# ------------------------------------------------------------------------------------------------------ DROP


def _drop_parts(record: Record) -> Iterable[Record]:
    """The published form is one object: passages by id, each with its questions."""
    if "question" in record.value:
        return (record,)
    parts = []
    for section, content in record.value.items():
        pairs = content.get("qa_pairs") if isinstance(content, dict) else None
        if not isinstance(pairs, list):
            raise Unreadable(f"{section}: no passage with a list of qa_pairs")
        for number, pair in enumerate(pairs, start=1):
            value = {"passage": content.get("passage"), **(pair if isinstance(pair, dict) else {})}
            parts.append(Record(value, f"{record.where}:{section}:{number}", section, number))
    return parts


def _drop_spans(answer: object) -> list[str]:
    """A number, a date or the spans, whichever the answer has."""
    if not isinstance(answer, dict):
        return []
    number = str(answer.get("number") or "").strip()
    if number:
        return [number]
    spans = _texts(answer.get("spans"))
    if spans:
        return spans
    date = answer.get("date")
    written = [str(date.get(part) or "").strip() for part in ("day", "month", "year")] if isinstance(date, dict) else []
    return [" ".join(part for part in written if part)] if any(written) else []


def _drop(record: Record) -> Question:
    value = record.value
    if "answers_spans" in value:  # rows of the hub
        golds = [_drop_spans(value["answers_spans"])]
    else:
        validated = value.get("validated_answers")
        answers = [value.get("answer"), *(validated if isinstance(validated, list) else [])]
        golds = [_drop_spans(answer) for answer in answers]
    golds = [spans for n, spans in enumerate(golds) if spans and spans not in golds[:n]]
    if not golds:
        raise Unreadable("no answer: neither number, date nor spans")
    prompt = f"Passage: {text_of(record, 'passage').strip()}\n{put(text_of(record, 'question'))}"
    name = str(value.get("query_id") or record.name)
    return Question(name, prompt, f"{prompt} {', '.join(golds[0])}", facts={"golds": golds})


def _is_exactly(given: str, spans: list[str]) -> bool:
    """One span as DROP compares it; several in any order, between commas, `and` or `or`."""
    if len(spans) == 1:
        return drop_exact_match(given, [spans])
    pieces = split_list(given)
    all_right = all(drop_exact_match(piece, [[span] for span in spans]) for piece in pieces)
    all_there = all(drop_exact_match(span, [[piece] for piece in pieces]) for span in spans)
    return len(pieces) == len(spans) and all_right and all_there


def _worth_of_drop(facts: Mapping[str, Any], text: str) -> Judged:
    given = first_line(text)
    if not given:
        return Judged({"exact_match": 0.0, "f1": 0.0}, "no_answer")
    golds: list[list[str]] = facts["golds"]
    exact = any(_is_exactly(given, spans) for spans in golds)
    return Judged({"exact_match": float(exact), "f1": 1.0 if exact else drop_f1(given, golds)})


# ------------------------------------------------------------------------------------------- BIG-Bench Hard


_STEPS = "Let's think step by step.\n"


def _bbh(record: Record) -> Question:
    target = text_of(record, "target").strip()
    prompt = f"Q: {text_of(record, 'input').strip()}\nA:"
    return Question(record.name, prompt, f"{prompt} {target}", record.stem, facts={"gold": target})


def _bbh_in_steps(record: Record) -> Question:
    """With its reasoning, where the record is a worked example."""
    prompt = f"Q: {text_of(record, 'input').strip()}\nA: {_STEPS}"
    if "worked" in record.value:
        return Question(record.name, prompt, record.value["worked"], record.stem)
    return Question(record.name, prompt, "", record.stem, facts={"gold": text_of(record, "target").strip()})


def _bbh_parts(record: Record) -> Iterable[Record]:
    """A file of worked examples: remarks, a line of hyphens, the task, then `Q: ... A: ...` between blank lines."""
    if set(record.value) != {"text"}:
        return (record,)
    _, line, body = record.value["text"].partition("-----\n")
    task, *examples = re.split(r"\n\n(?=Q: )", body.strip())
    if not line or not examples:
        raise Unreadable("not remarks, a line `-----`, the task and examples `Q: ...`")
    parts = []
    for number, example in enumerate(examples, start=1):
        question = example.removeprefix("Q: ").partition("\nA:")[0]
        worked = f"{task}\n\n{example}" if number == 1 else example
        parts.append(Record({"input": question, "worked": worked}, record.where, record.path, number))
    return parts


def _same(gold: str, given: str) -> float:
    """Numbers by their value; of words neither case nor the full stop nor the brackets of an option matter."""
    return float(compare_words(gold, given) == "equal")


def _worth_of_bbh(facts: Mapping[str, Any], text: str) -> Judged:
    given = first_line(text)
    return Judged({"exact_match": _same(facts["gold"], given)}, "answered" if given else "no_answer")


def _worth_of_bbh_in_steps(facts: Mapping[str, Any], text: str) -> Judged:
    said = re.findall(r"answer is:? *([^\n]+)", text, re.IGNORECASE)
    if not said:
        return Judged({"exact_match": 0.0}, "no_answer", note="`the answer is` was not written")
    return Judged({"exact_match": _same(facts["gold"], said[-1])})


_TRIVIAQA = DataForm(
    (r"trivia[-_ ]?qa",),
    (*VALIDATION, "test"),
    TRAIN,
    "TriviaQA's JSON (Data: Question, Answer), rows of the hub, {context, answer, aliases}",
    Hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation", "train"),
)
_NQ = DataForm(
    (r"(?<![a-z])nq(?![a-z])|natural[-_ ]?questions",),
    (*VALIDATION, "test"),
    TRAIN,
    "NQ-open's JSON Lines {question, answer}, rows of the hub",
    Hub("google-research-datasets/nq_open", None, "validation", "train"),
)
_DROP = DataForm(
    (r"(?<![a-z])drop(?![a-z])",),
    VALIDATION,
    TRAIN,
    "DROP's JSON (passages with qa_pairs), rows of the hub {passage, question, answers_spans}",
    Hub("ucinlp/drop", None, "validation", "train"),
)
_BBH = DataForm(
    (r"(?<![a-z])bbh(?![a-z])|big[-_ ]?bench[-_ ]?hard|cot-prompts/",),
    TEST,
    (),
    "BIG-Bench Hard's JSON files (examples: input, target), a task a file",
    Hub("SaylorTwift/bbh", EVERY, "test"),
)
_BBH_IN_STEPS = replace(
    _BBH,
    shots=WORKED,
    forms=_BBH.forms + ", with its folder cot-prompts beside them",
    suffixes=(*_BBH.suffixes, ".txt"),
)
_LINE = ("\n",)

CLOSED_BOOK: tuple[GenerationTask, ...] = (
    GenerationTask(
        "triviaqa",
        "TriviaQA",
        "exact_match",
        5,
        QuestionReader(_TRIVIAQA, _triviaqa, pinned="closed_book.jsonl"),
        _worth_of_short,
        _LINE,
        32,
    ),
    GenerationTask(
        "natural_questions",
        "NaturalQuestions",
        "exact_match",
        5,
        QuestionReader(_NQ, _natural_questions, pinned="closed_book.jsonl"),
        _worth_of_short,
        _LINE,
        32,
    ),
    GenerationTask(
        "drop",
        "DROP",
        "exact_match",
        1,
        QuestionReader(_DROP, _drop, _drop_parts, pinned="drop.jsonl"),
        _worth_of_drop,
        _LINE,
        64,
    ),
    GenerationTask(
        "bbh",
        "BIG-Bench Hard",
        "exact_match",
        3,
        QuestionReader(_BBH_IN_STEPS, _bbh_in_steps, _bbh_parts, by_group=True),
        _worth_of_bbh_in_steps,
        ("\nQ:",),
        512,
    ),
    GenerationTask(
        "bbh_direct",
        "BIG-Bench Hard, without reasoning",
        "exact_match",
        3,
        QuestionReader(_BBH, _bbh, by_group=True, held_out=True),
        _worth_of_bbh,
        _LINE,
        64,
    ),
)
