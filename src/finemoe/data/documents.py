"""A document, what was left out on the way to it, and the hashes that decide where it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from finemoe.core.errors import DataError
from finemoe.core.logs import logger

_NAMED_IN_LOG = 20
_KEPT_NAMES = 1000


@dataclass(frozen=True)
class Document:
    """One text of a corpus. `name` is unique and stable within its corpus, `domain` is what it is about."""

    name: str
    domain: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """Something that could not be read, and why."""

    name: str
    reason: str


@dataclass
class SkipReport:
    """Counts what reading a corpus kept and left out. Nothing leaves the corpus without passing here."""

    kept: int = 0
    duplicates: int = 0
    """Documents whose text an earlier document had."""
    empty: int = 0
    """Documents without any text."""
    num_skipped: int = 0
    """Files and records that could not be read."""
    skipped: list[Skipped] = field(default_factory=list)
    """The first thousand of them, by name."""
    quiet: bool = False
    """Leave the log alone: this is a second reading of a corpus that was reported already."""

    def skip(self, name: str, reason: str) -> None:
        """Count one unreadable file or record; the first few are named in the log."""
        self.num_skipped += 1
        if self.num_skipped <= _KEPT_NAMES:
            self.skipped.append(Skipped(name, reason))
        if self.quiet or self.num_skipped > _NAMED_IN_LOG:
            return
        logger.warning("skipped %s: %s", name, reason)
        if self.num_skipped == _NAMED_IN_LOG:
            logger.warning("more was skipped; further names are in the data report only")

    def check(self, max_skipped_share: float, knob: str | None = None) -> None:
        """Accept or refuse what was skipped; `knob` is the setting that the user can raise instead of mending.

        Raises:
            DataError: when more than `max_skipped_share` of everything seen could not be read.
        """
        seen = self.kept + self.duplicates + self.empty + self.num_skipped
        if self.num_skipped <= max_skipped_share * seen:
            return
        first = "; ".join(f"{skipped.name}: {skipped.reason}" for skipped in self.skipped[:3])
        raise DataError(
            f"{self.num_skipped} of {seen} documents cannot be read ({first}): mend or remove them"
            + (f", or raise `{knob}` from {max_skipped_share}" if knob else "")
        )


def unique(documents: Iterable[Document], seen: set[bytes], report: SkipReport) -> Iterator[Document]:
    """The documents that have text which is not in `seen` yet; `seen` holds hashes and grows."""
    for document in documents:
        if not document.text:
            report.empty += 1
            continue
        digest = hashlib.sha256(document.text.encode()).digest()[:16]
        if digest in seen:
            report.duplicates += 1
            continue
        seen.add(digest)
        report.kept += 1
        yield document


def falls_within(share: float, purpose: str, name: str) -> bool:
    """Whether `name` is in the `share` of names drawn for `purpose`: its hash alone decides."""
    return _draw(purpose, name) < share * 2**64


def hash_order(purpose: str, names: Iterable[str]) -> list[str]:
    """`names` in an order that looks random and never changes."""
    return sorted(names, key=lambda name: (_draw(purpose, name), name))


def _draw(purpose: str, name: str) -> int:
    """A number below 2**64, evenly spread over names."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{name}".encode()).digest()[:8], "big")
