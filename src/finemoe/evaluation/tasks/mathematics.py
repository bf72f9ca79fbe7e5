"""Worked mathematics: GSM8K and MATH. The answer is read out of the solution and compared as a quantity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finemoe.evaluation.forms.finding import EVERY, TEST, TRAIN, DataForm, Hub
from finemoe.evaluation.forms.generation import GenerationTask
from finemoe.evaluation.forms.questions import Question, QuestionReader
from finemoe.evaluation.records import Record, Unreadable, text_of
from finemoe.evaluation.task import Judged
from finemoe.text.answers import Equality, boxed, compare_latex, compare_numbers, final_number

_CALCULATION = re.compile(r"<<[^<>]*>>")
_HINT = re.compile(r"\s*Please reason step by step, and put your final answer within \\boxed\{\}\.?\s*$")
_SAID = re.compile(r"answer\s+is:?\s*\$?(.+?)\$?\s*(?:\.\s|\.?$)", re.IGNORECASE | re.MULTILINE)


def _gsm8k(record: Record) -> Question:
    """The solution ends in `#### N`; the calculator's marks `<<2+3=5>>` are left out of examples."""
    solution = text_of(record, "answer").strip()
    _, mark, gold = solution.rpartition("####")
    if not mark or final_number(gold) is None:
        raise Unreadable("the solution does not end in `#### N` with a number N")
    prompt = f"Question: {text_of(record, 'question').strip()}\nAnswer:"
    return Question(record.name, prompt, f"{prompt} {_CALCULATION.sub('', solution)}", facts={"gold": gold.strip()})


def _math(record: Record) -> Question:
    """`answer` where the record has one, else what the solution's last box holds."""
    value = record.value
    problem = _HINT.sub("", text_of(record, "problem", "prompt")).strip()
    solution = value.get("solution")
    answer = value.get("answer")
    gold = answer if isinstance(answer, str) else boxed(solution) if isinstance(solution, str) else None
    if gold is None or not gold.strip():
        raise Unreadable("neither an `answer` nor a `solution` with a box")
    written = solution.strip() if isinstance(solution, str) else f"The answer is $\\boxed{{{gold}}}$."
    prompt = f"Problem:\n{problem}\n\nSolution:"
    group = value.get("type", value.get("subject"))
    level = value.get("level")
    facts = {"gold": gold, **({"level": str(level)} if level is not None else {})}
    return Question(
        str(value.get("unique_id", record.name)),
        prompt,
        f"{prompt} {written}",
        str(group) if group else None,
        facts=facts,
    )


def _judged(comparison: Equality, given: str, gold: str) -> Judged:
    """A checker that fails says nothing of the model; what it cannot compare scores as wrong and is counted apart."""
    if comparison == "error":
        return Judged({}, "error", note=f"the comparison of {given!r} with {gold!r} broke off")
    if comparison == "unreadable":
        return Judged({"accuracy": 0.0}, "undecided", note=f"{given!r} cannot be compared with {gold!r}")
    return Judged({"accuracy": float(comparison == "equal")})


def _worth_of_number(facts: Mapping[str, Any], text: str) -> Judged:
    given = final_number(text)
    if given is None:
        return Judged({"accuracy": 0.0}, "no_answer", note="no number was written")
    return _judged(compare_numbers(facts["gold"], given), given, facts["gold"])


def _worth_of_latex(facts: Mapping[str, Any], text: str) -> Judged:
    given = boxed(text)
    if given is None:
        said = _SAID.findall(text)
        given = said[-1].strip() if said else None
    if not given:
        return Judged({"accuracy": 0.0}, "no_answer", note="neither a box nor `the answer is` was written")
    return _judged(compare_latex(facts["gold"], given), given, facts["gold"])


_GSM8K = DataForm(
    (r"gsm[-_ ]?8k",),
    TEST,
    TRAIN,
    "GSM8K's JSON Lines {question, answer ending in #### N}, rows of the hub",
    Hub("openai/gsm8k", "main", "test", "train"),
)
_MATH = DataForm(
    (r"(?<![a-z])math(?![a-z])",),
    TEST,
    TRAIN,
    "MATH's folder (test/algebra/1.json ...), JSON Lines {problem, solution} or {problem, answer}, rows of the hub",
    Hub("EleutherAI/hendrycks_math", EVERY, "test", "train"),
)

MATHEMATICS: tuple[GenerationTask, ...] = (
    GenerationTask(
        "gsm8k",
        "GSM8K",
        "accuracy",
        8,
        QuestionReader(_GSM8K, _gsm8k, pinned="gsm8k.jsonl"),
        _worth_of_number,
        ("\nQuestion:",),
        512,
    ),
    GenerationTask(
        "math",
        "MATH",
        "accuracy",
        4,
        QuestionReader(_MATH, _math, pinned="math.jsonl"),
        _worth_of_latex,
        ("\nProblem:",),
        1024,
    ),
)
