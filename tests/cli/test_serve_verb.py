"""`finemoe serve` as a process: it says where it listens, lets answers end, and says nothing of what was asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from runs.forking import finemoe
from server.talkers import write_run


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("serve") / "writer", chat=False)


class Serving:
    """A server in a process of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "finemoe", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(iter(self.process.stderr.readline, ""))

    def address(self) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.said:
                if line.startswith("page"):
                    return line.split()[1].rstrip("/")
            time.sleep(0.02)
        raise AssertionError("".join(self.said))

    def end(self, how: signal.Signals = signal.SIGTERM) -> str:
        self.process.send_signal(how)
        self.process.wait(60)
        self.reader.join(10)
        return "".join(self.said)


@contextmanager
def serving(*arguments: str | Path, **environment: str) -> Iterator[Serving]:
    server = Serving([str(argument) for argument in arguments], environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(10)
        server.reader.join(10)
        server.process.stderr.close()


def test_it_serves_logs_nothing_and_lets_answers_end(writer: Path) -> None:
    with serving(writer, FINEMOE_API_KEY="very-secret") as server:
        address = server.address()
        head = {"authorization": "Bearer very-secret"}
        body: dict[str, Any] = {"model": "writer", "prompt": "hush", "max_tokens": 240, "temperature": 0}
        body["finemoe"] = {"ignore_end": True}
        whole = httpx.post(f"{address}/v1/completions", json=body, headers=head, timeout=60).json()
        text, told = "", False
        with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}, headers=head) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if not told:
                        server.process.send_signal(signal.SIGTERM)
                        told = True
        assert text == whole["choices"][0]["text"]
        server.process.wait(60)
        assert server.process.returncode in (0, -signal.SIGTERM)
        said = server.end()
        assert "writer is ready" in said
        for word in ("hush", "very-secret", str(writer), "Traceback"):
            assert word not in said


def test_everybody_is_let_in_only_with_a_warning_and_ctrl_c_stops_it(writer: Path) -> None:
    with serving(writer, "--host", "0.0.0.0") as server:
        server.address()
        assert "give it a key" in " ".join("".join(server.said).split())
        said = server.end(signal.SIGINT)
        assert "Traceback" not in said
        assert server.process.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{none}"], "there is nothing here"),
        (["{run}", "{run}"], "two models are called writer"),
        (["{run}", "--limit", "max_runing=3"], "did you mean `max_running`"),
        (["{run}", "--limit", "max_running=0"], "max_running"),
        (["{run}", "--cache-size", "much"], "--cache-size: 'much' is no size"),
        (["{run}", "--cache-size", "10"], "no room"),
        (["{run}", "--api-key-file", "{none}/key"], "cannot be read"),
        (["{run}", "--host", "999.1.1.1"], "cannot be listened at"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_sentence(writer: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    words = [word.format(run=writer, none=tmp_path / "none") for word in arguments]
    done = finemoe("serve", *words, "--port", "0")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2
    assert says in said
    assert "Traceback" not in said


def test_two_at_one_port(writer: Path) -> None:
    with serving(writer) as first:
        port = first.address().rsplit(":", 1)[1]
        second = finemoe("serve", writer, "--port", port)
        assert second.returncode == 2
        assert "choose another --port" in " ".join(second.stderr.split())
