"""Process memory: keep freed pages, large pages for weights, what is free, and the peak."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 1 << 21
_UNLIMITED = 1 << 60  # how the first interface of control groups writes that there is no limit


def keep_freed_pages() -> bool:
    """Ask glibc to keep freed memory in the process instead of returning it to the system.

    A training step frees and asks for the same large buffers again. With glibc's defaults each of them is a fresh
    mapping whose pages fault one by one: up to a third of a small step. True when the setting took effect (glibc only).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl and others have no mallopt
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))


def use_huge_pages(address: int, size: int) -> None:
    """Ask Linux to back the `size` bytes at `address` with pages of 2 MiB, where nothing was written to them yet.

    Weights that are read once for every token run through more small pages than the processor remembers translations
    of: where large ones are left to programs that ask, the memory gives up to twice as much. Elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    first = address // _HUGE_PAGE * _HUGE_PAGE  # a page that is shared with a neighbour may be large, too
    last = -(-(address + size) // _HUGE_PAGE) * _HUGE_PAGE
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:  # Linux lets a process inherit its parent's ru_maxrss; this is its own
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Let `peak_bytes` count from now, where the system can do that (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def available_on(device: torch.device) -> int | None:
    """Bytes that can still be had of the memory that `device` computes in; None where nobody says."""
    if device.type != "cuda":
        return available_bytes()
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


_givers: list[Callable[[], object]] = []


def gives_back(giver: Callable[[], object]) -> None:
    """Have `giver` called before anybody looks what memory is left: it gives back what this process does not use."""
    _givers.append(giver)


def available_bytes() -> int | None:
    """Memory that this process can still have without swapping, in bytes; None where the system does not say.

    On Linux: what the kernel estimates, and no more than any control group around the process leaves; 0 where one is
    fuller than its limit, as when that was lowered.
    """
    for giver in _givers:
        giver()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        whole = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, StopIteration):
        return None
    return max(0, min([whole, *_left_in_groups(groups)]))


def limit_bytes() -> int | None:
    """The least that a control group around this process allows it; None where there is no limit."""
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = []
    for group, limit, _, _ in _groups_around(groups):
        with contextlib.suppress(OSError, ValueError):  # "max"
            found.append(int((group / limit).read_text()))
    return min((value for value in found if value < _UNLIMITED), default=None)


# By version of the kernel's interface: root, file of the limit, file of what is used, and what of it can be dropped.
_GROUPS = {
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
}


def _left_in_groups(memberships: list[str]) -> Iterator[int]:
    """What each control group, from the process's own up to the root, leaves; a group without a limit says nothing."""
    for group, limit, used, droppable in _groups_around(memberships):
        try:
            stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
            yield int((group / limit).read_text()) - int((group / used).read_text()) + int(stat[droppable])
        except (OSError, ValueError, KeyError):  # "max", or a folder of the host that is not here
            continue


def _groups_around(memberships: list[str]) -> Iterator[tuple[Path, str, str, str]]:
    """Each group's folder, with the names of what is asked there."""
    for line in memberships:  # "4:memory:/path", or "0::/path"
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        root, limit, used, droppable = _GROUPS[controllers]
        own = Path(root) / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(root):
                break
            yield group, limit, used, droppable
