"""One writer at a time: advisory locks that the system releases however their process ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.2


def is_held(path: Path) -> bool:
    """Whether some process holds the lock file `path` now. Takes nothing but a look."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or none that may be read
        return False
    return False


@contextmanager
def exclusive_lock(
    path: Path, *, patience: float | None = None, on_wait: Callable[[], object] | None = None
) -> Iterator[None]:
    """Hold the lock file `path`, which is made where it is missing, and left as it is where it holds something.

    A holder may rename or remove it, as it does with a file that it locks to fill: who waited for that file then waits
    for the one that has the name now.

    Args:
        path: in an existing folder.
        patience: seconds to wait for another holder; None: for ever.
        on_wait: called once when there is another holder.

    Raises:
        TimeoutError: patience ran out.
        OSError: the file cannot be opened.
    """
    started = time.monotonic()
    waited = False
    while True:
        with path.open("ab") as lock:
            if _taken(lock.fileno(), path):
                yield
                return
        if not waited and on_wait is not None:
            on_wait()
        waited = True
        if patience is not None and time.monotonic() - started > patience:
            raise TimeoutError(f"{path} is held by another process")
        time.sleep(_POLL_SECONDS)


def _taken(file: int, path: Path) -> bool:
    """Lock an open file; whether it is ours now, and still the one that is called `path`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
