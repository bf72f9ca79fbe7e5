"""finemoe serve in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import httpx


class Server:
    """Started with the block, stopped behind it."""

    def __init__(self, model: Path, clients: int, *options: str) -> None:
        self.name = "model"
        self._command = [sys.executable, "-m", "finemoe", "serve", f"{self.name}={model}", "--port", "0"]
        self._command += ["--limit", f"max_waiting={2 * clients}", *options]
        self.address = ""
        self.said: list[str] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line)
            if line.startswith("page"):
                self.address = line.split()[1].rstrip("/")
            if line.startswith("stop"):
                break
        else:
            raise RuntimeError("".join(self.said))
        self._reader = threading.Thread(target=self.said.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def resident(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmRSS:\s+(\d+)", status)
        return 1024 * int(found[1]) if found else 0

    def blocks(self) -> int:
        """Blocks of the cache that somebody holds, after the last pass."""
        text = httpx.get(f"{self.address}/metrics", timeout=10).text
        found = re.search(r"^finemoe_cache_blocks_used\{.*\} (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else -1
