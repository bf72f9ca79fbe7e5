"""Running sums: short, hard to guess, and easy for who writes down what is in between."""

from __future__ import annotations

from collections.abc import Sequence

from finemoe.data.problems.problem import Draws, Problem

NUMERALS = {"latin": "abcdefghij", "greek": "αβγδεζηθικ", "cyrillic": "абвгдежзик"}
"""Script -> its letter for each digit: two bytes each, but for Latin's one."""


def running_sum(draws: Draws, difficulty: int, modulus: int = 5, scripts: Sequence[str] = ()) -> Problem:
    """`difficulty` digits below `modulus` and "=" on a line; the answer is their sum modulo `modulus`.

    A solution copies each digit from the second on and writes the sum so far behind it, without blanks:
    `3142=` on a line is solved by `<144320>0`, so that each step is two characters. With `scripts` each step is a word
    of letters instead, in one of them by chance: `<βε дг γα>0` mixes Greek and Cyrillic, as a model may mix languages.
    """
    digits = [draws.between(0, modulus - 1) for _ in range(difficulty)]
    total, steps = digits[0], []
    for digit in digits[1:]:
        total = (total + digit) % modulus
        letters = NUMERALS[draws.one(scripts)] if scripts else "0123456789"
        steps.append(letters[digit] + letters[total])
    prompt = "".join(map(str, digits)) + "=\n"  # no token goes beyond a line: none holds "=" and what is to be said
    return Problem(
        prompt, str(total), f"<{(' ' if scripts else '').join(steps)}>{total}", tuple(steps), "running_sum", difficulty
    )
