"""A peer in a process of its own, asked one thing at a time: it never computes while something else is timed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
SETTLE = 0.05
"""Seconds between an answer and the next question: OpenMP's threads wait by spinning for some milliseconds."""


class PeerError(Exception):
    """A peer could not be started, or could not do what it was asked for."""


class Peer:
    """`python -m MODULE ARGUMENTS`, running `serving.serve`. A context manager: it ends with the block."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            self.ready = self._answer()
        except PeerError:
            self.close()
            raise

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Do something and wait for the answer.

        Raises:
            PeerError: it cannot, or the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        answer = self._answer()
        time.sleep(SETTLE)
        return answer

    def timer(self, do: str, **request: Any) -> Callable[[], float]:
        """A repetition: the seconds that the peer itself measured."""
        return lambda: float(self.ask(do, **request)["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def _ended(self) -> PeerError:
        self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return PeerError(f"{self.name}: ended with {self._process.returncode}: {lines[-1] if lines else 'no message'}")

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what an ended process has not read
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def interpreter_with(module: str, candidates: Sequence[str]) -> str | None:
    """The first of these interpreters that has `module`; it is not imported."""
    code = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
    for python in candidates:
        try:
            if not subprocess.run([python, "-c", code], capture_output=True, timeout=60).returncode:
                return python
        except OSError:
            continue
    return None
