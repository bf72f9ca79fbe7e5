"""The clients of the load tests and of `make bench`, against a server that writes what it is told."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.load.clients import streams
from benchmarks.speed import server
from benchmarks.speed.context import Context


def test_clients_count_what_a_server_writes() -> None:
    asked: list[dict[str, Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(next(line for line in head.splitlines() if line.startswith("Content-Length")).split()[1])
        asked.append(json.loads(await reader.readexactly(length)))
        reason = "stop" if asked[-1]["prompt"] == "short" else "length"
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(3):
            writer.write(b'data: {"choices":[{"text":"x","finish_reason":null}]}\n\n')
        writer.write(f'data: {{"choices":[{{"text":"","finish_reason":"{reason}"}}]}}\n\n'.encode())
        writer.close()

    def ask(*prompts: str) -> tuple[float, float]:
        bodies = [{"prompt": prompt, "max_tokens": 3} for prompt in prompts]
        ready = threading.Event()
        address: list[str] = []

        def serve() -> None:
            async def life() -> None:
                server = await asyncio.start_server(answer, "127.0.0.1", 0)
                address.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
                ready.set()
                async with server:
                    while not done.is_set():
                        await asyncio.sleep(0.01)

            asyncio.run(life())

        done = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        assert ready.wait(10)
        try:
            return streams(address[0], bodies)
        finally:
            done.set()
            thread.join()

    rate, first = ask("a", "b")
    assert rate > 0
    assert 0 < first < 10
    assert all(body["stream"] for body in asked)
    with pytest.raises(RuntimeError, match="ended before its last token"):
        ask("a", "short")


def test_servers_are_compared_where_both_are_there(tmp_path: Path) -> None:
    told = Context(1, quick=True, threads=1, python=sys.executable)
    assert server.served(told) == []
    assert "--gguf names a file" in told.notes[0]
    told = replace(told, notes=[], gguf=tmp_path / "model.gguf")
    assert server.served(told) == []
    assert "has no llama-cpp-python[server]" in told.notes[0]
