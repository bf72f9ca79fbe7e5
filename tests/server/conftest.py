"""A live server on the loopback address, and a small mixture that says, thinks and calls what its text is forced to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finemoe.checkpoint.run_state.state import RunState, save
from finemoe.model.config import expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.server.config import Limits
from finemoe.server.models import Options
from finemoe.server.run import serve
from finemoe.text import Tokenizer

CHAT = (
    "{% if tools %}[tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>]\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% if enable_thinking %}<think>{% endif %}{% endif %}{# </think> #}"
)
TEXTS = ["def main():\n    return 1\n", '{"name": "weather", "arguments": {"city": "Ulm"}}', "<think> </tool_call>"] * 5
MODEL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_layers": 3,
    "attention": {"kind": "grouped_query", "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "leading": {"count": 1, "feed_forward": {"kind": "dense", "ffn_hidden_size": 48}},
    "feed_forward": {
        "kind": "moe",
        "num_shared_experts": 1,
        "num_routed_experts": 8,
        "experts_per_token": 2,
        "expert_hidden_size": 16,
        "router": {"kind": "sigmoid_biased", "num_groups": 4, "groups_per_token": 2},
    },
    "mtp_depth": 1,
    "init_std": 0.12,
}
LENGTH = 256


def write_run(folder: Path, *, chat: bool, seed: int = 1, **changes: Any) -> Path:
    """A run with drawn weights."""
    folder.mkdir(parents=True)
    config = expand(resolve({**MODEL, **changes}, "test"))
    model = Transformer(config)
    initialize(model, seed=seed)
    text = json.dumps({"model": config.model_dump(mode="json"), "data": {"sequence_length": LENGTH}})
    (folder / "config.json").write_text(text)
    save(folder / "checkpoints", 1, RunState(model.state_dict(), {}, {"step": 1}, text), keep=1)
    Tokenizer.train(TEXTS, vocab_size=300).save(folder / "tokenizer.json")
    if chat:
        table = {"eos_token": "<|end_of_text|>", "chat_template": CHAT}
        (folder / "tokenizer_config.json").write_text(json.dumps(table))
    return folder


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

        arguments = (sources, options)
        keep: Callable[[Any], None] = self.servers.append
        work = lambda: serve(*arguments, port=0, ready=ready, started=keep, **more)  # noqa: E731
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        assert self._started.wait(60)
        self.client = httpx.Client(base_url=self.address, timeout=60)

    @property
    def app(self) -> Any:
        return self.servers[0].app

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
