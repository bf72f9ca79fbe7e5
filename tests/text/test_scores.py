"""SentencePiece vocabularies: merges against a plain reader of scores."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.core.errors import DataError
from finemoe.text import Tokenizer, tokenizer_from_vocabulary, vocabulary_of
from finemoe.text.from_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN
from finemoe.text.scores import merges_from_scores, scores_from_merges

HEAD = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{byte:02X}>", BYTE) for byte in range(256))]


def make(scores: dict[str, float], space_first: bool = True) -> Tokenizer:
    names = [name for name, _ in HEAD] + list(scores)
    return tokenizer_from_vocabulary(
        names,
        [],
        [kind for _, kind in HEAD] + [NORMAL] * len(scores),
        "default",
        model="llama",
        scores=[0.0] * len(HEAD) + list(scores.values()),
        bos_id=1,
        eos_id=2,
        add_space_prefix=space_first,
    )


def read(text: str, scores: dict[str, float]) -> list[str]:
    """The oracle: join the neighbours that make the best token, the leftmost first, until none are left."""
    symbols = list(text)
    while True:
        joined = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joined:
            return symbols
        at = -max(joined)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, float]:
    """Learnt as BPE is: each new token joins two known ones; scores fall in any order."""
    tokens = list("ab▁")
    for _ in range(draw(st.integers(0, 9))):
        tokens.append(draw(st.sampled_from(tokens)) + draw(st.sampled_from(tokens)))
    tokens = list(dict.fromkeys(tokens))
    order = [*tokens[:3], *draw(st.permutations(tokens[3:]))] if draw(st.booleans()) else tokens
    return {token: -float(order.index(token)) for token in tokens}


@given(vocabularies(), st.text("ab ", max_size=24))
def test_merges_encode_as_scores_do(scores: dict[str, float], text: str) -> None:
    tokenizer = make(scores)
    spelt = [tokenizer.token_bytes[i].decode().replace(" ", "▁") for i in tokenizer.encode(text)]
    assert spelt == (read("▁" + text.replace(" ", "▁"), scores) if text else [])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(vocabularies())
def test_scores_survive_the_way_through_merges(scores: dict[str, float]) -> None:
    merges = merges_from_scores(scores, "test")
    again = scores_from_merges(list(scores), merges)
    assert merges_from_scores(again, "test") == merges


def test_equal_scores_are_refused_where_they_decide() -> None:
    make({"a": 0.0, "b": 0.0, "ab": -1.0})
    with pytest.raises(DataError, match="'ab' and 'ba' share the score -1"):
        make({"a": 0.0, "b": 0.0, "ab": -1.0, "ba": -1.0})


@pytest.mark.parametrize("space_first", [True, False])
def test_sentencepiece_vocabularies_come_back_and_fall_back_to_bytes(space_first: bool) -> None:
    scores = {"▁": -9.0, "a": -8.0, "b": -7.0, "ab": -1.0, "▁a": -2.0, "▁ab": -3.0}
    tokenizer = make(scores, space_first)
    assert tokenizer.decode(tokenizer.encode("ab é\n ab")) == "ab é\n ab"
    assert not tokenizer.byte_level
    assert (tokenizer.adds_bos, tokenizer.bos_id, tokenizer.end_of_text_id) == (True, 1, 2)
    vocabulary = vocabulary_of(tokenizer)
    assert (vocabulary.model, vocabulary.add_space_prefix, vocabulary.add_bos) == ("llama", space_first, True)
    assert list(vocabulary.tokens) == [name for name, _ in HEAD] + list(scores)
    assert list(vocabulary.token_types) == [kind for _, kind in HEAD] + [NORMAL] * len(scores)
    again = make(dict(zip(vocabulary.tokens[len(HEAD) :], vocabulary.scores[len(HEAD) :], strict=True)), space_first)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_merges_that_no_scores_can_say_are_refused() -> None:
    with pytest.raises(DataError, match="the merges that make 'aba' lie apart"):
        scores_from_merges(["a", "b", "ab", "ba", "aba"], [("ab", "a"), ("a", "b"), ("b", "a"), ("a", "ba")])
    with pytest.raises(DataError, match="'aba' can be made in ways that are not"):
        scores_from_merges(["a", "b", "ab", "ba", "aba"], [("a", "b"), ("b", "a"), ("ab", "a")])
