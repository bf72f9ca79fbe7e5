"""Reading what finemoe wrote: whatever is wrong with a file becomes one error that names it and says what mends it.

A disk, a copy that broke off or an editor may have changed any byte, so what a file holds is never taken for granted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finemoe.core.errors import FinemoeError, RunError

_MOST_DIGITS = 100  # of a whole number; Python itself stops at 4,300, and a float at 308
_SHOWN = 160
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@contextmanager
def damage_of(
    what: object,
    mend: str,
    error: type[FinemoeError] = RunError,
    *,
    ours: tuple[type[Exception], ...] = (FinemoeError,),
) -> Iterator[None]:
    """Around nothing but the reading of `what`: whatever goes wrong inside is damage.

    Args:
        what: the file, or a part of it, as the message shall begin.
        mend: what the user can do about it.
        error: what is raised.
        ours: exceptions that say it themselves, and pass.

    Raises:
        FinemoeError: an `error`.
    """
    try:
        yield
    except Exception as found:
        if isinstance(found, ours):
            raise
        raise error(f"{what}: {reason_of(found)}; {mend}") from found


def reason_of(error: BaseException) -> str:
    """Why a file could not be read, in plain words, without the name of the file."""
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be read ({error.strerror.lower()})"
    if isinstance(error, UnicodeDecodeError):
        return "damaged: it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"damaged: not JSON (line {error.lineno}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "damaged: it is nested too deeply"
    if isinstance(error, KeyError) and error.args:
        return f"damaged: it does not hold {str(error.args[0])[:_SHOWN]!r}"
    if isinstance(error, TypeError | AttributeError | IndexError | OverflowError):
        return "damaged: a value in it is not of the kind that belongs there"
    lines = str(error).splitlines()
    return f"damaged: {lines[0][:_SHOWN]}" if lines else "damaged"


def decode_json(data: bytes) -> Any:
    """The value that UTF-8 JSON of ours holds; NaN and infinities are numbers here, as `json` writes them.

    Raises:
        ValueError: it is none, in words that `reason_of` gives back.
    """
    try:
        found = json.loads(data.decode("utf-8"), parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    require_whole_characters(data, found)
    return found


def require_whole_characters(data: bytes, found: Any) -> None:
    """Refuse half a character, which JSON can spell and no file can hold.

    Args:
        data: JSON in UTF-8.
        found: what it holds.

    Raises:
        ValueError: there is one.
    """
    if _SURROGATE.search(data):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a character, which no text can") from error


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number in it has {len(text)} digits")
    return int(text)


def read_object(
    path: Path, mend: str, error: type[FinemoeError] = RunError, *, what: str | None = None
) -> dict[str, Any]:
    """The JSON object in a file of ours, which errors call `what`, or by its path.

    Raises:
        FinemoeError: an `error`; it is missing, cannot be read, is damaged or holds something else.
    """
    with damage_of(what or path, mend, error):
        found = decode_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it must hold a JSON object, not {_kind(found)}")
        return found


def require_numbers(found: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Make sure that `found` holds a number under each of `names`.

    Raises:
        ValueError: it does not; names the first.
    """
    for name in names:
        if name not in found:
            raise ValueError(f"it does not hold `{name}`")
        if not is_number(found[name]):
            raise ValueError(f"`{name}` must be a number, not {_kind(found[name])}")


def is_number(value: object) -> bool:
    """Whether it is a number, as no truth value is."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: object) -> str:
    words = {dict: "a table", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return words.get(type(value), "nothing")
