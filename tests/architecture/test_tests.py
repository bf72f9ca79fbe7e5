"""Rules that the tests keep themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from test_architecture import MAX_FILE

FILES = sorted(Path(__file__).parents[1].rglob("*.py"))
LONG: dict[str, str] = {}
"""A file below tests/ that is over the budget -> why that is better than cutting it."""


def test_files_keep_their_budget() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name for name, lines in lengths.items() if lines > MAX_FILE} == set(LONG)


def test_no_two_files_of_tests_have_one_name() -> None:
    # pytest imports them by it, and the list of mutants finds them by it.
    names = Counter(path.name for path in FILES if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
