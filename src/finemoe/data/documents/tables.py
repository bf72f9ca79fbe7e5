"""What a table of columns adds to records: its structs have the fields of all rows, null where a row has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OPEN = ("tools", "tool_calls")
"""Fields whose insides are somebody's schema or arguments, and differ from record to record."""


def without_added(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Parquet or Arrow without the nulls inside its tools and calls of them, wherever these stand.

    A null that was meant looks the same there, and goes too; elements of lists stay. Tools that are kept as a text of
    JSON are left as they are.
    """
    return {key: _searched(key, value) for key, value in record.items()}


def _searched(key: str, value: Any) -> Any:
    if key in _OPEN:
        return _cleared(value)
    if isinstance(value, Mapping):
        return {inner: _searched(inner, one) for inner, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_searched("", one) for one in value]
    return value


def _cleared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cleared(one) for key, one in value.items() if one is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_cleared(one) for one in value]
    return value
