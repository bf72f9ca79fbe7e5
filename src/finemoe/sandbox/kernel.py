"""What the Linux kernel offers against a program that misbehaves, by ctypes: no compiler and no privilege is needed.

Each function raises OSError where the kernel, or a container around us, refuses. Nothing of finemoe is imported: the
sandbox loads this file into an interpreter that sees the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_LIBC: Any = ctypes.CDLL(None, use_errno=True)
_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _SECUREBITS, _SUBREAPER, _NO_NEW_PRIVS = 1, 22, 24, 28, 36, 38

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_NOBODY = 65534
_SIGKILL = 9

_SAME = {  # system calls that have one number on every machine
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447, "fchmodat2": 452,
}  # fmt: skip
_X86_64 = {
    "shmget": 29, "shmat": 30, "shmctl": 31, "socket": 41, "connect": 42, "accept": 43, "sendto": 44, "bind": 49,
    "listen": 50, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "semget": 64, "msgget": 68,
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "ptrace": 101, "syslog": 103,
    "rt_sigqueueinfo": 129, "utime": 132, "mknod": 133, "personality": 135, "setpriority": 141, "sched_setparam": 142,
    "sched_setscheduler": 144, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164,
    "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
    "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199,
    "tkill": 200, "sched_setaffinity": 203, "clock_settime": 227, "tgkill": 234, "utimes": 235, "mq_open": 240,
    "mq_unlink": 241, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251,
    "mknodat": 259, "fchownat": 260, "futimesat": 261, "fchmodat": 268, "unshare": 272, "utimensat": 280,
    "accept4": 288, "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314, "memfd_create": 319,
    "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
    "ioprio_set": 30, "mknodat": 33, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "fchmod": 52,
    "fchmodat": 53, "fchownat": 54, "fchown": 55, "quotactl": 60, "utimensat": 88, "acct": 89, "personality": 92,
    "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116,
    "ptrace": 117, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122, "kill": 129,
    "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "setpriority": 140, "reboot": 142, "sethostname": 161,
    "setdomainname": 162, "settimeofday": 170, "adjtimex": 171, "mq_open": 180, "mq_unlink": 181, "msgget": 186,
    "semget": 190, "shmget": 194, "shmctl": 195, "shmat": 196, "socket": 198, "bind": 200, "listen": 201,
    "accept": 202, "connect": 203, "sendto": 206, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220,
    "execve": 221, "swapon": 224, "swapoff": 225, "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "accept4": 242,
    "prlimit64": 261, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266,
    "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273,
    "sched_setattr": 274, "memfd_create": 279, "bpf": 280, "execveat": 281, "userfaultfd": 282,
    "kexec_file_load": 294,
}  # fmt: skip
CALLS = {"x86_64": (0xC000003E, _X86_64 | _SAME), "aarch64": (0xC00000B7, _AARCH64 | _SAME)}
"""Machine -> its AUDIT_ARCH, and its system calls by name."""

_PROCESSES = {"fork", "vfork", "execve", "execveat"}
_METADATA = {
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime", "utimes",
    "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
}  # fmt: skip
_OWN_PID = {"kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"}
_OWN_OR_ZERO = {
    "prlimit64": 0, "sched_setaffinity": 0, "sched_setscheduler": 0, "sched_setparam": 0, "sched_setattr": 0,
    "setpriority": 1, "ioprio_set": 1,
}  # fmt: skip
_REFUSED = {"memfd_create", "memfd_secret", "pidfd_open", "name_to_handle_at"}  # an error, not the end
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _checked(_LIBC.prctl(option, *padded), f"prctl {option}")


def _syscall(number: int, what: str, *values: Any) -> int:
    return _checked(_LIBC.syscall(ctypes.c_long(number), *values), what)


def die_with_parent() -> None:
    """From here on the kernel kills this process when its parent ends."""
    _prctl(_PDEATHSIG, _SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends."""
    _prctl(_SUBREAPER, 1)


def no_new_privileges() -> None:
    """No program started from here gains rights by its file."""
    _prctl(_NO_NEW_PRIVS, 1)


def unshare(flags: int) -> None:
    """Leave the given namespaces for new ones; a new user namespace knows this user alone, as nobody."""
    user, group = os.getuid(), os.getgid()
    _checked(_LIBC.unshare(ctypes.c_int(flags)), "unshare")
    if flags & NEWUSER:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_NOBODY} {user} 1"),
            ("gid_map", f"{_NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def seal_mounts(folder: str, size: int) -> None:
    """Make every file system read-only in this mount namespace, and `folder` a new one of `size` bytes in memory."""
    private, setting = 0x4000 | 1 << 18, struct.Struct("QQQQ")

    def mount(kind: bytes, target: bytes, flags: int, options: bytes | None) -> None:
        result = _LIBC.mount(kind, target, kind, ctypes.c_ulong(flags), options)
        _checked(result, f"mount {target!r}")

    def change(path: bytes, flags: int, set_: int, clear: int) -> None:
        wanted = setting.pack(set_, clear, 0, 0)
        here = ctypes.c_int(-100)
        _syscall(_SAME["mount_setattr"], "mount_setattr", here, path, ctypes.c_uint(flags), wanted, setting.size)

    mount(b"none", b"/", private, None)
    mount(b"tmpfs", os.fsencode(folder), 2 | 4, f"size={size},mode=700,nr_inodes=4096".encode())  # nosuid, nodev
    change(b"/", 0x8000, 1, 0)
    change(os.fsencode(folder), 0, 0, 1)


def own_root(folder: str, readable: Iterable[str], devices: Iterable[str]) -> None:
    """Leave the host's files: a root in memory that holds `readable`, `devices` and `folder`, each at its own place.

    Needs the right to mount, and `folder` mounted; what is bound stays read-only or not. This process alone leaves:
    its supervisor goes on seeing processes in the old root.
    """
    unshare(NEWNS)
    bind, below, detach = 0x1000, 0x4000, 2
    root = folder + "/.root"
    os.mkdir(root)

    def mount(source: str, target: str, flags: int, kind: bytes | None = None, options: bytes | None = None) -> None:
        name, place = os.fsencode(source), os.fsencode(target)
        _checked(_LIBC.mount(name, place, kind, ctypes.c_ulong(flags), options), f"mount {target!r}")

    mount("none", root, 2 | 4, b"tmpfs", b"size=1m,mode=755,nr_inodes=1024")
    top = sorted({*readable, *devices, folder}, key=len)
    for number, path in enumerate(top):
        if any(path == above or path.startswith(above + "/") for above in top[:number]) or not os.path.exists(path):
            continue  # it is there with what holds it
        target = root + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(path, target, bind if path == folder else bind | below)  # below the folder is the root itself
    for name in os.listdir("/"):  # /lib -> usr/lib, by which the loader is found
        if os.path.islink("/" + name) and not os.path.lexists(f"{root}/{name}"):
            os.symlink(os.readlink("/" + name), f"{root}/{name}")
    os.chdir(root)
    machine = CALLS.get(platform.machine())
    if machine is None:
        raise OSError(_ENOSYS, f"the system calls of {platform.machine()} are not known")
    _syscall(machine[1]["pivot_root"], "pivot_root", b".", b".")
    _checked(_LIBC.umount2(b".", ctypes.c_int(detach)), "umount2")
    os.chdir("/")
    os.rmdir(root)
    wanted = struct.pack("QQQQ", 1, 0, 0, 0)
    here = ctypes.c_int(-100)
    _syscall(_SAME["mount_setattr"], "mount_setattr", here, b"/", ctypes.c_uint(0), wanted, 32)


def drop_capabilities() -> None:
    """Give up every capability, for good."""
    with suppress(OSError):  # not for those who have none; and past the last one
        _prctl(_SECUREBITS, 0x2F)
        for capability in range(64):
            _prctl(_CAPBSET_DROP, capability)
    header = struct.pack("Ii", 0x20080522, 0)
    _checked(_LIBC.capset(header, bytes(24)), "capset")


def landlock_version() -> int:
    """The version of Landlock's interface here; 0: none."""
    return max(0, _LIBC.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def landlock(readable: Iterable[str], devices: Iterable[str], folder: str) -> None:
    """Files: read what lies in `readable`, read and write `devices` and all in `folder`; TCP: none.

    Later versions also keep signals and abstract sockets within the domain.
    """
    version = landlock_version()
    if sys.platform != "linux" or version < 1:
        raise OSError(_ENOSYS, "the kernel has no Landlock")
    bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    every = (1 << bits) - 1
    read_file, read_dir, execute, write_file, truncate = 4, 8, 1, 2, 1 << 14
    rules = struct.pack("QQQ", every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = rules[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall(444, "landlock_create_ruleset", rules, ctypes.c_size_t(len(rules)), ctypes.c_uint(0))
    granted = [(path, read_file | read_dir | execute) for path in readable]
    granted += [(path, (read_file | write_file | truncate) & every) for path in devices]
    granted += [(folder, every & ~execute)]
    for path, access in granted:
        if not os.path.exists(path):
            continue
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= execute | write_file | read_file | truncate
        rule = struct.pack("=Qi", access, opened)
        _syscall(445, "landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(opened)
    _syscall(446, "landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


def seccomp(processes: bool, metadata: bool) -> None:
    """Forbid system calls: the network, other processes, and what ordinary programs have no use for.

    A forbidden call ends the process with SIGSYS. Needs `no_new_privileges` first.

    Args:
        processes: whether it may start others.
        metadata: whether it may change modes, owners and times of files (which Landlock does not govern).
    """
    machine = platform.machine()
    if machine not in CALLS:
        raise OSError(_ENOSYS, f"the system calls of {machine} are not known")
    arch, numbers = CALLS[machine]
    program = _filter(arch, numbers, os.getpid(), processes, metadata)
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.create_string_buffer(head, len(head))
    _prctl(_SECCOMP, 2, ctypes.addressof(pointer))


def _filter(arch: int, numbers: dict[str, int], pid: int, processes: bool, metadata: bool) -> bytes:
    """The filter as BPF. `load` fetches a word of the call; `equal` skips `then` or `other` instructions."""
    lines: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        lines.append((0x20, 0, 0, offset))

    def equal(value: int, then: int, other: int) -> None:
        lines.append((0x15, then, other, value))

    def end(verdict: int) -> None:
        lines.append((0x06, 0, 0, verdict))

    load(4)
    equal(arch, 1, 0)
    end(_KILL)
    load(0)
    if "fork" in numbers:  # x86-64: numbers from 2^30 on are the x32 interface to the same calls
        lines.append((0x35, 0, 1, 0x40000000))
        end(_KILL)
    excused = (_PROCESSES if processes else set()) | (_METADATA if metadata else set())
    for name, number in numbers.items():
        if name in excused or (name == "clone" and processes):
            continue
        argument = 0 if name in _OWN_PID else _OWN_OR_ZERO.get(name)
        if name == "clone":
            equal(number, 0, 4)
            load(16)
            lines.append((0x45, 0, 1, 0x00010000))  # a thread
            end(_ALLOW)
            end(_KILL)
        elif argument is not None:
            own = name in _OWN_PID
            equal(number, 0, 5)
            load(16 + 8 * argument)
            equal(pid, 1, 0)
            equal(pid if own or processes else 0, 0, 1)
            end(_ALLOW)
            end((_ERRNO | _EPERM) if processes or not own else _KILL)
        else:
            equal(number, 0, 1)
            end(_ERRNO | _ENOSYS if name == "clone3" else _ERRNO | _EPERM if name in _REFUSED else _KILL)
    end(_ALLOW)
    return b"".join(struct.pack("HBBI", *line) for line in lines)
