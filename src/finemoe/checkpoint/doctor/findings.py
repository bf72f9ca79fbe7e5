"""What an examination finds: sentences with a severity, collected while damage is turned into findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

from finemoe.core.errors import FinemoeError

Severity = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")
"""Most urgent first."""
_SHOWN = 3
_LONGEST = 600


@dataclass(frozen=True)
class Finding:
    """One sentence about one part of a checkpoint."""

    severity: Severity
    """problem: it cannot be opened, or is not what it says; warning: it opens, and may disappoint."""
    about: str
    """`files`, `config`, `weights`, `router` ..."""
    text: str


@final
class Findings:
    """Findings in the making."""

    def __init__(self) -> None:
        self._found: list[Finding] = []

    def problem(self, about: str, text: str) -> None:
        """It cannot be opened, or is not what it says."""
        self._add("problem", about, text)

    def warning(self, about: str, text: str) -> None:
        """It opens, and may disappoint."""
        self._add("warning", about, text)

    def note(self, about: str, text: str) -> None:
        """Good to know."""
        self._add("note", about, text)

    @contextmanager
    def guard(self, about: str) -> Iterator[None]:
        """Turn what damage raises into a problem; the rest of the block is left out."""
        try:
            yield
        except FinemoeError as error:
            self.problem(about, str(error))
        except OSError as error:
            self.problem(about, f"{error.filename or 'the file'}: cannot be read: {error.strerror or error}")

    def _add(self, severity: Severity, about: str, text: str) -> None:
        found = Finding(severity, about, text if len(text) <= _LONGEST else text[:_LONGEST] + " ...")
        if all((one.severity, one.text) != (severity, found.text) for one in self._found):  # a cause is told once
            self._found.append(found)

    @property
    def any_problem(self) -> bool:
        """Whether one was found so far."""
        return any(finding.severity == "problem" for finding in self._found)

    def sorted(self) -> tuple[Finding, ...]:
        """Problems first; otherwise as they were found."""
        return tuple(sorted(self._found, key=lambda finding: SEVERITIES.index(finding.severity)))


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def number(count: int, one: str, many: str | None = None) -> str:
    """`1 tensor`, `12 tensors`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
