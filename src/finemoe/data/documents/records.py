"""The records in a JSON object that is a whole file: under a key, by number, by rows or by columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finemoe.data.documents.fields import steps_of

LISTS = ("data", "Data", "examples", "rows")
"""Keys under which a JSON object keeps a list of records."""
_TEXT = (str, int, float)


def records_in(value: Mapping[str, Any], names: Sequence[str], named: bool) -> list[Any] | None:
    """The records of a file that is the object `value`; None where it is none but a record itself, or something else.

    Args:
        value: the object.
        names: of the fields that make a text.
        named: the user named this very file, so that it must hold records.
    """
    if not names:  # whole records, whatever they are: a list of them, or one
        return next((value[key] for key in LISTS if _is_records(value.get(key))), None)
    wanted = [steps_of(name)[0] for name in names]
    if columns := _by_columns(value, wanted):
        return columns
    if all(first in value or name in value for first, name in zip(wanted, names, strict=True)):
        return None
    if (rows := _by_rows(value)) is not None:
        return rows
    under = next((value[key] for key in LISTS if isinstance(value.get(key), list)), None)
    return under if under is not None else _only_list(value, wanted, named) or _by_key(value, wanted)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _only_list(value: Mapping[str, Any], wanted: list[str], named: bool) -> list[Any] | None:
    """The only list of objects under any key, where they have the text, or must have it."""
    found = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
    if len(found) != 1 or not (named or all(name in found[0][0] for name in wanted)):
        return None
    return found[0]


def _by_key(value: Mapping[str, Any], wanted: list[str]) -> list[Any] | None:
    """Records under a key each, as pandas writes `orient="index"`."""
    records = list(value.values())
    whole = all(isinstance(one, dict) and all(isinstance(one.get(name), _TEXT) for name in wanted) for one in records)
    return records if records and whole else None


def _by_rows(value: Mapping[str, Any]) -> list[Any] | None:
    """Rows under names that stand apart, as pandas writes `orient="split"`."""
    names, rows = value.get("columns"), value.get("data")
    if not isinstance(names, list) or not isinstance(rows, list) or not all(isinstance(name, str) for name in names):
        return None
    if not rows or not all(isinstance(row, list) and len(row) == len(names) for row in rows):
        return None
    return [dict(zip(names, row, strict=True)) for row in rows]


def _by_columns(value: Mapping[str, Any], wanted: list[str]) -> list[Any] | None:
    """Columns of one length, as lists, or as objects with the same keys: what pandas writes by itself."""
    columns = list(value.values())
    if not columns or not all(name in value for name in wanted):
        return None
    if all(isinstance(one, list) for one in columns) and len({len(one) for one in columns}) == 1:
        cells = columns
    elif all(isinstance(one, dict) for one in columns) and all(one.keys() == columns[0].keys() for one in columns):
        cells = [[one[key] for key in columns[0]] for one in columns]
    else:
        return None
    texts = [cells[place] for place, name in enumerate(value) if name in wanted]
    if not all(text is None or isinstance(text, _TEXT) for column in texts for text in column):
        return None  # a record whose field is a list of parts
    return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)]
