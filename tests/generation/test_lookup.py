"""Guesses by look-up, against a search through the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finemoe.generation.speculation import LookUp


def searched(tokens: list[int], most: int, longest: int, shortest: int) -> list[int]:
    for length in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) > length and tokens[end - length : end] == tokens[-length:]:
                return tokens[end : end + most]
    return []


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=8),
    st.integers(1, 5),
    st.sampled_from([(4, 2), (3, 1), (1, 1)]),
)
def test_a_guess_is_what_followed_last_time(pieces: list[list[int]], most: int, lengths: tuple[int, int]) -> None:
    lookup, tokens = LookUp(*lengths), list[int]()
    for piece in pieces:
        tokens += piece
        assert lookup.guess(tokens, most) == searched(tokens, most, *lengths)


def test_a_text_that_repeats_itself_is_guessed_and_another_is_not() -> None:
    assert LookUp().guess([5, 6, 7, 8, 9, 5, 6], 3) == [7, 8, 9]
    assert LookUp().guess([1, 2, 3, 4, 5, 6], 3) == []
    assert LookUp().guess([], 3) == []
