"""Folders that are built once and found afterwards.

A folder is built beside its final place under a lock, and appears there in one rename: whoever finds it finds
all of it, and of two processes that need it one builds while the other waits. What is found is verified by
whoever opens it; damage is repaired by building it again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from finemoe.core.errors import DataError
from finemoe.core.locks import exclusive_lock
from finemoe.core.logs import logger

T = TypeVar("T")


class DamagedError(Exception):
    """A cached folder is not what it was when it was built. It never leaves `open_or_build`."""


def open_or_build(folder: Path, open_folder: Callable[[Path], T], build: Callable[[Path], object]) -> T:
    """`open_folder(folder)`, after `build(<a fresh folder>)` where it is missing or damaged.

    `open_folder` raises DamagedError for a folder that is not as it was built.

    Raises:
        DataError: when the cache cannot be written.
    """
    damage = None
    if folder.is_dir():
        try:
            return open_folder(folder)
        except DamagedError as error:
            damage = error
    with _locked(folder):
        if folder.is_dir():  # perhaps another process was faster
            try:
                return open_folder(folder)
            except DamagedError as error:
                damage = error
        if damage is not None:
            logger.warning("the cache is damaged and is built again: %s", damage)
        _build(folder, build)
        return open_folder(folder)


def _build(folder: Path, build: Callable[[Path], object]) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir()
        build(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(f"cache folder {folder.parent} cannot be written ({error}): set `cache_dir`") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the one lock for `folder`. The system releases it when the process ends, however it ends."""
    with ExitStack() as held:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = exclusive_lock(
                folder.with_name(f"{folder.name}.lock"),
                on_wait=lambda: logger.info("another process is preparing the same data; waiting for it"),
            )
            held.enter_context(lock)
        except OSError as error:
            raise DataError(f"cache folder {folder.parent} cannot be written ({error}): set `cache_dir`") from error
        yield
