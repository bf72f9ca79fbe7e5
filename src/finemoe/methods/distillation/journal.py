"""A file of lines that grows item by item, and a hidden file beside it that says how far it is.

The lines of an item are written first, then one line of the journal with the length of the file after them: whatever
stands behind the last length was being written when somebody pulled the plug, and is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, final

from finemoe.core.errors import ConfigError, RunError
from finemoe.core.files import writing
from finemoe.core.locks import exclusive_lock


@final
@dataclass
class Journal:
    """What was written so far, and where more goes."""

    lines: IO[bytes]
    log: IO[bytes]
    prompts: int = 0
    """Items done."""
    drawn: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    verdicts: dict[str, Counter[str]] = field(default_factory=dict)
    """By reward."""

    @staticmethod
    @contextmanager
    def open(path: Path, facts: Mapping[str, Any]) -> Iterator[Journal]:
        """Begin `path`, or go on with it where it was begun with the same JSON-able `facts`.

        Raises:
            ConfigError: it was begun with others, or is a file that somebody else wrote.
            RunError: it cannot be written, or another process is writing it.
        """
        log, lock = _beside(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with exclusive_lock(lock, patience=1.0):
                try:
                    records = _records(path, log, facts)
                    with writing(path), path.open("ab") as lines, log.open("ab") as journal:
                        made = Journal(lines, journal)
                        made._begin(records, facts)
                        yield made
                finally:
                    lock.unlink(missing_ok=True)
        except TimeoutError as error:
            raise RunError(f"{path}: another process is writing it; wait for it, or end it") from error

    def _begin(self, records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
        if not records:
            self.log.truncate(0)
            self._say(facts)
        for record in records[1:]:
            self._count(record)
        self.lines.truncate(records[-1]["bytes"] if len(records) > 1 else 0)
        self.log.truncate(sum(len(_encoded(record)) for record in records) if records else self.log.tell())
        for stream in (self.lines, self.log):
            stream.seek(0, os.SEEK_END)

    def add(self, lines: Sequence[str], counts: Mapping[str, Any]) -> None:
        """One more item: its lines, and what is counted of it: `drawn`, `kept`, `left_out`, `verdicts`."""
        self.lines.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
        self.lines.flush()
        self._say({**counts, "bytes": self.lines.tell()})
        self._count(counts)

    def _say(self, record: Mapping[str, Any]) -> None:
        self.log.write(_encoded(record))
        self.log.flush()

    def _count(self, record: Mapping[str, Any]) -> None:
        self.prompts += 1
        self.drawn += record["drawn"]
        self.kept += record["kept"]
        self.left_out.update(record["left_out"])
        for name, counts in record.get("verdicts", {}).items():
            self.verdicts.setdefault(name, Counter()).update(counts)


def forget(path: Path) -> None:
    """Take away what lies hidden beside `path`, which is done: it cannot be gone on with any more."""
    for hidden in _beside(path):
        hidden.unlink(missing_ok=True)


def _beside(path: Path) -> tuple[Path, Path]:
    """The journal, and the lock of who writes."""
    return path.with_name(f".{path.name}.progress"), path.with_name(f".{path.name}.lock")


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _records(path: Path, log: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The whole lines of the journal, the facts first; none where nothing was begun."""
    if not log.exists():
        if path.exists() and path.stat().st_size:
            raise ConfigError(
                f"{path} is there already, whole or somebody else's: nothing is overwritten, so name another --out, or "
                "remove it"
            )
        return []
    records = []
    size = path.stat().st_size if path.exists() else 0
    for line in log.read_bytes().split(b"\n")[:-1]:  # behind the last line end there is nothing, or a torn line
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record.get("bytes", 0) > size:  # the file did not come to the disk that far
            break
        records.append(record)
    if records and {name: records[0].get(name) for name in facts} != dict(facts):
        raise ConfigError(f"{path} was begun with {_otherwise(records[0], facts)}: name another --out, or remove it")
    return records


def _otherwise(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Each fact that is another, by the option that it is given with, with both values where they are short."""
    other = [name for name in new if old.get(name) != new[name]]
    if "template" in other:  # by which the same prompts are other ones
        other = [name for name in other if name != "prompts"]
    return ", ".join(_told(name, old.get(name), new[name]) for name in sorted(other))


def _told(name: str, old: Any, new: Any) -> str:
    if name in ("model", "prompts", "records"):  # known by their hashes
        return f"{'another' if name == 'model' else 'other'} {name}"
    option = f"--{name.replace('_', '-')}"
    if isinstance(new, Sequence) and not isinstance(new, str):
        return f"other {option}"
    return f"{option} {_value(old)}, now {_value(new)}"


def _value(value: Any) -> str:
    return "left out" if value is None else json.dumps(value, ensure_ascii=False)
