"""From what an engine writes to what a client reads: pieces as they come, or the whole, which is all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finemoe.core.errors import FinemoeError
from finemoe.generation.sequence import Sequence as Written
from finemoe.server.answers import Choice, Delta, TextLogprobs, rest_of
from finemoe.server.asking import Asked
from finemoe.server.dialects import Dialect, Splitter
from finemoe.server.errors import ApiError
from finemoe.server.metrics import Metrics
from finemoe.server.models import Served
from finemoe.server.schema import ChatRequest, CompletionRequest
from finemoe.server.worker import Done, Failed, Job, Piece, StoppedError


@dataclass
class Writing:
    """An answer on its way."""

    served: Served
    asked: Asked
    job: Job
    choices: Sequence[Choice]
    metrics: Metrics
    started: float = field(default_factory=time.monotonic)
    written: dict[int, Written] = field(default_factory=dict)
    """Completions that have ended, by the index of their choice."""

    def close(self) -> None:
        """Nobody reads on: what has not ended is cancelled."""
        if self.job.open:
            self.metrics.ended.labels(self.served.name, "cancelled").inc(len(self.choices) - len(self.written))
        self.served.worker.cancel(self.job)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What comes, as soon as it is certain; what is there already comes together.

        Raises:
            ApiError: it cannot be done, or something broke.
        """
        left, begun = len(self.choices), False
        while left:
            items = [await self.job.items.get()]
            while not self.job.items.empty():
                items.append(self.job.items.get_nowait())
            found: dict[int, Delta] = {}
            for item in items:
                if isinstance(item, Failed):
                    raise refusal(item.error)
                if not begun and isinstance(item, Piece):
                    begun = True
                    self.metrics.first.labels(self.served.name).observe(time.monotonic() - self.started)
                choice, delta = self.choices[item.index], found.setdefault(item.index, Delta(item.index))
                if isinstance(item, Done):
                    left -= 1
                    self._ended(item.index, item.written)
                    delta.add(choice.finish(item.written))
                else:
                    delta.add(choice.push(item.event))
            for delta in found.values():
                if not delta.empty:
                    yield delta

    async def whole(self) -> list[Delta]:
        """All of it, a delta a choice.

        Raises:
            ApiError: as in `deltas`.
        """
        found = [Delta(choice.index) for choice in self.choices]
        async for delta in self.deltas():
            found[delta.index].add(delta)
        return found

    def _ended(self, index: int, written: Written) -> None:
        self.written[index] = written
        name = self.served.name
        self.metrics.ended.labels(name, written.finish_reason or "stop").inc()
        self.metrics.written.labels(name).inc(len(written.completion))

    def usage(self) -> dict[str, Any]:
        """Tokens, each prompt counted once."""
        prompt = sum(len(ids) for _, ids in self.asked.prompts)
        completion = sum(len(one.completion) for one in self.written.values())
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def facts(self) -> dict[str, Any]:
        """What OpenAI's usage has no place for."""
        passes = sum(one.passes for one in self.written.values())
        tokens = sum(len(one.completion) for one in self.written.values())
        return {
            "tokens_per_pass": round(tokens / passes, 3) if passes else 0.0,
            "seconds": round(time.monotonic() - self.started, 3),
            "weight_version": self.served.weight_version,
        }


def refusal(error: Exception) -> ApiError:
    """What a failure is for a client: its own mistake in our words, a defect of ours without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FinemoeError):
        return ApiError(400, str(error))
    if isinstance(error, StoppedError):
        return ApiError(503, "the server stops, or the model was just closed to make room: ask again in a moment")
    if isinstance(error, RecursionError):
        return ApiError(400, "the request is nested too deeply: send a flatter one")
    return ApiError(500, "something broke in the server, not in your request; its log says what")


def begin(request: ChatRequest | CompletionRequest, served: Served, asked: Asked, metrics: Metrics) -> Writing:
    """Ask the engine.

    Raises:
        FullError: too many wait.
    """
    job = served.worker.submit(asked.requests)
    tokenizer = served.opened.tokenizer
    chat = isinstance(request, ChatRequest)
    tools = isinstance(request, ChatRequest) and bool(request.tools) and request.tool_choice != "none"
    form = request.response_format if isinstance(request, ChatRequest) else None
    # Where a form is asked for, all of the text is the answer, in whatever state the prompt has ended.
    dialect = served.dialect if form is None or form.type == "text" else Dialect()
    choices = [
        Choice(
            index,
            tokenizer,
            splitter=Splitter(dialect, tools=tools, thinking=asked.thinking) if chat else None,
            logprobs=bool(request.logprobs) if chat else request.logprobs is not None,
            routing=request.finemoe.routing,
            ids=isinstance(request, CompletionRequest) and bool(request.return_token_ids),
        )
        for index in range(len(asked.requests))
    ]
    metrics.prompt.labels(served.name).inc(sum(len(ids) for _, ids in asked.prompts))
    return Writing(served, asked, job, choices, metrics)


class TextShape:
    """The older shape of choices: text, with the prompt before it where `echo` asks for that."""

    def __init__(self, request: CompletionRequest, writing: Writing) -> None:
        self._request, self._writing = request, writing
        n = request.n or 1
        self._prompts = [writing.asked.prompts[index // n] for index in range(len(writing.choices))]
        tokenizer = writing.served.opened.tokenizer
        echo = bool(request.echo)
        self._logprobs = [TextLogprobs(tokenizer, not echo) for _ in writing.choices]
        self._begun: set[int] = set()

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A piece, or the whole; the first of each choice has the prompt with it."""
        entries: list[dict[str, Any] | None] = list(delta.logprobs)
        ids = [entry["id"] for entry in delta.logprobs]
        if self._request.echo and delta.index not in self._begun:
            text, prompt = self._prompts[delta.index]
            delta.content = text + delta.content
            if self._request.logprobs is not None:
                scored = self._scored(delta.index)
                entries, ids = [None, *scored, *entries], [*prompt, *ids]
        more: dict[str, Any] = {}
        if self._request.return_token_ids:
            first = {} if delta.index in self._begun else {"prompt_token_ids": list(self._prompts[delta.index][1])}
            more = {**first, "token_ids": delta.ids}
        if delta.routed is not None:
            more["routed_experts"] = delta.routed
        self._begun.add(delta.index)
        logprobs = self._logprobs[delta.index].shape(entries, ids) if self._request.logprobs is not None else None
        return {"index": delta.index, "text": delta.content, **rest_of(delta, logprobs), **more}

    def _scored(self, index: int) -> list[dict[str, Any] | None]:
        """The prompt's tokens but the first; the engine has read all of it before it draws the first token."""
        choice, prompt = self._writing.choices[index], self._prompts[index][1]
        if choice.scored is None:  # its time was up before the prompt was read
            return [None] * (len(prompt) - 1)
        return [choice.logprob(token, *one) for token, one in zip(prompt[1:], choice.scored, strict=True)]


async def until_gone(receive: Any) -> None:
    """Ends when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Any, work: Any) -> Any:
    """What `work` gives; None where the client went first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
