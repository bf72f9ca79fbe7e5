"""Servers that stand between a trainer and ours: they change answers, refuse, or are gone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from finemoe.server.models import Limits, Options
from server.conftest import Live

Change = Callable[[str, dict[str, Any]], Any]


@contextmanager
def serving(model: Path, below: Path | None = None, **limits: Any) -> Iterator[Live]:
    """`model`, as `m`."""
    live = Live({"m": model}, Options(limits=Limits(**limits), cache_bytes=4 << 20, weights_below=below))
    try:
        yield live
    finally:
        live.stop()


@dataclass
class Between:
    """What lies before a server."""

    behind: str
    change: Change = lambda path, answer: answer
    """From a path and what is answered there: what is answered instead; a status alone, or None: the line is cut."""
    alter: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: body
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    address: str = ""


@contextmanager
def between(behind: str, change: Change = lambda path, answer: answer) -> Iterator[Between]:
    """Every request goes to `behind`, and its answer through `change`."""
    own, client = Between(behind, change), httpx.Client(timeout=60)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given: Any) -> None:
            """In silence."""

        def do_GET(self) -> None:
            self.answer(client.get(own.behind + self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            own.asked.append((self.path, body))
            self.answer(client.post(own.behind + self.path, json=own.alter(body)))

        def answer(self, found: httpx.Response) -> None:
            changed = own.change(self.path, found.json())
            if changed is None:
                self.close_connection = True
                return
            status = changed if isinstance(changed, int) else found.status_code
            text = json.dumps({"detail": "so it is"} if isinstance(changed, int) else changed).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    own.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield own
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
        client.close()
