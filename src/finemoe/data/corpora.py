"""Where documents come from. A corpus is one config class with two reading methods and a line in a table."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeAlias

from pydantic import Field, model_validator

from finemoe.core.config import Config, union_of
from finemoe.core.encodings import in_utf8
from finemoe.core.errors import DataError
from finemoe.data.documents.document import Document, SkipReport, falls_within, hash_order, unique
from finemoe.data.documents.fields import EncodingName, Fields, TemplateText, TextFields, WholeRecord, require_one_way
from finemoe.data.documents.formats import TextFile, no_records, read_file, read_text_file, record_document
from finemoe.data.documents.hub_rows import rows
from finemoe.data.holdout import NO_TAILS, PartTotals, Tail, divided, may_need_tails, tails_for
from finemoe.data.interpreter_corpus import InterpreterCorpus
from finemoe.data.problems.corpus import ProblemsCorpus

Side = Literal["train", "validation"]


class Corpus(Protocol):
    """A source of documents."""

    @property
    def kind(self) -> str:
        """Its name in `CORPORA`."""

    def documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document]:
        """Its documents, in an order that depends on nothing but the corpus; `whole`: records, each as JSON."""

    def validation_documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document] | None:
        """Documents kept for validation; None when a share of `documents` is to be set aside."""


class StdlibCorpus(Config):
    """The standard library of the running Python: on every machine, and big enough to learn from."""

    kind: Literal["stdlib"] = "stdlib"
    include_tests: bool = False
    """Also read the libraries' test folders."""
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    """[bytes] Read only files of about this many bytes in all, drawn evenly over the packages."""

    def documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document]:
        """One document a file, by path; its domain is the top-level package or module."""
        no_records(self.kind, whole)
        root = Path(sysconfig.get_paths()["stdlib"])
        for name in self._names(root):
            domain = name.split("/")[0].removesuffix(".py")
            yield from read_text_file(TextFile(root / name, name, domain), report)

    def validation_documents(self, report: SkipReport, whole: bool = False) -> None:
        """A share of `documents` is set aside."""

    def _names(self, root: Path) -> list[str]:
        left_out = {"site-packages", "dist-packages", "__pycache__"}
        left_out |= set() if self.include_tests else {"test", "tests", "idle_test"}
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in left_out]  # installed packages can be huge
            inside = Path(folder).relative_to(root)
            names += [(inside / name).as_posix() for name in files if name.endswith(".py")]
        names.sort()
        if not names:
            raise DataError(f"{root}: the standard library has no .py files here; use a corpus of kind `files`")
        if self.max_bytes is None:
            return names
        chosen, total = [], 0
        for name in hash_order("stdlib", names):
            total += (root / name).stat().st_size
            if total > self.max_bytes:
                break
            chosen.append(name)
        return sorted(chosen)


class FilesCorpus(Config):
    """Text files, JSON Lines, JSON, CSV, Parquet and Arrow, plain or packed: files, folders and glob patterns."""

    kind: Literal["files"] = "files"
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, folders (read whole, hidden files left out) and globs, relative to the current directory."""
    text_field: str = "text"
    """The field or column of a record that holds its text; `outer.inner` for one within another."""
    template: TemplateText | None = None
    """Joins several fields instead, by names in braces: "{question}\\n{answer}"."""
    domain_field: str | None = None
    """The field or column that holds its domain; without it the folder or file name is the domain."""
    encoding: EncodingName = "utf-8"
    """Of text without a byte order mark, by Python's name: cp1252, gb18030, utf-16-le ..."""
    validation_paths: tuple[str, ...] = ()
    """Validate on these files and split nothing."""

    @model_validator(mode="after")
    def _one_way_to_the_text(self) -> FilesCorpus:
        require_one_way(self.text_field, self.template)
        return self

    def require_there(self, later: Sequence[str] = ()) -> None:
        """Check that every path leads to something, but for those that begin with one of `later`.

        Raises:
            DataError: one leads to nothing.
        """
        for pattern in (*self.paths, *self.validation_paths):
            if not pattern.startswith(tuple(later)):
                next(_find(pattern), None)

    def documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document]:
        """One document a text file or record, by file name, then in the file's own order."""
        return self._read(self.paths, report, whole)

    def validation_documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document] | None:
        """The documents of `validation_paths`, when there are any."""
        return self._read(self.validation_paths, report, whole) if self.validation_paths else None

    def _read(self, patterns: tuple[str, ...], report: SkipReport, whole: bool) -> Iterator[Document]:
        fields: Fields = WholeRecord() if whole else TextFields(self.text_field, self.template)
        # By resolved path: a file that two patterns name is read once. By its own path: what a link leads to, as in the
        # cache of the hub, has a name that says nothing.
        found: dict[Path, tuple[str, Path, bool]] = {}
        for pattern in patterns:
            for path, name, named in _find(pattern):
                known, first, before = found.get(path.resolve(), (in_utf8(name), path, False))
                found[path.resolve()] = known, first, named or before
        empty = True
        for _, (name, path, named) in sorted(found.items(), key=lambda item: (item[1][0], item[0])):
            folders = name.split("/")[:-1]
            # Beneath a folder that was named, its first sub-folder tells texts apart; else the folder, else
            # the file.
            domain = folders[min(1, len(folders) - 1)] if folders else name.split(".")[0]
            file = TextFile(path, name, domain, fields, self.domain_field, self.encoding, named)
            for document in read_file(file, report):
                empty = False
                yield document
        if empty and report.odd_table is not None:
            raise DataError(report.odd_table[1])


def _find(pattern: str) -> Iterator[tuple[Path, str, bool]]:
    """Files behind one pattern, each with a name that does not say where the data lies on this machine, and whether
    the pattern means this very file, or its suffix.
    """
    try:
        path = Path(pattern).expanduser()
        path.exists()  # raises for a name too long to be one
    except (RuntimeError, OSError) as error:
        raise DataError(f"corpus path {pattern}: {error}") from error
    if path.is_dir():
        for file in path.rglob("*"):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                yield file, (Path(path.resolve().name) / inside).as_posix(), False
    elif path.exists():
        yield path, path.name, True
    elif glob.has_magic(pattern):
        parts = path.parts
        fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        files = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        if not files:
            raise DataError(f"corpus path {pattern}: the pattern matches no file in {Path.cwd()}")
        for file in files:
            yield file, file.relative_to(fixed).as_posix(), file.suffix == path.suffix != ""
    else:
        raise DataError(f"corpus path {pattern}: no such file or folder (relative paths start at {Path.cwd()})")


class HuggingFaceCorpus(Config):
    """A dataset of the Hugging Face hub, by name. Needs the `[hf]` extra."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """The dataset's name on the hub, `owner/dataset`."""
    config: str | None = None
    """The dataset's configuration, where it has several."""
    revision: str | None = None
    """A branch, tag or commit; the newest without it."""
    split: str = "train"
    """Of the dataset: what to train on."""
    validation_split: str | None = None
    """Validate on this split of the dataset and split nothing."""
    text_field: str = "text"
    """The column that holds the text."""
    template: TemplateText | None = None
    """Joins several columns instead, by names in braces: "{question}\\n{answer}"."""
    domain_field: str | None = None
    """The column that holds the domain; without it the dataset's name is the domain."""

    @model_validator(mode="after")
    def _one_way_to_the_text(self) -> HuggingFaceCorpus:
        require_one_way(self.text_field, self.template)
        return self

    def documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document]:
        """One document a row, in order."""
        return self._read(self.split, report, whole)

    def validation_documents(self, report: SkipReport, whole: bool = False) -> Iterator[Document] | None:
        """The rows of `validation_split`, when there is one."""
        return self._read(self.validation_split, report, whole) if self.validation_split else None

    def _read(self, split: str, report: SkipReport, whole: bool) -> Iterator[Document]:
        table = rows(self.name, self.config, split, self.revision)
        name = f"{self.name}/{split}"
        fields: Fields = WholeRecord() if whole else TextFields(self.text_field, self.template)
        source = TextFile(Path(name), name, self.name, fields, self.domain_field)
        for number, row in enumerate(table, start=1):
            yield from record_document(row, source, number, f"{name}:{number}", report)


SINGLE_CORPORA: dict[str, type[Config]] = {
    "stdlib": StdlibCorpus,
    "interpreter": InterpreterCorpus,
    "problems": ProblemsCorpus,
    "files": FilesCorpus,
    "huggingface": HuggingFaceCorpus,
}

if TYPE_CHECKING:
    SingleCorpusConfig: TypeAlias = Corpus
else:
    SingleCorpusConfig = union_of(SINGLE_CORPORA.values())


class MixturePart(Config):
    """A corpus and its share of the training sequences, relative to the other parts."""

    corpus: SingleCorpusConfig
    """Any corpus but a mixture."""
    weight: Annotated[float, Field(gt=0)]
    """[parts] Its share of the training sequences, relative to the other weights."""


class MixtureCorpus(Config):
    """Several corpora; each training sequence comes from one of them, in proportion to the weights."""

    kind: Literal["mixture"] = "mixture"
    parts: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
    """The corpora to mix, each with its weight."""


CORPORA: dict[str, type[Config]] = {**SINGLE_CORPORA, "mixture": MixtureCorpus}

if TYPE_CHECKING:
    CorpusConfig: TypeAlias = Corpus | MixtureCorpus
else:
    CorpusConfig = union_of(CORPORA.values())


def parts_of(corpus: CorpusConfig) -> tuple[MixturePart, ...]:
    """The parts of a mixture; any other corpus is a mixture of one."""
    if isinstance(corpus, MixtureCorpus):
        return corpus.parts
    return (MixturePart(corpus=corpus, weight=1.0),)


@dataclass(frozen=True)
class SplitDocument:
    """A document with its place: which part of the mixture it is of, and which side of the split it is on."""

    part: int
    side: Side
    document: Document


def read_corpus(
    corpus: CorpusConfig,
    validation_share: float,
    report: SkipReport,
    tails: Mapping[int, Tail] = NO_TAILS,
    *,
    whole: bool = False,
) -> Iterator[SplitDocument]:
    """Every document of `corpus` once, in a fixed order, with its side of the split.

    Of a part in `tails` the tail is held out, and a document may come as two. Else a document is on the validation side
    iff the hash of its name falls within `validation_share`, or all of those the corpus names for validation are and no
    other. A text is kept where it is met first and dropped
    everywhere after, so no text is in two parts or on both sides. Validation documents that a corpus names
    are met before its others. `whole`: every document is a record with all its fields, as JSON.

    Raises:
        DataError: a corpus that cannot be read; or, of one without records, records are asked for.
    """
    seen: set[bytes] = set()
    for index, part in enumerate(parts_of(corpus)):
        validation = part.corpus.validation_documents(report, whole)
        if validation is not None:
            for document in unique(validation, seen, report):
                yield SplitDocument(index, "validation", document)
        before = 0
        for document in unique(part.corpus.documents(report, whole), seen, report):
            if index in tails:
                for aside, text in divided(document.text, tails[index], before):
                    name = f"{document.name}#tail" if aside else document.name
                    piece = Document(name, document.domain, text)
                    yield SplitDocument(index, "validation" if aside else "train", piece)
                before += len(document.text)
                continue
            aside = validation is None and falls_within(validation_share, "validation", document.name)
            yield SplitDocument(index, "validation" if aside else "train", document)


def held_out(
    corpus: CorpusConfig, validation_share: float, sequence_length: int, report: SkipReport
) -> Iterator[Document]:
    """The documents that a run with these settings validates on."""
    tails = tails_for(_part_totals(corpus, validation_share, sequence_length), validation_share, sequence_length)
    for found in read_corpus(corpus, validation_share, report, tails):
        if found.side == "validation":
            yield found.document


def _part_totals(corpus: CorpusConfig, validation_share: float, sequence_length: int) -> list[PartTotals]:
    """Sizes of all parts; read no further than it takes to see that whole documents are held out."""
    totals = totals_of(corpus)
    for number, found in enumerate(read_corpus(corpus, validation_share, SkipReport(quiet=True))):
        totals[found.part].add(found.side, found.document.text, len(found.document.text.encode()))
        if number % 64 == 0 and not may_need_tails(totals, sequence_length):
            break
    return totals


def totals_of(corpus: CorpusConfig) -> list[PartTotals]:
    """Totals of nothing yet, for each part of `corpus`."""
    parts = [part.corpus for part in parts_of(corpus)]
    return [PartTotals(part.validation_documents(SkipReport(quiet=True)) is not None) for part in parts]
