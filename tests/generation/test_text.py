"""`TextStream` against the whole text: every way to cut it into tokens gives the same, and nothing is taken back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
from tokenizers import pre_tokenizers

from finemoe.core.errors import ConfigError
from finemoe.generation.text import TextStream
from finemoe.text import Tokenizer
from finemoe.text.from_vocabulary import CONTROL, NORMAL, tokenizer_from_vocabulary


class Cut:
    """A decoder whose tokens are pieces of a text, as bytes; its ids are places in a list."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        names = [_spelling(piece) for piece in pieces]
        known = list(dict.fromkeys([*map(_spelling, (bytes([i]) for i in range(256))), *names]))
        types = [NORMAL] * len(known) + [CONTROL]
        self.tokenizer: Tokenizer = tokenizer_from_vocabulary(
            pre="gpt-2", tokens=[*known, "<|end of all|>"], merges=[], token_types=types, eos_id=len(known)
        )
        self.ids = [known.index(name) for name in names]


def _spelling(piece: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in piece)


def _byte_letters() -> dict[int, str]:
    """How byte-level vocabularies spell each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{b: chr(b) for b in kept}, **{b: chr(256 + n) for n, b in enumerate(others)}}


_LETTERS = _byte_letters()


def test_the_bytes_are_spelt_as_the_library_spells_them() -> None:
    assert sorted(_LETTERS.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """Every way to cut `data` into pieces."""
    for marks in range(1 << (len(data) - 1)):
        ends = [i + 1 for i in range(len(data) - 1) if marks >> i & 1] + [len(data)]
        yield [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def whole(text: str, stops: Sequence[str], include: bool = False) -> tuple[str, str | None]:
    """Text and stop, letter by letter, in the slow way."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


CASES = [
    ("one STOP two", ["STOP"]),
    ("aab aaab!", ["aaab"]),  # the stop's own beginning repeats
    ("x</s></s>", ["</s>", "s></"]),  # overlapping stops
    ("hello wor", ["lo", "hello world", "ell"]),  # one inside another
    ("ab\n\ncd", ["\n\n", "\n"]),
    ("Aé🙂b", ["é🙂"]),  # cut within characters
    ("🙂🙃", ["🙃"]),
    ("nothing sto", ["stop"]),  # begins, and never comes
    ("no stops", []),
]


@pytest.mark.parametrize("include", [False, True], ids=["without", "with"])
@pytest.mark.parametrize(("text", "stops"), CASES, ids=lambda value: repr(value)[:20])
def test_every_cut_gives_the_text_before_the_stop(text: str, stops: list[str], include: bool) -> None:
    data = text.encode()
    expected = whole(text, stops, include)
    pieces = {data[i:j] for i in range(len(data)) for j in range(i + 1, len(data) + 1)}
    cut = Cut(sorted(pieces))
    ids = dict(zip(sorted(pieces), cut.ids, strict=True))
    for one in cuts(data):
        stream = TextStream(cut.tokenizer.decoder(continues=True), stops, include_stop=include)
        given = ""
        for piece in one:
            given += stream.push(ids[piece])
            assert expected[0].startswith(given)  # nothing is ever taken back
            assert "�" not in given
        given += stream.finish()
        assert (given, stream.stopped) == expected
        assert stream.text == given


def test_as_much_is_given_as_is_certain() -> None:
    cut = Cut([b"ab", b"c", b"d", b"\xc3", b"\xa9"])
    ab, c, d, lead, tail = cut.ids
    stream = TextStream(cut.tokenizer.decoder(), ["bcd", "xyz"])
    assert [stream.push(i) for i in (ab, c, ab, lead, tail, ab)] == ["a", "", "bca", "", "bé", "a"]
    assert (stream.finish(), stream.text) == ("b", "abcabéab")
    assert stream.stopped is None
    stream = TextStream(cut.tokenizer.decoder(), ["bcd"])
    assert [stream.push(i) for i in (ab, c, d, ab)] == ["a", "", "", ""]
    assert (stream.finish(), stream.stopped, stream.text) == ("", "bcd", "a")


def test_half_a_character_at_the_end_is_marked() -> None:
    cut = Cut([b"a", b"\xc3"])
    stream = TextStream(cut.tokenizer.decoder(), ["b"])
    assert [stream.push(i) for i in cut.ids] == ["a", ""]
    assert stream.finish() == "�"


@pytest.mark.parametrize(("least", "expected"), [(0, "a"), (1, "a"), (2, "a"), (3, "abca"), (6, "abcabc")])
def test_a_stop_within_the_least_length_is_text(least: int, expected: str) -> None:
    """Stop "bc" is complete with the third token and with the sixth."""
    cut = Cut([b"a", b"b", b"c"])
    stream = TextStream(cut.tokenizer.decoder(), ["bc"], min_tokens=least)
    given = "".join(stream.push(i) for i in cut.ids * 2) + stream.finish()
    assert given == expected


def test_a_stop_that_is_held_but_too_early_ends_nothing_later() -> None:
    """ "ab" is complete too early, yet held as the beginning of another stop."""
    cut = Cut([b"xab", b"c"])
    stream = TextStream(cut.tokenizer.decoder(), ["ab", "xabq"], min_tokens=1)
    assert [stream.push(i) for i in cut.ids] == ["", "xabc"]
    assert stream.stopped is None


def test_random_texts_over_few_letters() -> None:
    """Stops within stops within repetitions, as only a small alphabet has them."""
    draw = random.Random(0)
    cut = Cut(pieces := [bytes(p) for p in (b"a", b"b", b"ab", b"ba", b"aab", b"abb", b"bab")])
    for _ in range(2000):
        chosen = [draw.randrange(len(pieces)) for _ in range(draw.randrange(1, 9))]
        text = b"".join(pieces[i] for i in chosen).decode()
        stops = ["".join(draw.choices("ab", k=draw.randrange(2, 6))) for _ in range(draw.randrange(3))]
        stream = TextStream(cut.tokenizer.decoder(), stops)
        given = "".join([*(stream.push(cut.ids[i]) for i in chosen), stream.finish()])
        assert (given, stream.stopped) == whole(text, stops)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty string"):
        TextStream(Cut([b"a"]).tokenizer.decoder(), ["a", ""])
