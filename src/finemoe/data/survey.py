"""A first look at somebody's files: how much text, in how many documents of what length, and a sample of it."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from finemoe.core.errors import DataError
from finemoe.core.logs import progress
from finemoe.data.corpora import FilesCorpus
from finemoe.data.documents.document import Document, SkipReport, falls_within, unique

_SAMPLE_BYTES = 2_000_000
_PIECE = 2_000  # characters of a piece of the sample; smaller where there is little text
_ROWS = 200
_ENOUGH = 1000  # documents that have the usual field
_LONG = 0.9
_MUCH = 0.1  # of the text of the field that holds most
_NAMED = 3


@dataclass(frozen=True)
class Survey:
    """What lies in the files."""

    paths: tuple[str, ...]
    suffixes: Mapping[str, int]
    """Files by suffix."""
    disk_bytes: int
    documents: int
    text_bytes: int
    """In UTF-8, unpacked."""
    median_bytes: int
    """Of a document."""
    long_bytes: int
    """Nine of ten documents are shorter."""
    text_field: str | None
    """The field of records that holds most of the text; None where there are no records, or where it is `text`."""
    sample: tuple[str, ...] = field(repr=False)
    """Pieces from everywhere in the text, about two megabytes or all of it."""
    skipped: int = 0
    """Files and records that could not be read."""
    first_skipped: str = ""
    """The first of them, and why."""
    duplicates: int = 0
    """Documents whose text an earlier one had; not counted above."""
    empty: int = 0
    """Documents without any text; not counted above."""
    texts: tuple[str, ...] = ()
    """The fields that hold much text, `text_field` among them, in the order of the records; empty where it is None."""
    num_set_aside: int = 0
    """Files that are no text of the corpus: pictures, a README, the licence."""
    set_aside: tuple[str, ...] = ()
    """The first few of them, and what they are."""


def survey(paths: Sequence[str], quiet: bool = False) -> Survey:
    """Read all of the files once, as training does at every start.

    Args:
        paths: files, folders and globs, as of a corpus of kind `files`.
        quiet: show no progress.

    Raises:
        DataError: a path leads nowhere, or nothing in the files is text.
    """
    files = _files(paths)
    sizes = _text_sizes(tuple(paths))
    text_field = max(sizes, key=lambda name: sizes[name]) if sizes else None
    corpus = FilesCorpus(paths=tuple(paths), text_field=text_field or "text")
    report = SkipReport(quiet=True)
    sample, lengths = _Sample(), []
    with progress("reading the files", None, "documents") as shown:
        advance: Callable[[int], None] = (lambda _: None) if quiet else shown
        for document in unique(corpus.documents(report), set(), report):
            if document.text.strip():
                lengths.append(len(document.text.encode()))
                sample.add(document)
            advance(1)
    first = f"{report.skipped[0].name}: {report.skipped[0].reason}" if report.skipped else ""
    if not lengths:
        report.check(0.0)
        said = f" ({first})" if first else ""
        raise DataError(f"{', '.join(map(str, paths))}: nothing here can be read as text{said}")
    lengths.sort()
    return Survey(
        paths=tuple(paths),
        suffixes=dict(Counter(path.suffix.lower() or "no suffix" for path in files)),
        disk_bytes=sum(path.stat().st_size for path in files),
        documents=len(lengths),
        text_bytes=sum(lengths),
        median_bytes=lengths[len(lengths) // 2],
        long_bytes=lengths[min(len(lengths) - 1, int(_LONG * len(lengths)))],
        text_field=text_field,
        sample=tuple(sample.pieces()),
        skipped=report.num_skipped,
        first_skipped=first,
        duplicates=report.duplicates,
        empty=report.empty,
        texts=tuple(name for name, size in sizes.items() if size > _MUCH * max(sizes.values())),
        num_set_aside=report.num_set_aside,
        set_aside=tuple(f"{Path(one.name).name} ({one.reason})" for one in report.set_aside[:_NAMED]),
    )


class _Sample:
    """Pieces drawn by their names alone: the more text comes, the smaller the share that is kept."""

    def __init__(self) -> None:
        self._share = 1.0
        self._kept: dict[str, str] = {}
        self._size = 0

    def add(self, document: Document) -> None:
        """Take from a document what the draw says."""
        for start in range(0, len(document.text), _PIECE):
            name = f"{document.name}@{start}"
            if self._share < 1 and not falls_within(self._share, "survey", name):
                continue
            self._kept[name] = document.text[start : start + _PIECE]
            self._size += len(self._kept[name])
            while self._size > _SAMPLE_BYTES:
                self._share /= 2
                self._kept = {n: p for n, p in self._kept.items() if falls_within(self._share, "survey", n)}
                self._size = sum(map(len, self._kept.values()))

    def pieces(self) -> Iterator[str]:
        """At least a few dozen: little text is cut finer."""
        length = max(100, min(_PIECE, self._size // 60))
        for piece in self._kept.values():
            yield from (piece[start : start + length] for start in range(0, len(piece), length))


def _files(paths: Sequence[str]) -> list[Path]:
    """Every file behind the paths, hidden ones left out."""
    found: dict[Path, None] = {}
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = (one for one in sorted(path.rglob("*")) if one.is_file())
            matches: Iterable[Path] = (
                one for one in inside if not any(part.startswith(".") for part in one.relative_to(path).parts)
            )
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        found |= dict.fromkeys(one.resolve() for one in matches)
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no file is there (relative paths start at {Path.cwd()})")
    return list(found)


def _text_sizes(paths: tuple[str, ...]) -> Mapping[str, int]:
    """Characters by field, where records have no `text`; empty where that is what they have."""
    report = SkipReport(quiet=True)
    try:
        kept = sum(1 for _ in islice(FilesCorpus(paths=paths).documents(report), _ENOUGH))
    except DataError:  # a table without such a column
        sizes = {name: _size_of(paths, name) for name in (*report.lacking.characters, *report.lacking.others)}
        if not any(sizes.values()):
            raise
        return sizes
    held = report.lacking if report.lacking.records else report.beside
    return {} if kept >= held.records else held.characters


def _size_of(paths: tuple[str, ...], text_field: str) -> int:
    """Characters of the first rows, were this the field; of as many files as have it."""
    found = 0
    try:
        for document in islice(
            FilesCorpus(paths=paths, text_field=text_field).documents(SkipReport(quiet=True)), _ROWS
        ):
            found += len(document.text)
    except DataError:  # the next file has other columns
        pass
    return found
