"""SentencePiece vocabularies: a score a token on one side, a list of merges on the other.

A reader of scores joins, again and again, the neighbours that make the token of the highest score, the leftmost
first. BPE joins the pair that comes first in its list, the leftmost first. They agree when no two tokens that can
be joined share a score, with one question left: which of the pairs that make the same token comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from finemoe.core.errors import DataError


def merges_from_scores(scores: Mapping[str, float], origin: str) -> list[tuple[str, str]]:
    """The merges that encode as `scores` (of ordinary tokens) does.

    Raises:
        DataError: two tokens that can be merged share a score, so that no list of merges is equal.
    """
    cuts = {token: _cuts(token, scores) for token in scores}
    order = sorted((token for token in scores if cuts[token]), key=lambda token: -scores[token])
    for first, second in pairwise(order):
        if scores[first] == scores[second]:
            raise DataError(
                f"{origin}: the tokens {first!r} and {second!r} share the score {scores[first]:g}, so which is made "
                "first depends on where they stand, and no list of merges says that: use the model's tokenizer.json"
            )
    return [(token[:cut], token[cut:]) for token in order for cut in cuts[token]]


def scores_from_merges(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Scores of ordinary `tokens` that encode as `merges` does.

    Raises:
        DataError: there are none: a token's merges lie apart, or a possible one is missing.
    """
    order: dict[str, list[int]] = {}
    previous = None
    for left, right in merges:
        token = left + right
        if token in order and token != previous:
            raise DataError(f"the tokenizer cannot be written to GGUF: the merges that make {token!r} lie apart")
        order.setdefault(token, []).append(len(left))
        previous = token
    # Tokens that are never made, such as single characters, come last: their scores decide nothing.
    rank = {token: at for at, token in enumerate([*order, *(token for token in tokens if token not in order)])}
    scores = {token: -float(rank[token]) for token in tokens}
    for token in tokens:
        if sorted(order.get(token, [])) != sorted(_cuts(token, scores)):
            raise DataError(
                f"the tokenizer cannot be written to GGUF: {token!r} can be made in ways that are not among its merges"
            )
    return scores


def _cuts(token: str, known: Mapping[str, float]) -> list[int]:
    """Where `token` falls into two known ones, in the order in which the pairs must be tried.

    Where the right half is also how the token begins, as in ab|a and a|ba, both pairs may overlap in a text: the
    one that then stands on the left is tried first.
    """
    cuts = [cut for cut in range(1, len(token)) if token[:cut] in known and token[cut:] in known]
    ordered: list[int] = []
    for cut in reversed(cuts):
        other = len(token) - cut
        if cut in ordered:
            continue
        pair = [cut] if other == cut or other not in cuts else [cut, other]
        if len(pair) == 2 and not token.startswith(token[cut:]) and token.startswith(token[other:]):
            pair.reverse()
        ordered += pair
    return ordered
