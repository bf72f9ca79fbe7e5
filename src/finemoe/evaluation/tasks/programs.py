"""Code that is run: HumanEval, MBPP, and lines filled in. pass@k by the unbiased estimator."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finemoe.evaluation.forms.finding import DataForm, Hub
from finemoe.evaluation.forms.generation import written, written_item
from finemoe.evaluation.forms.questions import Question, QuestionReader, Role
from finemoe.evaluation.records import Record, Unreadable, text_of, texts_of
from finemoe.evaluation.task import Answer, Generate, Item, Judged, Outcome
from finemoe.sandbox.sandbox import Limits, Verdict, execute

KS = (1, 5, 10, 20, 50, 100)
"""The k of pass@k: those up to the number of samples are given."""
_AROUND = 40  # lines of a source file shown on each side of a line to fill in
_ENDED: tuple[Literal["violation", "crash", "timeout"], ...] = (
    "violation",
    "crash",
    "timeout",
)  # ties between them go to the graver


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, 1 - C(n - c, k) / C(n, k), without large numbers."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - passed + 1, samples + 1))


@dataclass(frozen=True)
class ProgramTask:
    """A benchmark of code that has to pass tests, or of lines that have to be the right ones."""

    name: str
    title: str
    metric: str
    shots: int
    reader: QuestionReader
    stops: tuple[str, ...]
    max_new_tokens: int
    complete: Callable[[Mapping[str, Any], str], str | None]
    """The program that tests a completion, given the item's facts; None where there is nothing to run."""
    header: str = ""
    chance: float | None = None
    samples: int = 1
    temperature: float = 0.0
    limits: Limits = field(default_factory=Limits)

    def items(self, source: Path | None, shots: int | None, limit: int | None) -> tuple[Sequence[Item], int]:
        """At most `limit` problems and how many records were skipped; one request each, for all samples."""
        wanted = self.shots if shots is None else shots
        found, skipped = self.reader.questions(self.name, source, wanted, limit)
        request = Generate("", self.stops, self.max_new_tokens, self.samples, self.temperature)
        return [written_item(question, examples, self.header, request) for question, examples in found], skipped

    def judge(self, item: Item, answers: Sequence[Answer]) -> Judged:
        """Every sample is run. One that could not be judged leaves the item without a score: it did not fail."""
        answer = written(answers)
        if isinstance(answer, Judged):
            return answer
        scores: dict[str, float] = {}
        if "line" in item.facts:
            matches = [text.strip() == item.facts["line"].strip() for text in answer.texts]
            scores["exact_match"] = sum(matches) / len(matches)
        programs = [self.complete(item.facts, text) for text in answer.texts]
        if any(program is None for program in programs):
            return Judged(scores, "answered" if any(answer.texts) else "no_answer")
        runs = [execute(program, self.limits) for program in programs if program is not None]
        counts = Counter(run.verdict for run in runs)
        note = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        unusual = next((run.note for run in runs if run.note and run.verdict not in ("passed", "failed")), "")
        note += f" ({unusual})" if unusual else ""
        if counts["error"]:
            return Judged({}, "error", note=note)
        passed = counts["passed"]
        scores |= {f"pass@{k}": pass_at_k(len(runs), passed, k) for k in KS if k <= len(runs)}
        return Judged(scores, _outcome(counts), note=note)


def _outcome(counts: Counter[Verdict]) -> Outcome:
    """What most samples came to; a sample that ran to its end makes the item answered."""
    if counts["passed"] or counts["failed"]:
        return "answered"
    return max(_ENDED, key=lambda verdict: counts[verdict])


# ------------------------------------------------------------------------------------------------- HumanEval


def _humaneval(record: Record) -> Question:
    prompt = text_of(record, "prompt")
    facts = {"before": prompt, "tests": text_of(record, "test"), "entry": text_of(record, "entry_point")}
    worked = prompt + str(record.value.get("canonical_solution", ""))
    return Question(text_of(record, "task_id"), prompt, worked, facts=facts)


def _run_humaneval(facts: Mapping[str, Any], text: str) -> str | None:
    if "tests" not in facts:
        return None
    body = facts["before"] + text + facts.get("after", "")
    return f"{body}\n{facts['tests']}\ncheck({facts['entry']})\n"


# ------------------------------------------------------------------------------------------------------ MBPP


def _mbpp(record: Record) -> Question:
    tests = texts_of(record, "test_list")
    task = text_of(record, "text", "prompt").strip()
    prompt = f"Write a Python program for this task: {task}\nIt has to pass these tests:\n" + "\n".join(tests)
    prompt += "\n[BEGIN]\n"
    setup = record.value.get("test_setup_code") or "\n".join(record.value.get("test_imports") or [])
    number = record.value.get("task_id")
    if not isinstance(number, int):
        raise Unreadable(f"task_id is {number!r}, not a number")
    code = text_of(record, "code").replace("\r\n", "\n").strip()
    facts = {"number": number, "tests": [str(setup), *tests]}
    return Question(f"MBPP/{number}", prompt, f"{prompt}{code}\n[DONE]", facts=facts)


def _mbpp_role(question: Question) -> Role:
    """As the set's authors split it: 1 to 10 are examples, 11 to 510 are asked, the rest is for training."""
    number = question.facts["number"]
    return "shot" if number <= 10 else "asked" if number <= 510 else "neither"


def _run_mbpp(facts: Mapping[str, Any], text: str) -> str | None:
    return "\n".join([text, *facts["tests"]]) + "\n"


# ------------------------------------------------------------------------------------------ lines to fill in


def _infilling_parts(record: Record) -> Iterable[Record]:
    """A problem to one record for each line of its solution; a source file to one record."""
    value = record.value
    if set(value) == {"text"}:
        return (_masked_line(record, value["text"]),)
    if "suffix" in value:  # made already: prompt, suffix, canonical_solution
        return (record,)
    prompt, lines = text_of(record, "prompt"), text_of(record, "canonical_solution").split("\n")
    parts = []
    for number, line in enumerate(lines):
        if line.strip():
            before = prompt + "".join(f"{other}\n" for other in lines[:number])
            after = "\n" + "\n".join(lines[number + 1 :])
            part = {**value, "prompt": before, "suffix": after, "canonical_solution": line}
            part["task_id"] = f"{value.get('task_id', record.name)}/L{number + 1}"
            parts.append(Record(part, record.where, record.path, record.number))
    return parts


def _masked_line(record: Record, text: str) -> Record:
    """One line of a source file, drawn by the file's name: code, not the last word on a bracket."""
    lines = text.replace("\r\n", "\n").split("\n")
    likely = [n for n, line in enumerate(lines) if sum(map(str.isalnum, line)) >= 8 and line.strip()[0] not in "#\"'"]
    if not likely:
        raise Unreadable("no line of code to mask")
    digest = hashlib.sha256(record.path.encode()).digest()
    chosen = likely[int.from_bytes(digest[:8], "big") % len(likely)]
    part = {
        "task_id": f"{record.path}/L{chosen + 1}",
        "prompt": "".join(f"{line}\n" for line in lines[max(0, chosen - _AROUND) : chosen]),
        "suffix": "\n" + "\n".join(lines[chosen + 1 : chosen + 1 + _AROUND]),
        "canonical_solution": lines[chosen],
    }
    return Record(part, f"{record.where.rpartition(':')[0]}:{chosen + 1}", record.path, chosen + 1)


def _infilling(record: Record) -> Question:
    value = record.value
    suffix, line = value.get("suffix"), text_of(record, "canonical_solution")
    prompt = value.get("prompt")
    if not isinstance(suffix, str) or not isinstance(prompt, str):
        raise Unreadable("no `prompt` and `suffix` around the line")
    facts: dict[str, Any] = {"line": line}
    if isinstance(value.get("test"), str) and isinstance(value.get("entry_point"), str):
        facts |= {"before": prompt, "after": suffix, "tests": value["test"], "entry": value["entry_point"]}
    return Question(text_of(record, "task_id"), prompt, prompt + line + suffix, facts=facts, suffix=suffix)


_HUMANEVAL_HUB = Hub("openai/openai_humaneval", None, "test")
_HUMANEVAL = DataForm(
    (r"human[-_ ]?eval(?!.*infilling)",), ("test",), (), "HumanEval.jsonl(.gz), rows of the hub", _HUMANEVAL_HUB
)
_MBPP = DataForm(
    (r"(?<![a-z])mbpp",),
    ("test",),
    ("prompt",),
    "mbpp.jsonl, rows of the hub",
    Hub("google-research-datasets/mbpp", "full", "test", "prompt"),
)
_INFILLING = DataForm(
    (r"infilling", r"human[-_ ]?eval"),
    ("test",),
    (),
    "HumanEval.jsonl(.gz), HumanEval-SingleLineInfilling.jsonl(.gz), Python files",
    _HUMANEVAL_HUB,
    suffixes=(".jsonl", ".ndjson", ".json", ".parquet", ".py"),
    loose=(".py",),
)

PROGRAMS: tuple[ProgramTask, ...] = (
    ProgramTask(
        "humaneval",
        "HumanEval",
        "pass@1",
        0,
        QuestionReader(_HUMANEVAL, _humaneval),
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@"),
        512,
        _run_humaneval,
    ),
    ProgramTask(
        "mbpp",
        "MBPP",
        "pass@1",
        3,
        QuestionReader(_MBPP, _mbpp, role=_mbpp_role),
        ("\n[DONE]", "[DONE]"),
        512,
        _run_mbpp,
    ),
    ProgramTask(
        "infilling",
        "Single-line infilling",
        "exact_match",
        0,
        QuestionReader(_INFILLING, _infilling, _infilling_parts),
        ("\n",),
        128,
        _run_humaneval,
    ),
)
