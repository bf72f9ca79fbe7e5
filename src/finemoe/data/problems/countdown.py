"""Countdown: reach a number with given ones, each used once. There may be several ways; any is right."""

from __future__ import annotations

from finemoe.data.problems.problem import Draws, Problem


def countdown(draws: Draws, difficulty: int) -> Problem:
    """`difficulty` + 2 numbers and what they have to make with +, -, * and /.

    The way that is drawn never leaves the whole numbers above zero. The answer is one expression; `expression` among
    the rewards takes every other one that uses the same numbers and has the same value.
    """
    numbers = [draws.between(1, 9 if difficulty < 3 else 25) for _ in range(difficulty + 2)]
    left, steps = [(value, str(value)) for value in numbers], []
    while len(left) > 1:
        pair = draws.some(range(len(left)), 2)
        (a, first), (b, second) = sorted((left[place] for place in pair), key=lambda one: (-one[0], one[1]))
        ways = [("+", a + b), *([("-", a - b)] if a > b else []), *([("*", a * b)] if min(a, b) > 1 else [])]
        ways += [("/", a // b)] if b > 1 and a % b == 0 else []
        sign, value = draws.one(ways)
        steps.append(f"{a} {sign} {b} = {value}")
        left = [one for place, one in enumerate(left) if place not in pair]
        left.append((value, f"({first} {sign} {second})"))
    target, expression = left[0]
    answer = expression[1:-1]
    named = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    prompt = f"Use {named}, each once, with + - * / and brackets, to make {target}.\n"
    return Problem(prompt, answer, "\n".join([*steps, answer]), tuple(steps), "countdown", difficulty)
