"""The supervisor of one program: `python -sSP child.py FOLDER`, a request on stdin, the result on stdout.

supervisor -> first process of the program's own namespace -> the program. The supervisor stays outside, keeps the
time, counts output and threads, and does not answer before everything that was started is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
if TYPE_CHECKING:
    from finemoe.sandbox import harness as harness
    from finemoe.sandbox import kernel as kernel
else:
    import harness as harness

    if sys.platform == "linux":
        import kernel as kernel
del sys.path[0]
for _ours in ("harness", "kernel"):  # ours by reference alone: to the program these names are free, as any others are
    sys.modules.pop(_ours, None)

_THREADS = 64  # more in one process is a bomb
_POLL = 0.02
_REPORT_BYTES = 1 << 16
_SECONDS_TO_DIE = 5.0
_SECONDS_TO_START = 15.0  # on a crowded machine; the program's own time begins after that


def enclose(request: dict[str, Any]) -> dict[str, str]:
    """Leave for namespaces of our own, as far as this machine lets us. Returns layer -> active, or why not."""
    if sys.platform != "linux":
        return dict.fromkeys(("processes", "network", "mounts"), "missing: only Linux has it")
    kernel.die_with_parent()
    kernel.adopt_orphans()
    if os.getppid() != request["parent"]:
        os._exit(1)
    shared = kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
    layers = {}
    if "namespaces" in request["without"]:
        return dict.fromkeys(("processes", "network", "mounts"), "missing: left out")
    try:
        try:
            kernel.unshare(shared | kernel.NEWUSER)
        except OSError:
            kernel.unshare(shared)  # root, where user namespaces are switched off
    except OSError as error:
        return dict.fromkeys(("processes", "network", "mounts"), f"missing: no namespaces ({error.strerror})")
    kernel.die_with_parent()  # the new rights have cleared it
    layers["processes"] = "active: a namespace of its own, which ends as a whole"
    layers["network"] = "active: a namespace without any"
    try:
        kernel.seal_mounts(request["folder"], request["limits"]["file_bytes"])
        layers["mounts"] = "active: all read-only but its folder, which is in memory"
    except OSError as error:
        layers["mounts"] = f"missing: {error}"
    return layers


def first_process(request: dict[str, Any], layers: dict[str, str], pipes: dict[str, int], status: int) -> NoReturn:
    """Start the program, bury the dead, and tell `status` how the program ended."""
    if sys.platform == "linux":
        kernel.die_with_parent()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if the machine runs out of memory, this is the process to end
    else:
        os.setsid()  # one group with the program: the kill of the group is all there is
    worker = os.fork()
    if worker == 0:
        if sys.platform == "linux":
            kernel.die_with_parent()
        os.close(status)
        harness.work(request, layers, pipes)
    for pipe in pipes.values():
        os.close(pipe)
    while True:
        pid, code, usage = os.wait4(-1, 0)
        if pid == worker:
            text = json.dumps({"code": code, "cpu": usage.ru_utime + usage.ru_stime})
            os.write(status, text.encode())
            os._exit(0)


def children(pid: int) -> list[int]:
    """The living children of a process, from /proc."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                found += [int(child) for child in file.read().split()]
    return found


def descendants(pid: int) -> list[int]:
    """All below a process, itself left out."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def crowd(first: int, processes: int) -> str | None:
    """Why there are too many threads or processes, in words."""
    below = descendants(first)
    if len(below) > processes + 1:
        return f"more than {processes} processes started"
    for pid in below:
        with contextlib.suppress(OSError):
            if len(os.listdir(f"/proc/{pid}/task")) > _THREADS:
                return f"more than {_THREADS} threads"
    return None


def sweep(first: int) -> bool:
    """Kill and bury everything below this process; whether nothing is left."""
    until = time.monotonic() + _SECONDS_TO_DIE
    with contextlib.suppress(OSError):
        os.kill(first, signal.SIGKILL)
    while time.monotonic() < until:
        if sys.platform != "linux":
            with contextlib.suppress(OSError):
                os.killpg(first, signal.SIGKILL)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.002)
    return False


def supervise(first: int, ends: dict[str, int], limits: dict[str, Any]) -> dict[str, Any]:
    """Read all that comes until the program ends or must be ended; then end everything."""
    looked = started = time.monotonic()
    stopped, running = "", False
    kept: dict[str, bytearray] = {name: bytearray() for name in ends}
    most = {"output": limits["output_bytes"], "report": _REPORT_BYTES, "status": _REPORT_BYTES}
    selector = selectors.DefaultSelector()
    for name, end in ends.items():
        os.set_blocking(end, False)
        selector.register(end, selectors.EVENT_READ, name)

    def collect(wait: float) -> str:
        for key, _ in selector.select(wait):
            with contextlib.suppress(BlockingIOError):
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fd)
                room = most[key.data] - len(kept[key.data])
                kept[key.data] += data[:room]
                if len(data) > room:
                    return f"{key.data}"
        return ""

    while not stopped and not kept["status"] and selector.get_map():
        left = started + (limits["wall_seconds"] if running else _SECONDS_TO_START) - time.monotonic()
        if left <= 0:
            stopped = "time"
            break
        stopped = collect(min(left, _POLL))
        if not running and b'{"started"' in kept["report"]:
            running, started = True, time.monotonic()
        if b'{"violation"' in kept["report"]:
            stopped = stopped or "violation"
        if sys.platform == "linux" and time.monotonic() - looked > _POLL:
            looked = time.monotonic()
            stopped = stopped or crowd(first, limits["processes"]) or ""
    seconds = time.monotonic() - started
    clean = sweep(first)
    for _ in range(64):  # what is still in the pipes: at most 64 KiB each
        if not selector.get_map() or collect(0.0):
            break
    with contextlib.suppress(ValueError):
        return {"stopped": stopped, "seconds": seconds, "clean": clean, "kept": kept, **json.loads(kept["status"])}
    return {"stopped": stopped, "seconds": seconds, "clean": clean, "kept": kept, "code": None, "cpu": 0.0}


def messages(raw: bytes) -> dict[str, Any]:
    """What the harness reported: the first message of each kind; noise that the program wrote there is left out.

    Before `started` the program had not begun, so an `error` counts only there; after the verdict nothing counts.
    """
    found: dict[str, Any] = {}
    for line in raw.split(b"\n"):
        try:
            ((kind, value),) = json.loads(line).items()
        except (ValueError, AttributeError):
            continue
        if kind == "error" and "started" in found:
            continue
        found.setdefault(kind, value)
    return found


def verdict(facts: dict[str, Any], told: dict[str, Any], secret: str, limits: dict[str, Any]) -> tuple[str, str]:
    """The verdict and its reason."""
    stopped, code, cpu = facts["stopped"], facts["code"], facts["cpu"]
    ended = signal.Signals(-code).name if code is not None and code < 0 else ""
    if "refused" in told and "started" not in told:
        return "refused", str(told["refused"])
    if "started" not in told:
        return "error", str(told.get("error", "the sandbox could not start the program"))
    if not facts["clean"]:
        return "error", "a process of the program could not be ended"
    if "violation" in told:
        return "violation", str(told["violation"])
    if stopped == "time":
        return "timeout", f"still running after {limits['wall_seconds']:g} seconds"
    if stopped == "output":
        return "crash", f"more than {limits['output_bytes']} bytes of output"
    if stopped:
        return ("violation" if "processes" in stopped else "crash"), stopped
    if ended == "SIGSYS":
        return "violation", "made a system call that is forbidden (network, processes, rights)"
    if ended == "SIGXCPU" or (ended == "SIGKILL" and cpu >= limits["cpu_seconds"]):
        return "timeout", f"more than {limits['cpu_seconds']:g} seconds of processor time"
    if ended:
        return "crash", f"ended by {ended}"
    for kind in ("memory", "files"):
        if kind in told:
            return "crash", f"over its limit of {kind}: {told[kind]}"
    if "failed" in told:
        return "failed", str(told["failed"])
    if code == 0 and told.get("passed") == secret:
        return "passed", ""
    return "failed", f"it ended with status {code} before its last line was reached"


def main() -> None:
    """Answer one request: {"program", "stdin", "folder", "parent", "limits", "without", "weak"}."""
    request = json.load(sys.stdin)
    limits = request["limits"]
    given = os.open(os.path.join(request["folder"], "stdin"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(os.path.join(request["folder"], "stdin"))
    with os.fdopen(os.dup(given), "wb") as file:
        file.write(request["stdin"].encode(errors="surrogatepass"))
    os.lseek(given, 0, os.SEEK_SET)
    layers = enclose(request)
    (output, to_output), (report, to_report), (status, to_status) = os.pipe(), os.pipe(), os.pipe()
    fetch, to_fetch = os.pipe()
    first = os.fork()
    if first == 0:
        for end in (output, report, status, to_fetch):
            os.close(end)
        pipes = {"stdin": given, "output": to_output, "report": to_report, "secret": fetch}
        first_process(request, layers, pipes, to_status)
    secret = os.urandom(24).hex()  # made after the fork: the program's process has never held it
    os.write(to_fetch, secret.encode())
    for end in (to_output, to_report, to_status, fetch, to_fetch):
        os.close(end)
    facts = supervise(first, {"output": output, "report": report, "status": status}, limits)
    if facts["code"] is not None:
        facts["code"] = os.waitstatus_to_exitcode(facts["code"])
    told = messages(bytes(facts["kept"]["report"]))
    judged, note = verdict(facts, told, secret, limits)
    answer = {
        "verdict": judged,
        "note": note,
        "exit_code": facts["code"],
        "seconds": facts["seconds"],
        "output": facts["kept"]["output"].decode("utf-8", "replace"),
        "layers": told.get("started", layers),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
