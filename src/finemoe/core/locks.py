"""One writer at a time: advisory locks that the system releases however their process ends."""

from __future__ import annotations

import fcntl
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
    """Hold the lock file `path`, which is made where it is missing.

    Args:
        path: in an existing folder.
        patience: seconds to wait for another holder; None: for ever.
        on_wait: called once when there is another holder.

    Raises:
        TimeoutError: patience ran out.
        OSError: the file cannot be opened.
    """
    with path.open("w") as lock:
        started = time.monotonic()
        waited = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited and on_wait is not None:
                    on_wait()
                waited = True
                if patience is not None and time.monotonic() - started > patience:
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(_POLL_SECONDS)
        yield
