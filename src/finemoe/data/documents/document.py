"""A document, what was left out on the way to it, and the hashes that decide where it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finemoe.core.encodings import in_utf8
from finemoe.core.errors import DataError
from finemoe.core.logs import logger
from finemoe.data.documents.fields import is_chat, shown

_NAMED_IN_LOG = 20
_KEPT_NAMES = 1000
_KEPT_FIELDS = 50
_FEW_UNFIT = 4  # beside one long text a few PDFs are no mistake


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
class FieldReport:
    """Records that lack a field which was asked for, and what they have instead."""

    records: int = 0
    asked: list[str] = field(default_factory=list)
    characters: dict[str, int] = field(default_factory=dict)
    """Of text, by the field that holds it."""
    others: dict[str, None] = field(default_factory=dict)
    """Fields that hold something else."""
    chat: str | None = None
    """A field that holds conversations."""
    lists: dict[str, None] = field(default_factory=dict)
    """Fields that hold lists of records."""

    def add(self, record: Mapping[str, Any], asked: list[str]) -> None:
        """Take note of one record; `asked` are the fields that would make its text."""
        self.records += 1
        self.asked = self.asked or asked
        for name, value in list(record.items())[:_KEPT_FIELDS]:
            if isinstance(value, str):
                self.characters[name] = self.characters.get(name, 0) + len(value)
            else:
                self.others[name] = None
                if is_chat(value):
                    self.chat = self.chat or name
                elif isinstance(value, list) and value and isinstance(value[0], dict):
                    self.lists[name] = None

    def advice(self, seen: int, recipe: bool) -> str:
        """What went wrong and what to set; `recipe` says whether by keys of a recipe or by options of a command."""
        field_key, template_key = ("`data.corpus.text_field`", "`data.corpus.template`")
        if not recipe:
            field_key, template_key = "--text-field", "--template"
        by_size = sorted(self.characters, key=lambda name: -self.characters[name])
        has = shown([*by_size, *(name for name in self.others if name not in self.characters)])
        lacks = " or ".join(f"`{name}`" for name in self.asked)
        message = f"{self.records} of {seen} records have no field {lacks}; their fields are {has}"
        if by_size:
            message += f": set {field_key} to the one that holds the text, such as {by_size[0]!r}"
            if len(by_size) > 1:
                both = "\\n".join(f"{{{name}}}" for name in self.characters if name in by_size[:2])
                message += f", or join several by {template_key}, such as '{both}'"
        elif self.lists and self.chat is None:
            lists = " and ".join(f"`{name}`" for name in self.lists)
            message += f". {lists} hold{'' if len(self.lists) > 1 else 's'} lists of records: write the one to train on"
            message += " into a file of its own"
        elif self.chat is None:
            message += ", and none of them holds text"
        if self.chat is not None:
            message += (
                f". `{self.chat}` holds conversations, and a corpus is plain text: write the turns of each into one "
                f"text field first, or pick single ones by {template_key}, such as '{{{self.chat}[0][content]}}'"
            )
        return message


@dataclass
class SkipReport:
    """Counts what reading a corpus kept and left out. Nothing leaves the corpus without passing here."""

    kept: int = 0
    duplicates: int = 0
    """Documents whose text an earlier document had."""
    drawn: bool = field(default=False, compare=False)
    """They are made in code, where some are drawn again by chance: no fault of anybody's data."""
    empty: int = 0
    """Documents without any text."""
    num_skipped: int = 0
    """Files and records that could not be read."""
    skipped: list[Skipped] = field(default_factory=list)
    """The first thousand of them, by name."""
    num_set_aside: int = 0
    """Files beside the texts that were never meant as text: pictures, a README, the licence."""
    num_unfit: int = 0
    """Of those, the ones that somebody may have meant as text: web pages, PDFs, archives."""
    set_aside: list[Skipped] = field(default_factory=list)
    """The first thousand of them, by name."""
    lacking: FieldReport = field(default_factory=FieldReport)
    """Records that lack a field which was asked for."""
    beside: FieldReport = field(default_factory=FieldReport)
    """JSON files of a single object that lacks it, counted in `num_set_aside`: perhaps no record at all."""
    tables: int = field(default=0, compare=False)
    """Tables that had the columns which were asked for."""
    odd_table: tuple[str, str] | None = field(default=None, compare=False)
    """The first table in a folder without them, and what is wrong with it; all texts may be elsewhere."""
    quiet: bool = False
    """Leave the log alone: this is a second reading of a corpus that was reported already."""

    def skip(self, name: str, reason: str) -> None:
        """Count one unreadable file or record; the first few are named in the log."""
        self.num_skipped += 1
        if self.num_skipped <= _KEPT_NAMES:
            self.skipped.append(Skipped(in_utf8(name), reason))
        if self.quiet or self.num_skipped > _NAMED_IN_LOG:
            return
        logger.warning("skipped %s: %s", name, reason)
        if self.num_skipped == _NAMED_IN_LOG:
            logger.warning("more was skipped; further names are in the data report only")

    def skip_record(self, name: str, reason: str, record: Mapping[str, Any], fields: list[str]) -> None:
        """Count one record without a field that was asked for; the log names the first alone, as they come in hosts."""
        self.lacking.add(record, fields)
        quiet, self.quiet = self.quiet, self.quiet or self.lacking.records > 1
        self.skip(name, reason)
        self.quiet = quiet

    def leave_out(self, name: str, what: str, unfit: bool) -> None:
        """Count one file that is no text of the corpus; `unfit` as in `num_unfit`."""
        self.num_set_aside += 1
        self.num_unfit += unfit
        if self.num_set_aside <= _KEPT_NAMES:
            self.set_aside.append(Skipped(in_utf8(name), what))

    def meet_table(self, name: str, problem: str | None, named: bool) -> bool:
        """Take note of a table; whether it is to be read.

        Args:
            name: the file.
            problem: what is wrong with its columns, if anything.
            named: the user named this very file.

        Raises:
            DataError: it lacks a column and is meant as text, as it was named or others like it have the column.
        """
        odd = self.odd_table or ((name, problem) if problem else None)
        self.tables += problem is None
        if odd is not None and (named or self.tables):
            raise DataError(problem or odd[1])
        self.odd_table = odd
        if problem is not None:
            self.leave_out(name, "a table without the column of the text", unfit=False)
        return problem is None

    def check(self, max_skipped_share: float, knob: str | None = None) -> None:
        """Say what was left out, and accept or refuse what was skipped.

        Args:
            max_skipped_share: more than this of everything seen is an error.
            knob: the setting of a recipe that the user can raise instead of mending; None: there is no recipe.

        Raises:
            DataError: too much could not be read, or most of what is there is no text at all.
        """
        seen = self.kept + self.duplicates + self.empty + self.num_skipped
        few = ", ".join(f"{Path(one.name).name} ({one.reason})" for one in self.set_aside[:3])
        more = f" and {self.num_set_aside - 3} more" if self.num_set_aside > 3 else ""
        if self.num_unfit > max(seen, _FEW_UNFIT) or (self.num_set_aside and not seen):
            if self.beside.records * 2 > self.num_set_aside:
                raise DataError(self.beside.advice(seen + self.num_set_aside, recipe=knob is not None))
            raise DataError(
                f"{self.num_set_aside} of {seen + self.num_set_aside} files are no text to train on: {few}{more}. Turn "
                "them into text files or JSON Lines first, or name the files that hold the text"
            )
        if self.num_set_aside and not self.quiet:
            logger.warning("left out, as no text of the corpus: %s%s", few, more)
        if self.duplicates and knob and not self.quiet and self.drawn:
            again = "once" if self.duplicates == 1 else f"{self.duplicates:,} times"
            logger.info("problems came up again %s, as there are only so many: each is read once", again)
        elif self.duplicates and knob and not self.quiet:
            copies = "1 document is a copy" if self.duplicates == 1 else f"{self.duplicates:,} documents are copies"
            logger.info("%s of others, and left out", copies)
        if self.num_skipped <= max_skipped_share * seen:
            return
        if self.lacking.records * 2 > seen:
            raise DataError(self.lacking.advice(seen, recipe=knob is not None))
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
