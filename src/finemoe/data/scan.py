"""One reading of a corpus: its hash, sizes and domains, what was left out, a few texts for a self-test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finemoe.core.errors import DataError
from finemoe.core.logs import logger, progress
from finemoe.data.corpora import CorpusConfig, Side, SplitDocument, read_corpus, totals_of
from finemoe.data.documents.document import SkipReport
from finemoe.data.holdout import PartTotals, Tail, bytes_for, tails_for

SIDES: tuple[Side, ...] = ("train", "validation")
_NUM_SAMPLES = 16
_SAMPLE_CHARS = 20_000


@dataclass
class SideTotals:
    """Sizes of one side of the split."""

    documents: int = 0
    num_bytes: int = 0


@dataclass
class Scan:
    """What a reading has seen so far."""

    skips: SkipReport = field(default_factory=SkipReport)
    totals: dict[Side, SideTotals] = field(default_factory=lambda: {side: SideTotals() for side in SIDES})
    domains: dict[str, dict[Side, int]] = field(default_factory=dict)
    """Documents of each domain on each side."""
    samples: list[str] = field(default_factory=list)
    """Beginnings of the first training documents."""
    _hash: Any = field(default_factory=hashlib.sha256)

    def digest(self) -> str:
        """A hash of all documents in order, with their names, domains and places."""
        return str(self._hash.hexdigest())

    parts: list[PartTotals] = field(default_factory=list)
    """Sizes of each part."""
    tails: Mapping[int, Tail] = field(default_factory=dict)
    """The parts of which the tail is held out, as documents are too few."""

    def read(self, corpus: CorpusConfig, validation_share: float) -> Iterator[SplitDocument]:
        """Pass on the documents of `corpus`, taking note of each."""
        self.parts = totals_of(corpus)
        for item in read_corpus(corpus, validation_share, self.skips, self.tails):
            document = item.document
            encoded = document.text.encode()
            text_hash = hashlib.sha256(encoded).hexdigest()
            self._hash.update(repr((item.part, item.side, document.name, document.domain, text_hash)).encode())
            self.totals[item.side].documents += 1
            self.totals[item.side].num_bytes += len(encoded)
            self.parts[item.part].add(item.side, document.text, len(encoded))
            self.domains.setdefault(document.domain, dict.fromkeys(SIDES, 0))[item.side] += 1
            if item.side == "train" and len(self.samples) < _NUM_SAMPLES:
                self.samples.append(document.text[:_SAMPLE_CHARS])
            yield item

    def report(self) -> dict[str, Any]:
        """What was read and what was left out, as JSON."""
        return {
            "documents": {side: self.totals[side].documents for side in SIDES},
            "documents_read": self.skips.kept,
            "bytes": {side: self.totals[side].num_bytes for side in SIDES},
            "duplicates": self.skips.duplicates,
            "empty": self.skips.empty,
            "held_out": "the tail of the text" if self.tails else "whole documents",
            "num_set_aside": self.skips.num_set_aside,
            "set_aside": [{"name": one.name, "reason": one.reason} for one in self.skips.set_aside],
            "num_skipped": self.skips.num_skipped,
            "skipped": [{"name": skipped.name, "reason": skipped.reason} for skipped in self.skips.skipped],
            "domains": self.domains,
            "corpus_sha256": self.digest(),
        }


def scan_corpus(
    corpus: CorpusConfig, validation_share: float, max_skipped_share: float, sequence_length: int = 1
) -> Scan:
    """Read all of `corpus`, twice where whole documents are too few to hold some of them out.

    Raises:
        DataError: when it is empty, when a side of the split is, or when too much of it cannot be read.
    """
    scan = Scan()
    _read_through(scan, corpus, validation_share, "reading the corpus")
    scan.skips.check(max_skipped_share, "max_skipped_share")
    kept = scan.skips.kept
    if not kept:
        raise DataError(f"corpus of kind `{corpus.kind}` is empty: no document in it has any text; check its paths")
    tails = tails_for(scan.parts, validation_share, sequence_length)
    if tails:
        _say(tails, scan)
        scan = Scan(SkipReport(quiet=True), tails=tails)
        _read_through(scan, corpus, validation_share, "reading it again")
    for side in SIDES:
        if not scan.totals[side].documents:
            num_bytes = sum(total.num_bytes for total in scan.totals.values())
            held = "the one document holds" if kept == 1 else f"the {kept} documents hold"
            raise DataError(
                f"{held} {num_bytes:,} bytes of text, which is too little: one sequence of "
                f"{sequence_length} + 1 tokens to train on and one to validate on take some "
                f"{2 * bytes_for(sequence_length):,}. Add text, or lower `data.sequence_length`"
            )
    return scan


def _read_through(scan: Scan, corpus: CorpusConfig, validation_share: float, description: str) -> None:
    with progress(description, None, "documents") as advance:
        for _ in scan.read(corpus, validation_share):
            advance(1)


def _say(tails: Mapping[int, Tail], scan: Scan) -> None:
    shares = ", ".join(sorted({f"{100 * tail.share:.3g} %" for tail in tails.values()}))
    documents = sum(sum(scan.parts[index].documents.values()) for index in tails)
    each = "each document" if documents > 1 and all(tail.of_each for tail in tails.values()) else "the text"
    logger.info(
        "%s: too few to hold out whole ones, so the last %s of %s is kept for validation",
        "1 document" if documents == 1 else f"{documents} documents", shares, each,
    )  # fmt: skip
