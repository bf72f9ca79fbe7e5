"""Look-up: guess what comes next by what came next before, in the same text (prompt lookup, Saxena 2023).

Nothing is computed with a model. It helps where a text repeats itself: summaries, edits of code, quotations.
"""

from __future__ import annotations

from collections.abc import Sequence


class LookUp:
    """An index of one growing text: after its last few tokens, what followed them the last time they stood there."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """Suffixes of `longest` down to `shortest` tokens are looked for, the longest first."""
        self._lengths = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`, which only ever grows from call to call."""
        self._extend(tokens)
        for length in self._lengths:
            if len(tokens) > length:
                found = self._after.get(tuple(tokens[-length:]))
                if found is not None:
                    return list(tokens[found : found + most])
        return []

    def _extend(self, tokens: Sequence[int]) -> None:
        """Index what is new; a run of tokens that the text ends on has nothing behind it yet."""
        for end in range(max(self._indexed, 1), len(tokens)):
            for length in self._lengths:
                if length <= end:
                    self._after[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
