"""A folder that appears whole or not at all: built beside its place as `<name>.partial`, renamed at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finemoe.checkpoint.storage.store import writing
from finemoe.core.errors import CheckpointError, RunError
from finemoe.core.files import sole_writer, sync
from finemoe.core.logs import logger

_MARK, _LOCK = ".source", ".lock"
_SLACK_BYTES = 64 << 20  # for headers, tokenizer, journal and manifest


def check_free(out: Path) -> Path:
    """`out` as an absolute path without links, if a folder can be made there.

    Raises:
        CheckpointError: something is there already.
    """
    out = Path(os.path.realpath(out))
    if out.is_dir() and (out / "manifest.json").exists():
        what = "is complete already (`finemoe doctor --deep` checks it)"
        raise CheckpointError(f"{out}: {what}; choose another folder, or remove it")
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise CheckpointError(f"{out}: exists already; choose another folder, or remove it")
    return out


@contextlib.contextmanager
def workspace(out: Path, source: str, nbytes: int) -> Iterator[Path]:
    """A folder to fill, which is `out` when the block has ended; what an interrupted process left is in it.

    An error removes it; only an interruption, or a full disk, leaves it for the next call to go on with.

    Args:
        out: absent, or an empty folder.
        source: what is converted and how: a `fingerprint`.
        nbytes: what will be written.

    Raises:
        CheckpointError: `out` exists, the disk is too small, or the work that was interrupted had another source.
        RunError: another process is at work there, or the disk is unwritable.
    """
    out = check_free(out)
    partial = out.with_name(out.name + ".partial")
    _check_space(partial, nbytes)
    parents = [parent for parent in out.parents if not parent.exists()]
    _check_mark(partial, source)
    with sole_writer(partial):
        check_free(out)
        if not partial.is_dir():
            raise RunError(f"{out}: another process has just given up there; give the same command again")
        _check_mark(partial, source)
        try:
            with writing(partial):
                (partial / _MARK).write_text(source, encoding="utf-8")
            yield partial
            with writing(out):
                _appear(partial, out)
        except Exception as error:
            if type(error) is RunError:  # a full disk can be mended; everything else is a refusal
                _say_kept(partial)
            else:
                shutil.rmtree(partial, ignore_errors=True)
                for parent in parents:
                    with contextlib.suppress(OSError):
                        parent.rmdir()
            raise
        except BaseException:
            _say_kept(partial)
            raise


def fingerprint(verb: str, files: Iterable[Path], *facts: Any) -> str:
    """Tells whether an interrupted conversion was one of the same `files`, with the same JSON-able `facts`."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{verb} {hashlib.sha256(json.dumps([stats, *facts]).encode()).hexdigest()}"


def _say_kept(partial: Path) -> None:
    logger.warning("what is done is kept in %s; give the same command again to go on, or remove it", partial)


def _appear(partial: Path, out: Path) -> None:
    sync(partial)
    partial.rename(out)
    sync(out.parent)
    for scaffold in out.glob(".*"):  # mark, lock, journals: a kill just before leaves them, and nobody minds
        scaffold.unlink()


def _check_mark(partial: Path, source: str) -> None:
    if not partial.is_dir():
        if partial.exists():
            raise CheckpointError(f"{partial}: is in the way; remove it")
        return
    mark = partial / _MARK
    if mark.is_file():
        if mark.read_bytes() not in (source.encode(), b""):
            raise CheckpointError(
                f"{partial}: was left by an interrupted conversion of another source, or with other options; "
                "finish that one, or remove the folder"
            )
    elif any(path.name != _LOCK for path in partial.iterdir()):
        raise CheckpointError(f"{partial}: is in the way; remove it")


def _check_space(partial: Path, nbytes: int) -> None:
    """Refuse before hours of work what cannot be finished."""
    needed = nbytes + _SLACK_BYTES
    with writing(partial):
        if partial.is_dir():
            needed -= sum(path.stat().st_blocks * 512 for path in partial.iterdir() if path.is_file())
        home = next(parent for parent in (partial, *partial.parents) if parent.exists())
        free = shutil.disk_usage(home).free
    if needed > free:
        raise CheckpointError(
            f"{partial.parent}: not enough disk: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        )
