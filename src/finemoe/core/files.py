"""Files that are whole or not there: written under a temporary name, synced, renamed, and the folder synced.

Without the last a power cut may undo the renaming, long after the file was read and others were written by it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from finemoe.core.errors import RunError
from finemoe.core.locks import exclusive_lock

_PATIENCE_SECONDS = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step; when this returns, a power cut does not bring the old file back.

    Raises:
        RunError: the disk is full or the folder unwritable; an old file stays as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to fill beside `path` that becomes it in one step when the block ends well, and else goes.

    It has one name, so that what a killed process leaves is taken over by the next that writes `path`; two that are
    alive take turns.

    Raises:
        RunError: the disk is full, the folder unwritable, or another process writes there for more than ten seconds;
            an old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(temporary, patience=_PATIENCE_SECONDS))
            os.truncate(temporary, 0)
            held.callback(_forget, temporary, os.stat(temporary))
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except TimeoutError as error:
            raise RunError(f"{path}: another process is writing it; wait for it, or end it") from error
        except OSError as error:
            raise storage_error(path, error) from error


def _forget(temporary: Path, ours: os.stat_result) -> None:
    """Remove the file, unless it has its name by now and another one bears this."""
    with suppress(FileNotFoundError):
        if os.path.samestat(temporary.stat(), ours):
            temporary.unlink()


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Make `directory` and keep every other finemoe process from writing into it.

    Waits ten seconds for one that is ending: a killed comparison's runs save what they have.

    Raises:
        RunError: another process is at work there, or the folder cannot be made.
    """
    with ExitStack() as held:
        _lock_folder(directory, held)
        yield


def _lock_folder(directory: Path, held: ExitStack) -> None:
    while True:
        try:
            make_folder(directory)
            held.enter_context(exclusive_lock(directory / ".lock", patience=_PATIENCE_SECONDS))
            return
        except FileNotFoundError:  # the process that was waited for has renamed or removed the folder
            continue
        except TimeoutError as error:
            raise RunError(f"{directory}: another process is at work there; wait for it, or end it") from error
        except OSError as error:
            raise storage_error(directory, error) from error


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, so that a power cut takes none of them away again.

    Raises:
        OSError: the system refuses.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)


def storage_error(path: Path, error: OSError) -> RunError:
    """The plain words for an OSError on writing."""
    if error.errno in _FULL:
        how = "a run with `finemoe resume`, anything else with the same command"
        return RunError(f"{path}: the disk is full; free some space and go on: {how}")
    return RunError(f"{path}: cannot be written: {error.strerror or error}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write to `path` into plain words.

    Raises:
        RunError: the disk is full or `path` unwritable.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def plain_words(error: OSError) -> str:
    """What the system refused and where, without its number; for what nobody nearer to it has put into words."""
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    if error.errno in _FULL:
        return f"{place}the disk is full; free some space and give the same command again"
    return f"{place}{(error.strerror or str(error) or type(error).__name__).lower()}"


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
