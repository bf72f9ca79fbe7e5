"""Problems made in code: the same everywhere, right by another way of working them out, and a corpus like any other."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict
from typing import Any, get_args

import pytest

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError, DataError
from finemoe.data import SkipReport, read_corpus
from finemoe.data.conversations.forms import read
from finemoe.data.conversations.questions import reference_of
from finemoe.data.problems import DIFFICULTIES, PROBLEMS, Draws, Problem, problem_at
from finemoe.data.problems.corpus import ProblemsCorpus
from finemoe.data.problems.running_sum import NUMERALS

OWN = [kind for kind in PROBLEMS if kind != "reasoning_gym"]
LEVELS = {kind: range(1, min(6, DIFFICULTIES[kind][1]) + 1) for kind in OWN}
GOLDEN = {
    "running_sum": "2c0479f159ba87a8",
    "arithmetic": "d32a76b659532c42",
    "countdown": "355bf25b699473f3",
    "sorting": "cca5ae88bac45f98",
    "programs": "672a76e62c79d245",
}
"""Of fifty problems of every level. What others have trained on must not change."""


def drawn(kind: str, seed: int = 0, count: int = 30) -> list[Problem]:
    return [problem_at(kind, seed, index, level) for level in LEVELS[kind] for index in range(count)]


@pytest.mark.parametrize("kind", OWN)
def test_problems_are_what_they_were(kind: str) -> None:
    text = json.dumps([asdict(one) for one in drawn(kind, count=50)], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[kind]


@pytest.mark.parametrize("kind", OWN)
def test_a_problem_is_a_function_of_its_arguments(kind: str) -> None:
    level = LEVELS[kind][-1]
    assert problem_at(kind, 3, 7, level) == problem_at(kind, 3, 7, level)
    others = [problem_at(kind, 3, index, level).prompt for index in range(40)]
    assert len(set(others)) > 20
    assert others != [problem_at(kind, 4, index, level).prompt for index in range(40)]
    assert not set(others[:1]) & {problem_at(kind, 3, -1 - index, level).prompt for index in range(1)}


@pytest.mark.parametrize("kind", OWN)
def test_a_solution_says_its_steps_and_ends_with_the_answer(kind: str) -> None:
    for one in drawn(kind):
        at = 0
        for step in one.steps:
            at = one.solution.index(step, at) + len(step)
        assert one.solution.endswith(one.answer)
        assert one.solution.index(one.answer, at) >= at
        assert one.kind == kind


def test_a_running_sum_is_written_as_it_is_defined() -> None:
    for modulus in (2, 5, 10):
        for index in range(40):
            one = problem_at("running_sum", 0, index, 6, modulus=modulus)
            digits = [int(digit) for digit in one.prompt.removesuffix("=\n")]
            assert len(digits) == 6
            assert max(digits) < modulus
            sums = [sum(digits[: n + 1]) % modulus for n in range(6)]
            written = "".join(f"{digit}{total}" for digit, total in zip(digits[1:], sums[1:], strict=True))
            assert one.solution == f"<{written}>{sums[-1]}"
            assert one.answer == str(sums[-1])
            assert len(one.steps) == 5


def test_steps_of_letters_say_the_same_in_one_script_or_another() -> None:
    digit_of = {letter: str(digit) for letters in NUMERALS.values() for digit, letter in enumerate(letters)}
    assert len(digit_of) == 30  # what looks alike is another letter
    seen = Counter[str]()
    for index in range(200):
        digits = problem_at("running_sum", 0, index, 6, modulus=10)
        one = problem_at("running_sum", 0, index, 6, modulus=10, scripts=("greek", "cyrillic"))
        assert (one.prompt, one.answer) == (digits.prompt, digits.answer)
        thought, answer = one.solution.removeprefix("<").split(">")
        assert answer == one.answer
        assert tuple(thought.split(" ")) == one.steps
        assert tuple("".join(digit_of[letter] for letter in step) for step in one.steps) == digits.steps
        for step in one.steps:
            (script,) = {unicodedata.name(letter).split()[0] for letter in step}
            seen[script] += 1
    assert set(seen) == {"GREEK", "CYRILLIC"}
    assert 400 < seen["GREEK"] < 600


def test_arithmetic_is_right_and_grows() -> None:
    longest = []
    for level in LEVELS["arithmetic"]:
        problems = [problem_at("arithmetic", 0, index, level) for index in range(40)]
        for one in problems:
            assert str(value_of(one.prompt.removeprefix("Compute ").removesuffix(".\n"))) == one.answer
            for step in one.steps:
                left, right = step.split(" = ")
                assert value_of(left) == int(right)
        longest.append(max(len(one.prompt) for one in problems))
    assert longest == sorted(longest)
    assert {sign for index in range(40) for sign in problem_at("arithmetic", 0, index, 3).prompt if sign in "+-*"} == {
        *"+-*"
    }


def value_of(term: str) -> int | float:
    """By Python's own precedence."""
    assert re.fullmatch(r"[\d+\-*/() ]+", term)
    value = eval(compile(ast.parse(term, mode="eval"), "term", "eval"))
    assert isinstance(value, int | float)
    return value


def test_countdown_reaches_its_target_with_each_number_once() -> None:
    for one in drawn("countdown"):
        named, target = one.prompt.removeprefix("Use ").split(", each once, ")
        given = sorted(map(int, re.findall(r"\d+", named)))
        assert len(given) == one.difficulty + 2
        assert sorted(map(int, re.findall(r"\d+", one.answer))) == given
        wanted = int(re.findall(r"\d+", target)[-1])
        assert value_of(one.answer) == wanted > 0
        assert one.steps[-1].endswith(f"= {wanted}")


def test_sorting_sorts() -> None:
    kinds = set()
    for one in drawn("sorting"):
        items = one.prompt.split(": ")[1].split()
        kinds.add(one.prompt.split(": ")[0])
        key: Any = int if items[0].isdigit() else str
        assert one.answer.split() == sorted(items, key=key)
        assert [step.split(",")[0] for step in one.steps] == one.answer.split()
        assert len(set(items)) == len(items) == one.difficulty + 2
    assert len(kinds) == 2


def test_programs_pass_their_tests_and_others_do_not() -> None:
    for one in drawn("programs"):
        assert one.tests is not None
        names: dict[str, Any] = {}
        exec(one.solution, names)
        for test in one.tests:
            exec(test, names)
        names["f"] = lambda given: None
        with pytest.raises(AssertionError):
            exec(one.tests[0], names)
    assert len({one.prompt.split("that returns")[1][:8] for one in drawn("programs")}) > 10


def test_draws_are_even() -> None:
    draws = Draws(0)
    found = [draws.between(2, 4) for _ in range(3000)]
    assert {found.count(value) > 900 for value in (2, 3, 4)} == {True}
    assert set(found) == {2, 3, 4}
    chosen = [tuple(draws.some("abcd", 2)) for _ in range(2400)]
    assert len(set(chosen)) == 12
    assert min(chosen.count(pair) for pair in set(chosen)) > 130


# ---- the corpus -----------------------------------------------------------------------------------------------------


def sides(corpus: ProblemsCorpus, share: float = 0.1, whole: bool = False) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"train": [], "validation": []}
    for one in read_corpus(corpus, share, SkipReport(), whole=whole):
        found[one.side].append(json.loads(one.document.text) if whole else one.document.text)
    return found


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("validation", [0, 40])
def test_no_problem_is_on_both_sides(kind: str, validation: int) -> None:
    corpus = ProblemsCorpus(
        problem=kind, count=400, validation_count=validation, reasoned=0.5, difficulty=1 + (kind == "running_sum")
    )
    found = sides(corpus, whole=True)
    train, held_out = ([one["prompt"] for one in found[side]] for side in ("train", "validation"))
    assert train
    assert held_out
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)


def test_a_record_says_everything_and_is_in_a_form_that_is_known() -> None:
    for kind in OWN:
        (record, *_) = sides(ProblemsCorpus(problem=kind, count=3, seed=5, validation_count=1), whole=True)["train"]
        assert list(record) == ["prompt", "completion", "answer", "problem", "difficulty", "steps", "tests"]
        one = problem_at(kind, 5, 0, DIFFICULTIES[kind][0], **({"modulus": 5} if kind == "running_sum" else {}))
        assert (record["prompt"], record["completion"], record["answer"]) == (one.prompt, one.solution, one.answer)
        assert (record["problem"], record["steps"]) == (kind, list(one.steps))
        assert record["tests"] == (None if one.tests is None else list(one.tests))
        said = read(record)
        assert said.form == "prompt and completion"
        assert reference_of(record, said) == (one.answer.strip(),)


def test_the_text_is_prompt_and_completion_and_a_share_of_them_reasons() -> None:
    texts = sides(ProblemsCorpus(count=1000, reasoned=0.4, difficulty=8))["train"]
    assert 0.3 < sum("<" in text for text in texts) / len(texts) < 0.5
    assert all(re.fullmatch(r"[0-4]{8}=\n(<(?:[0-4]{2}){7}>)?[0-4]", text) for text in texts)
    assert not any("<" in text for text in sides(ProblemsCorpus(count=50, reasoned=0))["train"])
    assert all("<" in text for text in sides(ProblemsCorpus(count=50, reasoned=1))["train"])


def test_a_pair_of_difficulties_rises_evenly() -> None:
    found = sides(ProblemsCorpus(count=200, validation_count=20, difficulty=(4, 7)), whole=True)
    for name, side in found.items():
        levels = [one["difficulty"] for one in side]
        if name == "train":
            assert levels == sorted(levels)
        else:  # those that a run answers are the first few
            assert set(levels[:6]) == {4, 5, 6, 7}
        assert set(levels) == {4, 5, 6, 7}
        assert max(levels.count(level) for level in set(levels)) <= 1.2 * len(levels) / 4
        assert {len(one["prompt"]) - 2 == one["difficulty"] for one in side} == {True}


def test_the_modulus_is_an_option_of_running_sums() -> None:
    texts = sides(ProblemsCorpus(count=100, modulus=2, difficulty=12))["train"]
    assert set("".join(texts)) == {*"01=<>\n"}


def test_scripts_are_an_option_of_running_sums() -> None:
    texts = sides(ProblemsCorpus(count=100, modulus=2, scripts=("latin",), difficulty=12))["train"]
    assert set("".join(texts)) == {*"01=<>\n ab"}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"problem": "sums"}, '`problem` must be "running_sum", "arithmetic"'),
        ({"problem": "sorting", "modulus": 3}, "`modulus` says nothing of sorting problems"),
        ({"problem": "sorting", "scripts": ("greek",)}, "`scripts` says nothing of sorting problems"),
        ({"difficulty": [5, 3]}, "rises from 1 to 100 at most, not from 5 to 3"),
        ({"problem": "programs", "difficulty": 6}, "rises from 1 to 5 at most, not from 6 to 6"),
        ({"difficulty": [1, 9], "count": 8}, "`count` 8 is too few to rise from difficulty 1 to 9"),
        ({"problem": "reasoning_gym"}, "needs `dataset`"),
        ({"dataset": "x"}, "`dataset` says nothing of running_sum problems"),
        ({"modulus": 11}, "`modulus` must be at most 10"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse(ProblemsCorpus, tables, "test")


def test_too_few_problems_for_both_sides_are_an_error() -> None:
    with pytest.raises(DataError, match="all running_sum problems that are drawn to train on are validated on"):
        sides(ProblemsCorpus(count=10, validation_count=200, difficulty=1))


def test_every_kind_can_be_named_and_has_levels() -> None:
    assert get_args(ProblemsCorpus.model_fields["problem"].annotation) == tuple(PROBLEMS)
    assert set(DIFFICULTIES) == set(PROBLEMS)
