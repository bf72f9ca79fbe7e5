"""A live server on the loopback address."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finemoe.server.models import Limits, Options
from finemoe.server.run import serve
from server.talkers import write_run


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("served") / "talker", chat=True)


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("served") / "writer", chat=False, seed=2, mtp_depth=0)


class Live:
    """A server in a thread."""

    def __init__(self, sources: dict[str, Path], options: Options, **more: Any) -> None:
        self._started, self.servers = threading.Event(), []
        self.address = ""

        def ready(address: str) -> None:
            self.address = address
            self._started.set()

        models = [f"{name}={path}" for name, path in sources.items()]
        keep: Callable[[Any], None] = self.servers.append
        work = lambda: serve(*models, options=options, port=0, ready=ready, started=keep, **more)  # noqa: E731
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        assert self._started.wait(60)
        self.client = httpx.Client(base_url=self.address, timeout=60)

    @property
    def app(self) -> Any:
        return self.servers[0].config.app

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def engine(self, name: str) -> Any:
        """Its engine; looked at between passes, when nothing runs."""
        return self.app.state.server.models.opened(name).worker.engine

    def wait_until_idle(self, name: str, seconds: float = 10.0) -> None:
        worker, end = self.app.state.server.models.opened(name).worker, time.monotonic() + seconds
        while worker.open or worker.engine.busy:
            assert time.monotonic() < end
            time.sleep(0.01)

    def stop(self) -> None:
        self.client.close()
        self.servers[0].should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def live(talker: Path, writer: Path) -> Iterator[Live]:
    server = Live({"talker": talker, "writer": writer}, Options(limits=Limits(max_new_tokens=128), cache_bytes=4 << 20))
    yield server
    server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Live]]:
    """Servers of a test's own, stopped behind it."""
    servers: list[Live] = []

    def begin(sources: dict[str, Path], options: Options, **more: Any) -> Live:
        servers.append(Live(sources, options, **more))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()
