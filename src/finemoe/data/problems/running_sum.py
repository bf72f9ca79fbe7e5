"""Running sums: short, hard to guess, and easy for who writes down what is in between."""

from __future__ import annotations

from finemoe.data.problems.problem import Draws, Problem


def running_sum(draws: Draws, difficulty: int, modulus: int = 5) -> Problem:
    """`difficulty` digits below `modulus` and "=" on a line; the answer is their sum modulo `modulus`.

    A solution copies each digit from the second on and writes the sum so far behind it, without blanks:
    `3142=` on a line is solved by `<144320>0`, so that each step is two characters.
    """
    digits = [draws.between(0, modulus - 1) for _ in range(difficulty)]
    total, steps = digits[0], []
    for digit in digits[1:]:
        total = (total + digit) % modulus
        steps.append(f"{digit}{total}")
    prompt = "".join(map(str, digits)) + "=\n"  # no token goes beyond a line: none holds "=" and what is to be said
    return Problem(prompt, str(total), f"<{''.join(steps)}>{total}", tuple(steps), "running_sum", difficulty)
