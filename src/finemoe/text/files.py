"""The small text files beside the weights of a model, which others wrote: which ones there are, and how they are read.

Bounded in size, and never through a link out of their folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finemoe.core.contents import HEAD_BYTES, JSON, explain
from finemoe.core.encodings import decode_text
from finemoe.core.errors import DataError
from finemoe.core.reading import require_whole_characters

MEGABYTE = 2**20
TOKENIZER_LIMIT = 64 * MEGABYTE
CONFIG_LIMIT = 16 * MEGABYTE
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of text and tokens that travel with the weights of a model."""
MOST_BRACKETS = 4_000_000
"""Of lists and objects in a JSON file: three bytes of `[],` become more than sixty in memory."""


def read_bounded(file: Path, limit: int, what: str) -> str:
    """The text of `file`, which `what` names in errors: UTF-8, or what its byte order mark says.

    Raises:
        DataError: it cannot be read, is no plain file, or is larger than `limit` bytes.
    """
    try:
        if not file.is_file():
            raise DataError(f"{what} {file}: cannot be read: there is no such file")
        size = file.stat().st_size
        if size > limit:
            raise DataError(
                f"{what} {file}: {size / MEGABYTE:.0f} MiB is more than the {limit // MEGABYTE} MiB allowed"
            )
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{what} {file}: cannot be read: {error.strerror or error}") from error
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        held = explain(data, JSON) or f"is not UTF-8 (byte {error.start})"
        raise DataError(f"{what} {file}: cannot be read: it {held}") from error


def read_beside(folder: Path, name: str, limit: int, what: str) -> str | None:
    """The text of `name` in `folder`; None where there is no such file.

    Raises:
        DataError: as `read_bounded`, and for a link that leads out of the folder.
    """
    file = folder / name
    if not file.exists() and not file.is_symlink():
        return None
    if file.is_symlink() and not _stays(folder, file):
        raise DataError(f"{what} {file}: is a link that leads out of its folder: put the file itself there")
    return read_bounded(file, limit, what)


def _stays(folder: Path, file: Path) -> bool:
    """Whether a link stays in its folder, or in its own repository of a hub cache (snapshots/* -> blobs/*)."""
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError):  # a link to itself; Python before 3.13 raises RuntimeError
        return False
    if target.is_relative_to(home):
        return True
    repository = home.parent.parent
    cached = home.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--"))
    return cached and target.is_relative_to(repository)


def parse_object(text: str, what: str) -> dict[str, Any]:
    """`text` as a JSON object.

    Raises:
        DataError: it is not JSON, is nested too deeply, has too many lists, or is not an object.
    """
    if text.count("[") + text.count("{") > MOST_BRACKETS:  # those in strings too: no real file comes near
        raise DataError(f"{what}: more than {MOST_BRACKETS} lists and objects, which no real file has")
    try:
        value = json.loads(text.removeprefix("\ufeff"))
        require_whole_characters(text.encode("utf-8", "replace"), value)
    except RecursionError as error:
        raise DataError(f"{what}: nested too deeply") from error
    except ValueError as error:
        held = explain(text[:HEAD_BYTES].encode("utf-8", "replace"), JSON)
        raise DataError(f"{what}: it {held}" if held else f"{what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{what}: must be a JSON object, not {type(value).__name__}")
    return value
