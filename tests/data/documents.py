"""Small documents for tests: each tells its number."""

from __future__ import annotations

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()  # noqa: SIM905


def document(number: int, words: int = 60) -> str:
    """A line of `words` words."""
    chosen = (WORDS[(number * 7 + i * i) % len(WORDS)] + str(number % 10) for i in range(words))
    return " ".join(chosen) + f" é{number}\n"
