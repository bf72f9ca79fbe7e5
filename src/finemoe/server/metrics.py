"""What GET /metrics shows, for Prometheus. Counts and times only: nothing that was asked or answered."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from finemoe.server.worker import Worker

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "finemoe_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt = Counter("finemoe_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self.written = Counter("finemoe_completion_tokens", "Tokens of completions", ["model"], registry=registry)
        self.ended = Counter(
            "finemoe_completions", "Completions by how they ended", ["model", "reason"], registry=registry
        )
        self.first = Histogram(
            "finemoe_first_token_seconds",
            "From a request to its first token",
            ["model"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.passes = Histogram("finemoe_pass_seconds", "Of a pass", ["model"], registry=registry, buckets=_SECONDS)
        self.open = Gauge("finemoe_open_completions", "Completions that run or wait", ["model"], registry=registry)
        self.blocks = Gauge("finemoe_cache_blocks_used", "Blocks of the cache in use", ["model"], registry=registry)
        self.running = Gauge("finemoe_running_completions", "Completions that run", ["model"], registry=registry)

    def passed(self, model: str, seconds: float) -> None:
        """A pass was made."""
        self.passes.labels(model).observe(seconds)

    def seen(self, model: str, worker: Worker) -> None:
        """How things stand just now."""
        self.open.labels(model).set(worker.open)
        self.running.labels(model).set(worker.engine.num_running)
        self.blocks.labels(model).set(worker.engine.blocks_used)

    def closed(self, model: str) -> None:
        """It is not in memory."""
        for gauge in (self.open, self.running, self.blocks):
            gauge.labels(model).set(0)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
