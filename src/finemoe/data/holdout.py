"""What is held out where documents are too few to hold some of them out: the tail of the text.

Whole documents are held out by the hash of their names. One file, or seven of which none is drawn, leave a side of that
split without text; then the tail of each document is validated on, or the last documents where they are short.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

_BYTES_PER_TOKEN = 8  # more than any common tokenizer has on average: so much text surely makes a sequence
_WORTH_A_TAIL = 500  # characters; where tails would be shorter, whole documents are held out from the end
_BREAKS = ("\n\n", "\n", " ")


@dataclass
class PartTotals:
    """Sizes of one part of a corpus, by the side on which the hashes of names put its documents."""

    names_validation: bool
    """It brings documents of its own for validation, so nothing is held out."""
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    num_bytes: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    characters: int = 0

    def add(self, side: str, text: str, num_bytes: int) -> None:
        """Count one document."""
        self.documents[side] += 1
        self.num_bytes[side] += num_bytes
        self.characters += len(text)

    def most_tokens(self, side: str) -> int:
        """What a side cannot have more of: a token is a byte at the least, and one more ends each document."""
        return self.num_bytes[side] + self.documents[side]


@dataclass(frozen=True)
class Tail:
    """The tail of one part of a corpus."""

    share: float
    """Of its characters."""
    total: int
    """Characters of all its documents."""
    of_each: bool
    """The tail of each document; else of all of them one after the other."""

    def cut(self, text: str, before: int) -> int:
        """Where the tail of `text` begins, if `before` characters of this part come before it; 0 is all of it."""
        start = len(text) if self.of_each else self.total
        at = start - int(start * self.share) - (0 if self.of_each else before)
        if at <= 0:
            return 0
        return _break_near(text, at) if at < len(text) else len(text)


def _break_near(text: str, at: int) -> int:
    """The first end of a paragraph, line or word after `at` that leaves a good half of the tail; else `at`."""
    for mark in _BREAKS:
        found = text.find(mark, at, at + (len(text) - at) // 2)
        if found >= 0:
            return found + len(mark)
    return at


NO_TAILS: Mapping[int, Tail] = MappingProxyType({})


def bytes_for(sequence_length: int) -> int:
    """So much text makes one sequence, with all but surprising tokenizers."""
    return _BYTES_PER_TOKEN * (sequence_length + 1)


def may_need_tails(parts: Sequence[PartTotals], sequence_length: int) -> bool:
    """Whether a side of the split may not fill one sequence, by what was counted so far."""
    return _unvalidated(parts, sequence_length) or any(part.most_tokens("train") <= sequence_length for part in parts)


def _unvalidated(parts: Sequence[PartTotals], sequence_length: int) -> bool:
    """Whether what is drawn for validation is less than what surely makes a sequence."""
    return sum(part.num_bytes["validation"] for part in parts) < bytes_for(sequence_length)


def tails_for(parts: Sequence[PartTotals], share: float, sequence_length: int) -> dict[int, Tail]:
    """The parts whose tail is to be held out instead of whole documents, by number; none where documents will do."""
    needed = sequence_length + 1
    unvalidated = _unvalidated(parts, sequence_length)
    found = {}
    for index, part in enumerate(parts):
        everything = part.most_tokens("train") + part.most_tokens("validation")
        short = unvalidated or part.most_tokens("train") < needed
        if part.names_validation or not short or everything < 2 * needed:
            continue
        enough = min(0.5, bytes_for(sequence_length) / sum(part.num_bytes.values()))
        held, num_documents = max(min(share, 0.5), enough), sum(part.documents.values())
        of_each = num_documents == 1 or held * part.characters / num_documents >= _WORTH_A_TAIL
        found[index] = Tail(held, part.characters, of_each)
    return found


def divided(text: str, tail: Tail, before: int) -> Iterator[tuple[bool, str]]:
    """`text` in one or two pieces, each with whether it is held out."""
    at = tail.cut(text, before)
    if text[:at]:
        yield False, text[:at]
    if text[at:]:
        yield True, text[at:]
