"""One reading of a corpus: its hash, sizes and domains, what was left out, a few texts for a self-test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finemoe.core.errors import DataError
from finemoe.core.logs import progress
from finemoe.data.corpora import CorpusConfig, Side, SplitDocument, read_corpus
from finemoe.data.documents import SkipReport

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

    def read(self, corpus: CorpusConfig, validation_share: float) -> Iterator[SplitDocument]:
        """Pass on the documents of `corpus`, taking note of each."""
        for item in read_corpus(corpus, validation_share, self.skips):
            document = item.document
            encoded = document.text.encode()
            text_hash = hashlib.sha256(encoded).hexdigest()
            self._hash.update(repr((item.part, item.side, document.name, document.domain, text_hash)).encode())
            self.totals[item.side].documents += 1
            self.totals[item.side].num_bytes += len(encoded)
            self.domains.setdefault(document.domain, dict.fromkeys(SIDES, 0))[item.side] += 1
            if item.side == "train" and len(self.samples) < _NUM_SAMPLES:
                self.samples.append(document.text[:_SAMPLE_CHARS])
            yield item

    def report(self) -> dict[str, Any]:
        """What was read and what was left out, as JSON."""
        return {
            "documents": {side: self.totals[side].documents for side in SIDES},
            "bytes": {side: self.totals[side].num_bytes for side in SIDES},
            "duplicates": self.skips.duplicates,
            "empty": self.skips.empty,
            "num_skipped": self.skips.num_skipped,
            "skipped": [{"name": skipped.name, "reason": skipped.reason} for skipped in self.skips.skipped],
            "domains": self.domains,
            "corpus_sha256": self.digest(),
        }


def scan_corpus(corpus: CorpusConfig, validation_share: float, max_skipped_share: float) -> Scan:
    """Read all of `corpus`.

    Raises:
        DataError: when it is empty, when a side of the split is, or when too much of it cannot be read.
    """
    scan = Scan()
    with progress("reading the corpus", None, "documents") as advance:
        for _ in scan.read(corpus, validation_share):
            advance(1)
    scan.skips.check(max_skipped_share, "max_skipped_share")
    if not scan.skips.kept:
        raise DataError(f"corpus of kind `{corpus.kind}` is empty: no document in it has any text; check its paths")
    for side in SIDES:
        if not scan.totals[side].documents:
            raise DataError(
                f"none of the {scan.skips.kept} documents is on the {side} side of the split: name files of "
                f"their own for validation (`validation_paths`), change `data.validation_share` from "
                f"{validation_share}, or add text"
            )
    return scan
