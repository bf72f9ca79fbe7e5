"""Small functions to write in Python, with the tests that they have to pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from finemoe.data.problems.problem import Draws, Problem
from finemoe.data.problems.sorting import WORDS

_TESTS = 4


@dataclass(frozen=True)
class _Task:
    """A function `f`, said in four ways: in words, as a plan, as Python, and as what it returns."""

    asked: str
    plan: str
    argument: str
    body: Sequence[str]
    returns: Callable[[Any], Any]
    """Written apart from `body`, so that each is a check of the other."""
    inputs: Sequence[Any]


def programs(draws: Draws, difficulty: int) -> Problem:
    """A function of one argument: 1 of a number, 2 of a list, 3 of a text, 4 with a loop, 5 with more to remember.

    The answer is the function alone; a solution has its plan as a comment in front. The tests are four assertions, all
    of which the solution passes.
    """
    task = draws.one(_FAMILIES[difficulty])(draws)
    code = "\n".join([f"def f({task.argument}):", *(f"    {line}" for line in task.body)])
    tests = tuple(f"assert f({value!r}) == {task.returns(value)!r}" for value in task.inputs[:_TESTS])
    prompt = f"Write a Python function f({task.argument}) that returns {task.asked}.\n"
    step = f"# {task.plan}"
    return Problem(prompt, code, f"{step}\n{code}", (step,), "programs", difficulty, tests)


def _numbers(draws: Draws, low: int, high: int) -> list[int]:
    return [draws.between(low, high) for _ in range(_TESTS)]


def _lists(draws: Draws) -> list[list[int]]:
    return [[draws.between(0, 20) for _ in range(draws.between(3, 7))] for _ in range(_TESTS)]


def _texts(draws: Draws) -> list[str]:
    return [" ".join(draws.some(WORDS, draws.between(2, 4))) for _ in range(_TESTS)]


# ---- 1: of a number -------------------------------------------------------------------------------------------------


def _linear(draws: Draws) -> _Task:
    a, b = draws.between(2, 20), draws.between(1, 50)
    asked, plan = f"{a} times n, plus {b}", f"multiply n by {a}, then add {b}"
    return _Task(asked, plan, "n", [f"return {a} * n + {b}"], lambda n: n * a + b, _numbers(draws, -20, 20))


def _square(draws: Draws) -> _Task:
    a = draws.between(1, 200)
    asked, plan = f"the square of n, less {a}", f"multiply n by itself, then take {a} away"
    return _Task(asked, plan, "n", [f"return n * n - {a}"], lambda n: n**2 - a, _numbers(draws, -20, 20))


def _rest(draws: Draws) -> _Task:
    a = draws.between(2, 100)
    asked, plan = f"what is left of n when it is divided by {a}", f"take the remainder of n by {a}"
    return _Task(asked, plan, "n", [f"return n % {a}"], lambda n: n - n // a * a, _numbers(draws, 0, 999))


# ---- 2: of a list ---------------------------------------------------------------------------------------------------


def _sum_of_multiples(draws: Draws) -> _Task:
    a, b = draws.between(2, 6), draws.between(1, 50)
    body = [f"return {b} + sum(one for one in items if one % {a} == 0)"]
    asked = f"{b} plus the sum of those numbers in items that {a} divides"
    plan = f"keep the multiples of {a}, add them up, and {b}"
    return _Task(asked, plan, "items", body, lambda items: b + sum((n // a * a == n) * n for n in items), _lists(draws))


def _between(draws: Draws) -> _Task:
    a, b = draws.between(0, 8), draws.between(12, 20)
    body = [f"return len([one for one in items if {a} < one < {b}])"]
    asked = f"how many numbers in items are larger than {a} and smaller than {b}"
    plan = f"keep what lies between {a} and {b}, then count"
    inside = range(a + 1, b)
    return _Task(asked, plan, "items", body, lambda items: sum(n in inside for n in items), _lists(draws))


def _scaled(draws: Draws) -> _Task:
    a, b = draws.between(2, 12), draws.between(1, 20)
    asked = f"a list of the numbers in items, each times {a} and less {b}"
    body, plan = [f"return [{a} * one - {b} for one in items]"], f"multiply each number by {a} and take {b} away"
    return _Task(asked, plan, "items", body, lambda items: [n * a - b for n in items], _lists(draws))


# ---- 3: of a text ---------------------------------------------------------------------------------------------------


def _count_letters(draws: Draws) -> _Task:
    texts = _texts(draws)
    a, b = draws.some(sorted({*"".join(texts)} - {" "}), 2)
    asked, plan = f"how many letters of text are {a} or {b}", f"count each {a} and each {b}, and add"
    counted: Callable[[Any], Any] = lambda text: sum(one in (a, b) for one in text)  # noqa: E731
    return _Task(asked, plan, "text", [f'return text.count("{a}") + text.count("{b}")'], counted, texts)


def _words_backwards(draws: Draws) -> _Task:
    mark, a = draws.one("-_/+.:;|"), draws.between(2, 5)
    asked = f'the words of text in the opposite order, with "{mark}" between them, each cut after its letter {a}'
    plan = f'split at blanks, cut each word to {a} letters, turn the list round, join with "{mark}"'
    body = [f'return "{mark}".join(one[:{a}] for one in reversed(text.split()))']
    cut: Callable[[Any], Any] = lambda text: mark.join([one[0:a] for one in text.split(" ")][::-1])  # noqa: E731
    return _Task(asked, plan, "text", body, cut, _texts(draws))


def _every(draws: Draws) -> _Task:
    a, b = draws.between(2, 6), draws.between(0, 8)
    asked = f"character {b} of text, counting from 0, and every {a} places another one, in order"
    every: Callable[[Any], Any] = lambda text: "".join(  # noqa: E731
        one for n, one in enumerate(text) if n >= b and (n - b) % a == 0
    )
    plan = f"take a slice from {b} with steps of {a}"
    return _Task(asked, plan, "text", [f"return text[{b}::{a}]"], every, _texts(draws))


# ---- 4: with a loop -------------------------------------------------------------------------------------------------


def _digit_sum(draws: Draws) -> _Task:
    a = draws.between(1, 100)
    body = [f"total = {a}", "while n > 0:", "    total += n % 10", "    n //= 10", "return total"]
    asked, plan = f"{a} plus the digits of n", f"begin with {a}, take digits from the end while there are any, and add"
    return _Task(asked, plan, "n", body, lambda n: a + sum(map(int, str(n))), _numbers(draws, 0, 9999))


def _divisions(draws: Draws) -> _Task:
    a, b = draws.between(2, 9), draws.between(0, 20)
    body = [f"count = {b}", f"while n % {a} == 0:", f"    n //= {a}", "    count += 1", "return count"]
    asked = f"{b} plus how often n, which is above 0, can be divided by {a} without remainder"
    most: Callable[[Any], Any] = lambda n: b + max(k for k in range(12) if n % a**k == 0)  # noqa: E731
    inputs = [draws.between(1, 5) * a ** draws.between(0, 4) for _ in range(_TESTS)]
    return _Task(asked, f"divide by {a} while that leaves no remainder, and count from {b}", "n", body, most, inputs)


def _common_divisor(draws: Draws) -> _Task:
    a = draws.between(12, 240)
    body = [f"other = {a}", "while other:", "    n, other = other, n % other", "return n"]
    asked = f"the greatest common divisor of n, which is above 0, and {a}"
    plan = "replace the pair by the second number and the remainder until the remainder is 0"
    return _Task(asked, plan, "n", body, lambda n: math.gcd(n, a), _numbers(draws, 1, 240))


# ---- 5: with more to remember ---------------------------------------------------------------------------------------


def _recurrence(draws: Draws) -> _Task:
    a, b, p, q = (draws.between(1, 5) for _ in range(4))
    body = [
        f"now, then = {a}, {b}",
        "for _ in range(n):",
        f"    now, then = then, {p} * then + {q} * now",
        "return now",
    ]
    asked = f"number n, counting from 0, of the sequence {a}, {b}, ... in which each is {p} times the one before it "
    asked += f"plus {q} times the one before that"

    def value(n: int) -> int:
        return (a, b)[n] if n < 2 else p * value(n - 1) + q * value(n - 2)

    return _Task(asked, "keep the last two numbers and move on n times", "n", body, value, _numbers(draws, 0, 8))


def _collatz(draws: Draws) -> _Task:
    a = draws.between(1, 100)
    rule = "    n = 3 * n + 1 if n % 2 else n // 2"
    body = [f"count = {a}", "while n != 1:", rule, "    count += 1", "return count"]
    asked = (
        f"{a} plus the number of steps from n, which is above 0, to 1, when an even number is halved and an odd one "
    )
    asked += "becomes three times itself plus 1"

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    plan = f"count from {a}, and apply the rule until 1 is reached"
    return _Task(asked, plan, "n", body, lambda n: a + steps(n), _numbers(draws, 1, 20))


def _longest_run(draws: Draws) -> _Task:
    a, b = draws.between(0, 9), draws.between(0, 20)
    body = [
        "longest = run = 0",
        "for one in items:",
        f"    run = run + 1 if one == {a} else 0",
        "    longest = max(longest, run)",
        f"return {b} + longest",
    ]
    asked = f"{b} plus how many numbers {a} stand behind each other in items at most"
    plan = "keep the length of the run that is going on, and the longest so far"

    def longest(items: Sequence[int]) -> int:
        return b + max((len(list(group)) for value, group in groupby(items) if value == a), default=0)

    inputs = [[draws.one((a, a, a + 1)) for _ in range(draws.between(1, 9))] for _ in range(_TESTS)]
    return _Task(asked, plan, "items", body, longest, inputs)


_FAMILIES: Mapping[int, Sequence[Callable[[Draws], _Task]]] = {
    1: (_linear, _square, _rest),
    2: (_sum_of_multiples, _between, _scaled),
    3: (_count_letters, _words_backwards, _every),
    4: (_digit_sum, _divisions, _common_divisor),
    5: (_recurrence, _collatz, _longest_run),
}
