"""Inside the sandbox: confine this process, name what is forbidden, run the program, say how it ended.

The audit hook is the layer that gives violations a name, and it ends the program at once; it holds whoever plays by
Python's rules. The kernel's layers hold the others. Nothing of finemoe is imported here.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import linecache
import os
import resource
import signal
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from finemoe.sandbox import kernel as kernel
elif sys.platform == "linux":
    import kernel as kernel

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NAME = "program.py"
_REFUSAL = (
    "generated code cannot be kept from the network here: the system gives neither namespaces nor seccomp to this "
    "process. Run it in a virtual machine or a container that allows one of them"
)
_STOPPED = 77  # exit status after a violation
_STARTS = {"os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen", "pty.spawn"}
_NETWORK = {
    "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.gethostbyaddr", "socket.getnameinfo", "socket.getservbyname", "socket.getservbyport", "syslog.openlog",
    "syslog.syslog",
}  # fmt: skip
_NATIVE = {"ctypes.dlsym", "ctypes.call_function", "ctypes.string_at", "ctypes.wstring_at", "ctypes.addressof"}
_CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.truncate": 1, "os.chmod": 1,
    "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "os.chflags": 1,
}  # fmt: skip
_READS = {"os.listdir", "os.scandir", "os.getxattr", "os.listxattr"}


def readable() -> list[str]:
    """What a program may read: Python's own library, shared libraries, time zones."""
    paths = sysconfig.get_paths()
    own = [os.path.join(sys.base_prefix, "lib")] if sys.base_prefix != "/usr" else []
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/System/Library"]
    files = ["/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"]
    wanted = [paths["stdlib"], paths["platstdlib"], *own, *system, *files]
    return sorted({os.path.realpath(path) for path in wanted if os.path.exists(path)})


def confine(limits: dict[str, Any], folder: str, layers: dict[str, str], without: list[str]) -> None:
    """Bind this process for good. `layers` knows what the supervisor did, and learns what was done here.

    Raises:
        OSError: a limit cannot be set.
    """
    memory, cpu = limits["memory_bytes"], max(1, int(limits["cpu_seconds"] + 0.999))
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "darwin":
        del wanted[resource.RLIMIT_AS]  # macOS does not keep it
    linux = sys.platform == "linux"
    if not linux and not limits["processes"]:
        wanted[resource.RLIMIT_NPROC] = 0
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value + (limit == resource.RLIMIT_CPU and value != hard)))
    layers["limits"] = "active: memory, processor time, file size, open files" if linux else "active, memory excepted"
    if not linux:
        return
    sealed = layers.get("mounts", "").startswith("active")

    def attempt(name: str, layer: Callable[[], None]) -> None:
        if name in without:
            layers[name] = "missing: left out"
            return
        try:
            layer()
            layers[name] = "active"
        except OSError as error:
            layers[name] = f"missing: {error.strerror}"

    if not sealed:
        layers["root"] = "missing: no mount namespace of its own"
    else:
        attempt("root", lambda: kernel.own_root(folder, readable(), DEVICES))
        os.chdir(folder)
    kernel.no_new_privileges()
    attempt("landlock", lambda: kernel.landlock(readable(), DEVICES, folder))
    attempt("capabilities", kernel.drop_capabilities)
    attempt("seccomp", lambda: kernel.seccomp(limits["processes"] > 0, sealed))


def _within(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def watch(report: Callable[[dict[str, Any]], None], folder: str, processes: int) -> Callable[[str, tuple], None]:
    """The audit hook: it reports what is forbidden, and ends the process."""
    folder = os.path.realpath(folder)
    free, writable = (*readable(), *DEVICES, folder), (*DEVICES, folder)
    real, leave, text, own = os.path.realpath, os._exit, os.fsdecode, os.getpid
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def stop(why: str) -> NoReturn:
        report({"violation": why})
        leave(_STOPPED)

    def touch(path: Any, change: bool) -> None:
        if isinstance(path, str | bytes | os.PathLike) and not _within(real(text(path)), writable if change else free):
            stop(f"{'changes' if change else 'reads'} {text(path)[:200]!r}, outside its folder")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            touch(path, bool((flags or 0) & writing))
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                touch(path, True)
        elif event == "os.symlink":
            touch(arguments[1], True)
        elif event in _READS:
            touch(arguments[0] if arguments[0] is not None else ".", False)
        elif event == "sqlite3.connect":
            if arguments[0] not in (":memory:", "", b":memory:"):
                touch(arguments[0], True)
        elif event in _STARTS:
            if processes == 0 or event == "os.exec":
                stop(f"starts a process ({event})")
        elif event in _NETWORK or (event == "socket.__new__" and arguments[1] not in (-1, 1)):
            stop(f"uses the network ({event})")
        elif event in _NATIVE or (event == "ctypes.dlopen" and arguments[0] is not None):
            stop(f"calls native code ({event})")
        elif event in ("os.kill", "os.killpg") and arguments[0] != own():
            stop(f"sends a signal to process {arguments[0]}")

    return hook


def _describe(error: BaseException) -> str:
    try:
        return traceback.format_exception_only(type(error), error)[-1].strip().splitlines()[0][:300]
    except Exception:  # the program's own __str__ failed
        return type(error).__name__


def _wait_for_threads() -> None:
    """As Python does at its end: threads, then what was registered with atexit, then what was printed."""
    threading = sys.modules.get("threading")
    if threading is not None:
        threading._shutdown()  # type: ignore[attr-defined]
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def run(program: str, report: Callable[[dict[str, Any]], None], secret: Callable[[], str]) -> NoReturn:
    """Run the program as a script and leave. The end counts only with the secret, fetched after the last line."""
    leave, describe, finish, run_it, dump = os._exit, _describe, _wait_for_threads, builtins.exec, traceback.print_exc
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __file__=_NAME)
    sys.modules["__main__"] = module
    sys.argv = [_NAME]
    linecache.cache[_NAME] = (len(program), None, program.splitlines(keepends=True), _NAME)
    for ours in (__file__, os.path.join(os.path.dirname(__file__), "child.py")):
        linecache.cache[ours] = (0, None, [], ours)  # a printed stack looks for our lines, which it may not read
    status = 1
    try:
        code = compile(program, _NAME, "exec", dont_inherit=True)
        run_it(code, module.__dict__)
        finish()
        report({"passed": secret()})
        status = 0
    except SystemExit as error:
        report({"failed": f"it left early, by SystemExit({error.code!r})"[:300]})
    except MemoryError:
        report({"memory": "MemoryError"})
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in (27, 28)  # EFBIG, ENOSPC
        report({"files" if full else "failed": describe(error)})
        with contextlib.suppress(BaseException):
            sys.stdout.flush()  # what was printed stands before the traceback
            error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # without our frame
            dump()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    leave(status)


def work(request: dict[str, Any], layers: dict[str, str], pipes: dict[str, int]) -> NoReturn:
    """The life of the process that runs the program. `pipes`: stdin, output, report (to write), secret (to read)."""
    write, channel, read, encode = os.write, pipes["report"], os.read, json.dumps

    def report(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the program closed the pipe: then it has not passed
            write(channel, encode(message).encode() + b"\n")

    folder = request["folder"]
    try:
        if sys.platform == "linux":
            os.setsid()
        os.chdir(folder)
        for number, pipe in enumerate((pipes["stdin"], pipes["output"], pipes["output"])):
            os.dup2(pipe, number)
        for number in range(3, 64):
            if number not in (channel, pipes["secret"]):
                with contextlib.suppress(OSError):
                    os.close(number)
        os.environ.clear()
        os.environ.update(HOME=folder, TMPDIR=folder, PATH="", LANG="C.UTF-8")
        os.umask(0o077)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.dont_write_bytecode = True
        confine(request["limits"], folder, layers, request["without"])
        layers["audit"] = "missing: left out"
        if "audit" not in request["without"]:
            sys.addaudithook(watch(report, folder, request["limits"]["processes"]))
            layers["audit"] = "active"
    except BaseException as error:
        report({"error": _describe(error)})
        os._exit(1)
    held = any(layers.get(name, "").startswith("active") for name in ("network", "seccomp"))
    if sys.platform == "linux" and not held and not request["weak"]:
        report({"refused": _REFUSAL})
        os._exit(1)
    report({"started": layers})
    run(request["program"], report, lambda: read(pipes["secret"], 64).decode())
