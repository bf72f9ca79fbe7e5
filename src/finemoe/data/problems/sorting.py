"""Sorting: numbers by size, or words by the alphabet."""

from __future__ import annotations

from finemoe.data.problems.problem import Draws, Problem

_WORDS = (
    "acorn anchor apple arrow autumn badge bamboo barn basket beacon bell birch blanket boat bread bridge brook bucket "
    "butter button cabin candle canyon carpet castle cedar chalk cherry cloud clover coast copper coral cotton cradle "
    "daisy dawn desert dove drum eagle ember engine fabric falcon feather fern fiddle field flame flint forest fox "
    "garden ginger glacier goose grain grape harbor hazel hedge heron hill honey island ivory jacket jewel kettle "
    "ladder lake lantern leaf lemon lily linen maple marble meadow melon mill mint moon moss nest oak ocean olive "
    "orchard otter owl paper pear pebble pepper pine plum pond poppy quilt rabbit rain raven reed ribbon river robin "
    "rose saddle sail salt sand shell silver snow spark spoon spring star stone straw sugar swan table thistle thunder "
    "tiger timber tower tulip valley velvet violin wagon walnut water wheat willow window winter wolf wood yarn"
)
WORDS = tuple(_WORDS.split())


def sorting(draws: Draws, difficulty: int) -> Problem:
    """`difficulty` + 2 different numbers or words; each step takes the first of what is left.

    A step is `3, then of 7 9`: what comes next, and what is left to look at.
    """
    count = difficulty + 2
    words = draws.between(0, 1) == 1
    items = draws.some(WORDS, count) if words else [str(number) for number in draws.some(range(100), count)]
    in_order = sorted(items) if words else sorted(items, key=int)
    left, steps = list(items), []
    for item in in_order:
        left.remove(item)
        steps.append(f"{item}, then of {' '.join(left)}" if left else item)
    answer = " ".join(in_order)
    what = "words by the alphabet" if words else "numbers from small to large"
    prompt = f"Sort these {what}: {' '.join(items)}\n"
    return Problem(prompt, answer, "\n".join([*steps, answer]), tuple(steps), "sorting", difficulty)
