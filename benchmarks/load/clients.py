"""Clients that read streams of completions and do nothing else: their work is none of the server's."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any


async def _ask(address: str, body: Mapping[str, Any]) -> float:
    """Seconds to the first token. Bytes go by unread.

    Raises:
        RuntimeError: it did not write all of its tokens.
    """
    content = json.dumps({**body, "stream": True}).encode()
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    began, first, last = time.perf_counter(), 0.0, b""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    while piece := await reader.read(1 << 16):
        if not first and b"data: {" in piece:
            first = time.perf_counter() - began
        last = (last + piece)[-2000:]
    writer.close()
    if b'"length"' not in last:
        raise RuntimeError(f"a stream ended before its last token: {last.decode(errors='replace')}")
    return first


async def _all(address: str, bodies: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    began = time.perf_counter()
    firsts = await asyncio.gather(*(_ask(address, body) for body in bodies))
    seconds = time.perf_counter() - began
    return sum(body["max_tokens"] for body in bodies) / seconds, statistics.median(firsts)


def streams(address: str, bodies: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """All of `bodies` at once: tokens a second, and the median of the seconds to a first token.

    Raises:
        RuntimeError: one did not write as many tokens as it may, so that nothing could be compared.
    """
    return asyncio.run(_all(address, bodies))
