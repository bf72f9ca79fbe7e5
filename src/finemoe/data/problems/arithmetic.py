"""Arithmetic: products before sums, one operation a line."""

from __future__ import annotations

from finemoe.data.problems.problem import Draws, Problem

_SIGNS = ("+", "-", "*")


def arithmetic(draws: Draws, difficulty: int) -> Problem:
    """A term of +, - and *: more numbers, and longer ones, with growing difficulty.

    1: two numbers below ten; 2: two below a hundred; 3: three below a hundred; 4: three below a thousand, and so on. A
    number behind * stays below ten. The steps do products first, from left to right, then sums.
    """
    count, digits = 2 + (difficulty - 1) // 2, 1 + difficulty // 2
    values, signs = [draws.between(1, 10**digits - 1)], []
    for _ in range(count - 1):
        signs.append(draws.one(_SIGNS))
        values.append(draws.between(2, 9) if signs[-1] == "*" else draws.between(1, 10**digits - 1))
    term = " ".join([str(values[0]), *(f"{sign} {value}" for sign, value in zip(signs, values[1:], strict=True))])
    steps = []
    while signs:
        place = signs.index("*") if "*" in signs else 0
        sign = signs.pop(place)
        a, b = values[place : place + 2]
        values[place : place + 2] = [a * b if sign == "*" else a + b if sign == "+" else a - b]
        steps.append(f"{a} {sign} {b} = {values[place]}")
    answer = str(values[0])
    solution = "\n".join([*steps, answer])
    return Problem(f"Compute {term}.\n", answer, solution, tuple(steps), "arithmetic", difficulty)
