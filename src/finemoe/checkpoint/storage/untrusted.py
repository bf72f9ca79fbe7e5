"""Foreign folders, touched safely: nothing is executed, no pickle is opened, no link followed out of the folder.

A file from elsewhere may be damaged or hostile. What is read here is bounded in size and depth before it is parsed, and
is refused with a plain sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from finemoe.core.contents import JSON, explain
from finemoe.core.encodings import decode_text, mark_of
from finemoe.core.errors import CheckpointError
from finemoe.text.files import CONFIG_LIMIT, MOST_BRACKETS, TOKENIZER_LIMIT

CONFIG_BYTES = CONFIG_LIMIT
"""Largest config.json, index or other small JSON file that is read."""
TOKENIZER_BYTES = TOKENIZER_LIMIT
"""Largest tokenizer.json that is read."""
MAX_DEPTH = 64
"""Deepest nesting of brackets; real files have fewer than ten levels."""
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
"""Suffixes of files that would run code when opened. They never are."""

# A string, whole or cut off, or one bracket. Possessive, so that no input makes it backtrack.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?+"?+|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PLAIN_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")  # V3 is published in model-00001-of-000163
_HUB_CACHE = re.compile(r"models--[^/]+")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` names it in errors.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, nested too deeply, a key twice, or a number that is not
            finite.
    """
    if mark_of(data) is not None:  # as editors on Windows save it
        with contextlib.suppress(UnicodeDecodeError):  # told below, with everything else that is no JSON
            data = decode_text(data).encode("utf-8")
    if not data.strip():
        raise CheckpointError(f"{where}: is empty, so not valid JSON: an object is needed")
    _check_brackets(data, where)
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character could not be written again
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeError are ValueErrors
        held = explain(data, JSON)
        raise CheckpointError(f"{where}: {held}" if held else f"{where}: not valid JSON: {_brief(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(value).__name__}, but an object is needed")
    return value


def _brief(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 200 else text[:200] + " ..."


def _check_brackets(data: bytes, where: str) -> None:
    depth = count = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            count += 1
            if depth > MAX_DEPTH:
                raise CheckpointError(f"{where}: nested more than {MAX_DEPTH} levels deep, which no real file is")
            if count > MOST_BRACKETS:
                raise CheckpointError(f"{where}: more than {MOST_BRACKETS} lists and objects, which no real file has")
        elif first in b"]}":
            depth -= 1


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: absent, not a regular file, larger, or unreadable.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if found.st_size > limit:
            raise CheckpointError(f"{path}: has {found.st_size} bytes, but such a file has at most {limit}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path}: grows while it is read")
    return data


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_json(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        CheckpointError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit), str(path))


def folder_file(folder: Path, name: str) -> Path:
    """The path of the plain file `name` right in `folder`.

    A symbolic link may lead to a file in the folder, and from a snapshot of the hub cache
    (`models--x--y/snapshots/<revision>`) to anywhere in its own `models--x--y`.

    Raises:
        CheckpointError: `name` has a folder in it, no such file, not a regular one, or a link that leads out.
    """
    if not _PLAIN_NAME.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(f"{folder}: {_shown(name)} is not a plain file name, so it is not opened")
    path = folder / name
    try:
        home = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
        regular = stat.S_ISREG(real.stat().st_mode)
    except FileNotFoundError as error:
        broken = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise CheckpointError(f"{path}: {broken}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}") from error
    if not real.is_relative_to(_allowed(home)):
        raise CheckpointError(f"{path}: a symbolic link that leads out of the folder; copy the file in its place")
    if not regular:
        raise CheckpointError(f"{path}: not a regular file")
    return path


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 100 else name[:100] + "...")


def _allowed(home: Path) -> Path:
    """Where links from `home` may lead."""
    cache = home.parent.parent
    is_snapshot = home.parent.name == "snapshots" and _HUB_CACHE.fullmatch(cache.name)
    return cache if is_snapshot else home


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a folder."""

    files: tuple[Path, ...]
    """Sorted by name."""
    index: Mapping[str, str] | None
    """Tensor name -> file name, where there is an index."""
    notes: tuple[str, ...]
    """What lies there and is not read, in words."""
    warnings: tuple[str, ...] = ()
    """The same of what looks like a part of the weights."""


def weight_files(folder: Path) -> WeightFiles:
    """Find a folder's weights: `model.safetensors`, or shards with their index.

    Raises:
        CheckpointError: not a folder, no weights, pickle files alone, shards missing from folder or index, or links
            that lead out.
    """
    names = _names(folder)
    tensors = {name for name in names if name.endswith(".safetensors")}
    index: dict[str, str] | None = None
    if _INDEX in names:
        index = _read_index(folder_file(folder, _INDEX))
        wanted = set(index.values())
        _check_shards(folder, wanted, tensors)
    elif _SINGLE in tensors:
        wanted = {_SINGLE}
    else:
        _refuse_without_weights(folder, names, tensors)
    files = tuple(folder_file(folder, name) for name in sorted(wanted))
    shards = sorted(name for name in tensors - wanted if index is not None and _SHARD.fullmatch(name))
    warnings = [f"{', '.join(shards[:3])}{' ...' if shards[3:] else ''}: not named in {_INDEX}, not read"] * bool(
        shards
    )
    notes = [f"{name}: not part of the weights, ignored" for name in sorted(tensors - wanted - set(shards))]
    pickles = sorted(name for name in names if Path(name).suffix.lower() in PICKLES)
    if pickles:
        notes.append(f"{', '.join(pickles[:3])}{' ...' if pickles[3:] else ''}: pickle files are never opened, ignored")
    return WeightFiles(files, index, tuple(notes), tuple(warnings))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no such folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be listed: {_reason(error)}") from error


def _read_index(path: Path) -> dict[str, str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path}: `weight_map` must say for every tensor which file holds it")
    if not table:
        raise CheckpointError(f"{path}: `weight_map` is empty")
    return table


def _check_shards(folder: Path, wanted: set[str], present: set[str]) -> None:
    for name in sorted(wanted):
        if not _PLAIN_NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / _INDEX}: names {_shown(name)}, but only .safetensors files in the folder itself are opened"
            )
    absent = sorted(wanted - present)
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        raise CheckpointError(
            f"{folder / _INDEX}: names {absent[0]}{more}, not in the folder; fetch the whole repository"
        )
    if _SINGLE in present - wanted:  # transformers would read it, and leave the index alone
        raise CheckpointError(
            f"{folder}: {_SINGLE} is not in {_INDEX}, so it is unclear which weights count; remove one of the two"
        )


def _refuse_without_weights(folder: Path, names: list[str], tensors: set[str]) -> NoReturn:
    if any(_SHARD.fullmatch(name) for name in tensors):
        raise CheckpointError(f"{folder}: has shards but no {_INDEX}; fetch the whole repository")
    if tensors:
        raise CheckpointError(f"{folder}: has {min(tensors)}, but weights are called {_SINGLE}, or have an index")
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickle weights ({pickles[0]}), which may run code when opened; "
            "get the checkpoint as safetensors"
        )
    raise CheckpointError(f"{folder}: no weights in it (no {_SINGLE} and no {_INDEX})")
