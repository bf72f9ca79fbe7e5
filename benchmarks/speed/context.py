"""What every part of the benchmark is given: how much to measure, where peers are, and whom to tell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed.growth import Growth
from benchmarks.speed.peaks import Peaks
from benchmarks.speed.process import Peer, interpreter_with


@dataclass
class Context:
    """One run of the benchmark."""

    repeats: int
    quick: bool
    """Smaller models and fewer points, to see that everything works."""
    threads: int
    python: str
    """Interpreter that is asked first for peers."""
    before: Path | None = None
    """A checkout from before there was one engine."""
    trained: tuple[Path, ...] = ()
    """A run whose model has a prediction module."""
    gguf: Path | None = None
    """A file that servers can serve."""
    watch: Callable[[str], None] = lambda text: None
    """Told what is being measured."""
    peaks: Peaks = field(default_factory=Peaks)
    notes: list[str] = field(default_factory=list)
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of ours, in the training step."""
    growth: list[Growth] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Of the peers, as their own processes say."""
    checks: dict[str, float] = field(default_factory=dict)
    """How far peers are from us on the same weights and batch."""

    def seconds(self, wanted: float) -> float:
        """A budget of seconds for a comparison."""
        return 0.0 if self.quick else wanted

    def note(self, text: str) -> None:
        """Something the reader must know; said once."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def own(self) -> Iterator[Peer]:
        """finemoe in a process of its own."""
        with self._start("finemoe", sys.executable, "own", {}) as peer:
            yield peer

    @contextmanager
    def peer(self, name: str, module: str, environment: Mapping[str, str] | None = None) -> Iterator[Peer | None]:
        """`transformers` or `llama.cpp` in a process of its own; None, with a note, where no interpreter has it."""
        python = interpreter_with(module, [self.python, sys.executable])
        if python is None:
            self.note(f"{name} was left out: {self.python} has no {module} (--peer names another interpreter)")
            yield None
            return
        with self._start(name, python, f"{module}_peer", environment or {}) as peer:
            self.versions |= peer.ready["versions"]
            yield peer

    def _start(self, name: str, python: str, module: str, environment: Mapping[str, str]) -> Peer:
        self.watch(f"starting {name}")
        command = [python, "-m", f"benchmarks.speed.{module}", str(self.threads)]
        return Peer(name, command, {**os.environ, **environment})
