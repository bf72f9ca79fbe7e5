"""A folder or file that appears whole or not at all: built in `<name>.partial` beside its place, renamed at the end.

Every writer of a checkpoint works there, under that one name, which a lock keeps to one process at a time: what a
killed process leaves is taken over by the next that gives the same command.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finemoe.checkpoint.storage.store import writing
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.files import sole_writer, sync
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import logger

_MARK, _LOCK, _MOVED = ".source", ".lock", ".moved"
SMALL_FILES_BYTES = 64 << 10
"""Configuration, index, manifest, mark and lock, in blocks of the file system."""
_TENSOR_BYTES = 1 << 10  # of a tensor in headers, journal, manifest and account, together


def check_apart(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Check that writing `out` touches nothing of `source`, whatever links and `..` the paths have.

    Raises:
        CheckpointError: they are one, or one lies in the other; says so about the paths as they were given.
    """
    there, place = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    other = "choose a place outside of it"
    if place == there:
        raise CheckpointError(f"{out}: is the source {source} itself, which is never written to; {other}")
    if place.is_relative_to(there):
        raise CheckpointError(f"{out}: lies in the source {source}, which is never written to; {other}")
    if there.is_relative_to(place):
        raise CheckpointError(f"{out}: the source {source} lies in it; choose a place that does not exist yet")
    if there.is_relative_to(partial_of(place)):
        raise CheckpointError(
            f"{out}: is made in {partial_of(place).name} beside it, where the source {source} lies; choose another name"
        )


def partial_of(out: Path) -> Path:
    """Where `out` lies until it is complete."""
    return out.with_name(out.name + ".partial")


def check_free(out: Path) -> Path:
    """`out` as an absolute path without links, if a folder or file can be made there.

    Raises:
        CheckpointError: something is there already.
    """
    out = Path(os.path.realpath(out))
    if out.exists():
        _tidy(out)
    if out.is_dir() and (out / "manifest.json").exists():
        what = "is complete already (`finemoe doctor --deep` checks it)"
        raise CheckpointError(f"{out}: {what}; choose another folder, or remove it")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CheckpointError(f"{out}: exists already; choose another name, or remove it")
    return out


@contextlib.contextmanager
def workspace(out: Path, source: str, nbytes: int, *, tensors: int = 0, inner: str | None = None) -> Iterator[Path]:
    """A folder to fill, which is `out` when the block has ended; what an interrupted process left is in it.

    An error removes it; only an interruption, or a full disk, leaves it for the next call to go on with.

    Args:
        out: absent, or an empty folder.
        source: what is converted and how: a `fingerprint`.
        nbytes: what will be written, the smallest files aside.
        tensors: how many of them, each of which has its lines in those files.
        inner: what in the folder becomes `out`, by `appear` or at the end; the rest goes. None: the folder itself.

    Raises:
        CheckpointError: `out` exists, the disk is too small, or the work that was interrupted had another source.
        RunError: another process is at work there, or the disk is unwritable.
    """
    out = check_free(out)
    partial = partial_of(out)
    _check_mark(partial, source)
    if nbytes:
        check_space(partial, nbytes + SMALL_FILES_BYTES + _TENSOR_BYTES * tensors)
    parents = [parent for parent in out.parents if not parent.exists()]
    with sole_writer(partial):
        try:
            check_free(out)
            _check_mark(partial, source)
        except CheckpointError:  # another process has finished, or begun, while this one waited
            if [path.name for path in partial.iterdir()] == [_LOCK]:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            with writing(partial):
                if not (partial / _MARK).exists() or not (partial / _MARK).stat().st_size:
                    (partial / _MARK).write_text(source, encoding="utf-8")
                (partial / _MOVED).unlink(missing_ok=True)
            yield partial
            if inner is None:
                with writing(out):
                    _become(partial, out)
            else:
                appear(partial, inner, out)
                _dismantle(partial)
        except Exception as error:
            if type(error) is RunError:  # a full disk can be mended; everything else is a refusal
                _say_kept(partial)
            else:
                _dismantle(partial)
                for parent in parents:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise
        except BaseException:
            _say_kept(partial)
            raise


def appear(partial: Path, inner: str, out: Path) -> None:
    """Give `inner` of a workspace its name `out`, for good, unless it has it.

    Raises:
        RunError: the system refuses.
    """
    if (partial / _MOVED).exists():
        return
    with writing(out):
        (partial / _MOVED).write_text(inner, encoding="utf-8")
        sync(partial / inner)
        (partial / inner).rename(out)
        sync(out.parent)


def fingerprint(verb: str, files: Iterable[Path], *facts: Any) -> str:
    """Tells whether an interrupted conversion was one of the same `files`, with the same JSON-able `facts`."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{verb} {hashlib.sha256(json.dumps([stats, *facts]).encode()).hexdigest()}"


def check_space(partial: Path, nbytes: int) -> None:
    """Refuse before hours of work what cannot be finished: room for `nbytes`, less what `partial` has of it already.

    Raises:
        CheckpointError: the disk is too small.
        RunError: it cannot be looked at.
    """
    with writing(partial):
        kept = [path for path in partial.rglob("*") if path.is_file()] if partial.is_dir() else []
        needed = nbytes - sum(path.stat().st_blocks * 512 for path in kept)
        home = next(parent for parent in (partial, *partial.parents) if parent.exists())
        free = shutil.disk_usage(home).free
    if needed > free:
        raise CheckpointError(
            f"{partial.parent}: not enough disk: {_size(needed)} are needed and {_size(free)} are free"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _say_kept(partial: Path) -> None:
    if any((parent / _MARK).exists() for parent in partial.parents):
        return  # the workspace that this one is a part of says so
    logger.warning("what is done is kept in %s; give the same command again to go on, or remove it", partial)


def _become(partial: Path, out: Path) -> None:
    sync(partial)
    partial.rename(out)
    sync(out.parent)
    _remove_scaffold(out)


def _remove_scaffold(out: Path) -> None:
    """Mark, lock and journals; the mark last, by which they are known to be ours."""
    for scaffold in sorted(out.glob(".*"), key=lambda path: path.name == _MARK):
        scaffold.unlink()


def _dismantle(partial: Path) -> None:
    """Remove a workspace, what says that it is one last, so that a kill meanwhile leaves nothing without an owner."""
    for names in ({_MARK, _MOVED, _LOCK}, {_MOVED, _LOCK}, set[str]()):
        for path in partial.iterdir() if partial.is_dir() else ():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)


def _tidy(out: Path) -> None:
    """Remove what a kill leaves that came when `out` had just got its name: its workspace, or the scaffold in it."""
    partial = partial_of(out)
    moved, mark = partial / _MOVED, out / _MARK
    with contextlib.suppress(OSError, TimeoutError):
        if mark.is_file() and re.fullmatch(r"\w+ [0-9a-f]{64}", mark.read_text(encoding="utf-8")):
            _remove_scaffold(out)
        if moved.is_file() and not (partial / (moved.read_text(encoding="utf-8") or ".")).exists():
            with exclusive_lock(partial / _LOCK, patience=0):
                _dismantle(partial)


def _check_mark(partial: Path, source: str) -> None:
    if not partial.is_dir():
        if partial.exists():
            raise CheckpointError(f"{partial}: is in the way; remove it")
        return
    mark = partial / _MARK
    if mark.is_file():
        if mark.read_bytes() not in (source.encode(), b""):
            raise CheckpointError(
                f"{partial}: was left by an interrupted conversion of another source, of one that has changed, or "
                "with other options; finish that one, or remove the folder"
            )
    elif any(path.name not in (_LOCK, _MOVED) for path in partial.iterdir()):
        raise CheckpointError(f"{partial}: is in the way; remove it")
