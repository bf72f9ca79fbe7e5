"""The small text files beside the weights of a model, which others wrote: which ones there are, and how they are read.

Bounded in size, and never through a link out of their folder.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemoe.core.contents import AGAIN, HEAD_BYTES, JSON, contents_of, explain
from finemoe.core.encodings import decode_text
from finemoe.core.errors import DataError
from finemoe.core.logs import logger
from finemoe.core.reading import require_whole_characters

MEGABYTE = 2**20
TOKENIZER_LIMIT = 64 * MEGABYTE
CONFIG_LIMIT = 16 * MEGABYTE
COMPANIONS: Mapping[str, str] = {
    "tokenizer.json": "the tokenizer is lost, and the model runs on token ids alone",
    "tokenizer_config.json": "special tokens, what begins a text and a chat template are lost where it alone has them",
    "special_tokens_map.json": "special tokens are lost where this file alone names them",
    "added_tokens.json": "tokens are lost where this file alone names them",
    "generation_config.json": "tokens that end a generation are lost where this file alone names them",
    "chat_template.jinja": "its chat template is lost",
    "chat_template.json": "its chat template is lost",
}
"""Files of text and tokens that travel with the weights of a model -> what is lost with one that cannot be read."""
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
    if leads_out(folder, name):
        raise DataError(f"{what} {file}: is a link that leads out of its folder: put the file itself there")
    return read_bounded(file, limit, what)


def leads_out(folder: Path, name: str) -> bool:
    """Whether `name` in `folder` is a link elsewhere or in a circle: refused however little is lost with it."""
    file = folder / name
    if not file.is_symlink():
        return False
    try:
        file.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return True
    return not _stays(folder, file)


def read_table(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object of a companion; an empty one where there is none, or, with a warning, none that can be read.

    Raises:
        DataError: a link that leads out of the folder.
    """
    try:
        text = read_beside(folder, name, CONFIG_LIMIT, "file")
        return {} if text is None else parse_object(text, str(folder / name))
    except DataError as error:
        if leads_out(folder, name):
            raise
        lost = COMPANIONS.get(name, "tokens that end a generation are lost where this file alone names them")
        logger.warning("%s; left out: %s", error, lost)
        return {}


def template_problem(data: bytes) -> str | None:
    """Why the content of a chat_template.jinja is no template, so that "it ..." is a sentence; None: it is text."""
    found = contents_of(data[:HEAD_BYTES])
    if found.kind != "empty" and not data.strip():
        return "is empty"
    if found.kind not in ("text", *JSON):
        return found.sentence if found.kind == "pointer" else f"is {found.what}: {AGAIN}"
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start})"
    return "holds zero bytes, which no text does" if "\x00" in text else None


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
    if not text.strip():
        raise DataError(f"{what}: not JSON: it is empty")
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
