"""Which files of a folder a task reads: by the set's name, then by the split. Nothing is read on a guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemoe.core.errors import DataError
from finemoe.core.logs import logger
from finemoe.data.documents.document import SkipReport
from finemoe.data.documents.hub_rows import config_names, rows
from finemoe.evaluation.records import Record, kind_of, read_records

TEST = ("test", "tests")
VALIDATION = ("validation", "valid", "val", "dev")
TRAIN = ("train",)
WORKED = ("cot-prompts",)
"""BIG-Bench Hard's folder of worked examples."""
_SPLITS = (*TEST, *VALIDATION, *TRAIN, *WORKED)
_NO_DATA = re.compile(r"^(readme|license|licence|notice|changelog|requirements)\b", re.IGNORECASE)
_SHOWN = 6
EVERY = "*"
"""Of a hub dataset: all its configurations, one subject each."""

Beside = Callable[[Path], Callable[[int], Mapping[str, Any]]]
"""What stands beside a file (labels, answers): given the file, what its n-th record gains."""


@dataclass(frozen=True)
class Hub:
    """Where a set lies on the Hugging Face hub."""

    dataset: str
    config: str | None
    asked: str
    """The split that is asked."""
    shots: str | None = None
    """The split that worked examples come from."""


@dataclass(frozen=True)
class DataForm:
    """Where and in what form a task's records are found."""

    patterns: tuple[str, ...]
    """Regular expressions for the set's name in a path, lower case, the most telling first."""
    asked: tuple[str, ...]
    """Words for the split that is asked, best first."""
    shots: tuple[str, ...]
    """Words for the split that worked examples come from."""
    forms: str
    """For people: the forms that are read."""
    hub: Hub | None = None
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
    header: bool = True
    """A CSV's first row names the columns."""
    text_lines: bool = False
    """A .txt holds JSON Lines."""
    beside: Beside | None = None
    loose: tuple[str, ...] = ()
    """Suffixes that will do under any name, where no file has the set's."""

    def asked_records(self, source: Path | None, report: SkipReport) -> Iterator[Record]:
        """The records to ask.

        Raises:
            DataError: nothing at `source`, or no file there that is this set.
        """
        if source is None:
            return self._hub_records(self.hub.asked if self.hub else "", report)
        files = self._asked_files(source)
        if source.is_dir():
            logger.info("%s: read %s", source, _some([name for _, name in files]))
        return self._read(files, report)

    def shot_records(self, source: Path | None, report: SkipReport) -> Iterator[Record]:
        """The records of the split for worked examples; none where it is not at hand."""
        if source is None:
            split = self.hub.shots if self.hub else None
            return self._hub_records(split, report) if split else iter(())
        if not source.is_dir():
            return self._read(self._siblings(source), report)
        files = self._named(source)
        for word in self.shots:
            if chosen := [file for file in files if _has_word(word, file[1])]:
                return self._read(chosen, report)
        return iter(())

    def _hub_records(self, split: str, report: SkipReport) -> Iterator[Record]:
        if self.hub is None:
            raise DataError(
                f"no data given, and this set is not read from the hub: name a file or folder ({self.forms})"
            )
        name, config = self.hub.dataset, self.hub.config
        for part in config_names(name) if config == EVERY else [config]:
            for number, row in enumerate(rows(name, part, split, None), start=1):
                path = part or name
                yield Record(row, f"{name} {part or ''} {split}:{number}", path, number)

    def _asked_files(self, source: Path) -> list[tuple[Path, str]]:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; read are {self.forms}")
        if not source.is_dir():
            suffix, _ = kind_of(source)
            if suffix not in self.suffixes:
                known = ", ".join(self.suffixes)
                raise DataError(f"{source}: a {suffix or 'nameless'} file; read are {self.forms} (suffixes {known})")
            return [(source, source.name)]
        files = self._named(source)
        for word in self.asked:
            if chosen := [file for file in files if _has_word(word, file[1])]:
                return chosen
        rest = [file for file in files if not any(_has_word(word, file[1]) for word in _SPLITS)]
        if not rest:
            raise DataError(self._nothing(source, f"no file of the split {' or '.join(self.asked)}"))
        return rest

    def _named(self, folder: Path) -> list[tuple[Path, str]]:
        """Data files that are this set's: by name, else those that have no name but a split's."""
        found = []
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).as_posix()
            if path.is_file() and not _is_hidden(inside) and kind_of(path)[0] in self.suffixes:
                found.append((path, inside))
        root = folder.resolve().name.lower()
        for pattern in self.patterns:
            for before in ("", f"{root}/"):  # the folder's own name counts last
                if named := [file for file in found if re.search(pattern, before + file[1].lower())]:
                    return named
        chosen = [file for file in found if _is_nameless(file[1]) or kind_of(file[0])[0] in self.loose]
        if not chosen:
            raise DataError(self._nothing(folder, "no file whose name is this set's"))
        return chosen

    def _nothing(self, folder: Path, what: str) -> str:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [name for name in names if kind_of(Path(name))[0] in self.suffixes and not _is_hidden(name)]
        found = f"of files {', '.join(self.suffixes)} there are {_some(names) or 'none'}"
        return f"{folder}: {what} ({found}): name the file itself; read are {self.forms}"

    def _siblings(self, file: Path) -> list[tuple[Path, str]]:
        """The file beside this one whose name, or whose folder's, has the other split's word in its place."""
        for word in _SPLITS:
            for other in self.shots:
                name = re.sub(_word(word), other, file.name)
                folder = re.sub(_word(word), other, file.parent.name)
                for beside in (file.parent / name, file.parent.parent / folder / name):
                    if beside != file and name + folder != file.name + file.parent.name and beside.is_file():
                        return [(beside, beside.name)]
        return []

    def _read(self, files: list[tuple[Path, str]], report: SkipReport) -> Iterator[Record]:
        for path, name in files:
            more = self.beside(path) if self.beside else None
            for record in read_records(path, name, report, self.header, self.text_lines):
                if more is None:
                    yield record
                else:
                    value = {**more(record.number), **record.value}
                    yield Record(value, record.where, record.path, record.number)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _is_hidden(name: str) -> bool:
    """Hidden, or a text about the data."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or _NO_DATA.match(parts[-1]) is not None


def _word(word: str) -> str:
    return rf"(?<![a-zA-Z]){word}(?![a-zA-Z])"


def _has_word(word: str, name: str) -> bool:
    return re.search(_word(word), name.lower()) is not None


def _is_nameless(name: str) -> bool:
    """`test-00000-of-00001.parquet`, `test/physics_test.csv`: a split's name is all that can be told of it."""
    *folders, file = name.lower().split("/")
    if folders and folders[0] not in (*_SPLITS, "data"):
        return False  # another set's folder, for all we know
    plain = re.fullmatch(rf"({'|'.join(_SPLITS)}|data)([-_.]?(\d+|of))*", file.split(".")[0])
    return plain is not None or any(folder in _SPLITS for folder in folders)
