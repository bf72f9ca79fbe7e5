"""Answers in words: SQuAD's exact match and F1, and DROP's F1, which knows numbers and several spans."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DROP_BREAK = re.compile(r"[ -]")


def normalize_text(text: str) -> str:
    """SQuAD's form of an answer: lower case, no ASCII punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(text: str, golds: Sequence[str]) -> bool:
    """Whether `text` is one of `golds` once both are normalised."""
    found = normalize_text(text)
    return any(found == normalize_text(gold) for gold in golds)


def token_f1(text: str, golds: Sequence[str]) -> float:
    """The best F1 over `golds` of the words two answers share, repeated words counted; 0 without golds."""
    return max((_bag_f1(normalize_text(text).split(), normalize_text(gold).split()) for gold in golds), default=0.0)


def _bag_f1(given: Sequence[str], gold: Sequence[str]) -> float:
    if not given or not gold:
        return float(given == gold)
    shared = (Counter(given) & Counter(gold)).total()
    return 2 * shared / (len(given) + len(gold))


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _drop_form(text: str) -> str:
    """DROP's form: as SQuAD's, but hyphens part words, and numbers keep their point and become floats."""
    words = []
    for token in _DROP_BREAK.split(text.lower()):
        bare = token if _as_number(token) is not None else token.translate(_NO_PUNCTUATION)
        number = _as_number(bare)
        words += _ARTICLES.sub(" ", bare if number is None else str(number)).split()
    return " ".join(words)


def _drop_bag(span: str) -> frozenset[str]:
    return frozenset(_drop_form(span).split())


def _set_f1(given: frozenset[str], gold: frozenset[str]) -> float:
    """DROP's F1 of two sets of words; 0 where the gold answer has numbers and none of them was given."""
    numbers = {word for word in gold if _as_number(word) is not None}
    if numbers and not numbers & given:
        return 0.0
    if not given and not gold:
        return 1.0
    return 2 * len(given & gold) / (len(given) + len(gold))


def drop_f1(text: str, golds: Sequence[Sequence[str]]) -> float:
    """DROP's F1 of an answer, to two places as DROP rounds it; the best over `golds`, each of one or more spans.

    The spans of a gold answer and the one given are matched so that the sum is greatest; what is left over on either
    side counts as 0.
    """
    return max((_aligned_f1([text], gold) for gold in golds), default=0.0)


def _aligned_f1(given: Sequence[str], gold: Sequence[str]) -> float:
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    if not given or not gold:
        return float(len(given) == len(gold))
    table = np.array([[_set_f1(_drop_bag(a), _drop_bag(b)) for b in gold] for a in given])
    rows, columns = linear_sum_assignment(table, maximize=True)
    return round(float(table[rows, columns].sum()) / max(len(given), len(gold)), 2)


def drop_exact_match(text: str, golds: Sequence[Sequence[str]]) -> bool:
    """Whether one of `golds` is a single span that equals `text` in DROP's form."""
    return any(len(gold) == 1 and _drop_form(text) == _drop_form(gold[0]) for gold in golds)
