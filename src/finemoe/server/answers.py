"""Answers: what comes of a completion, in OpenAI's shapes. A whole answer is its stream, put together."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finemoe.generation.engine import Event
from finemoe.generation.sequence import Likely
from finemoe.generation.sequence import Sequence as Written
from finemoe.server.dialects import Part, Splitter
from finemoe.text.tokenizer import Tokenizer

REASONS = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop"}
"""Ours to OpenAI's."""


@dataclass
class Delta:
    """What one pass, or several, adds to a choice."""

    index: int
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of tokens, each with its alternatives, in the shape of chat answers."""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """With their experts, where they were asked for."""
    ids: list[int] = field(default_factory=list)
    """Of the tokens, where they were asked for."""
    routed: str | None = None
    """When it has ended: `packed` experts, where they were asked for."""
    finish_reason: str | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to send."""
        said = self.content or self.reasoning or self.calls or self.logprobs or self.tokens or self.ids
        return not (said or self.finish_reason)

    def add(self, other: Delta) -> None:
        """Put what came later behind it."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.logprobs += other.logprobs
        self.tokens += other.tokens
        self.ids += other.ids
        self.routed = other.routed or self.routed
        self.finish_reason = other.finish_reason or self.finish_reason


class Choice:
    """One completion on its way to a client."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        splitter: Splitter | None,
        logprobs: bool,
        routing: bool,
        ids: bool = False,
    ) -> None:
        """Begin.

        Args:
            index: of the choice.
            tokenizer: of the model.
            splitter: for chat answers.
            logprobs, routing, ids: whether they were asked for.
        """
        self.index = index
        self._tokenizer, self._splitter = tokenizer, splitter
        self._logprobs, self._routing, self._ids = logprobs, routing, ids
        self._calls = self._given = 0
        self._chat = splitter is not None
        self.scored: list[tuple[float, Likely]] | None = None
        """Log-probabilities of the prompt's tokens but the first, once the first token is drawn."""

    def push(self, event: Event) -> Delta:
        """A token."""
        if self.scored is None:
            self.scored = event.sequence.prompt_logprobs
        self._given += len(event.text)
        delta = self._said(event.text)
        ends = event.finish_reason == "stop" and event.sequence.stopped_by is None
        if self._logprobs and not (ends and self._chat):  # the token that ends an answer is no part of its content
            delta.logprobs.append(self.logprob(event.token_id, event.logprob, event.likely))
        if self._ids:
            delta.ids.append(event.token_id)
        if self._routing:
            token = {"id": event.token_id, "token": self.token(event.token_id), "logprob": event.logprob}
            delta.tokens.append({**token, **routes_of(event)})
        return delta

    def finish(self, written: Written) -> Delta:
        """It has ended."""
        held = "" if written.text is None else written.text.text[self._given :]  # no token came that set it free
        delta = self._said(held)
        for part in self._splitter.finish() if self._splitter is not None else ():
            self._add(delta, part)
        reason = REASONS[written.finish_reason or "stop"]
        delta.finish_reason = "tool_calls" if self._calls and reason == "stop" else reason
        delta.routed = packed(written.experts) if written.experts else None
        return delta

    def _said(self, text: str) -> Delta:
        delta = Delta(self.index)
        if self._splitter is None:
            delta.content = text
            return delta
        for part in self._splitter.push(text):
            self._add(delta, part)
        return delta

    def _add(self, delta: Delta, part: Part) -> None:
        if part.kind == "content":
            delta.content += part.text
        elif part.kind == "reasoning":
            delta.reasoning += part.text
        else:
            function = {"name": part.name, "arguments": part.text}
            call = {"index": self._calls, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
            delta.calls.append({**call, "function": function})
            self._calls += 1

    def token(self, token_id: int) -> str:
        """Its text; bytes that are no whole characters become U+FFFD."""
        return self._tokenizer.token_bytes.get(token_id, b"").decode(errors="replace")

    def logprob(self, token_id: int, logprob: float, likely: Likely) -> dict[str, Any]:
        """A token with its alternatives, as chat answers have them."""
        alternatives = [self._likely(other, value) for other, value in likely]
        return {**self._likely(token_id, logprob), "id": token_id, "top_logprobs": alternatives}

    def _likely(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes.get(token_id, b"")
        return {"token": content.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(content)}


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI's least."""
    return max(logprob, -9999.0)


def packed(experts: Mapping[int, Sequence[Sequence[int]]]) -> str:
    """Experts by layer, of tokens in order, as base64 of an .npy file: int16 [tokens, layers, k], best first.

    Layers are those with experts, in order; where one chooses fewer than others, -1 follows.
    """
    layers = [experts[layer] for layer in sorted(experts)]
    rows, width = min(map(len, layers)), max(len(chosen) for layer in layers for chosen in layer)
    table = np.full((rows, len(layers), width), -1, dtype=np.int16)
    for place, layer in enumerate(layers):
        table[:, place, : len(layer[0])] = layer[:rows]
    file = io.BytesIO()
    np.save(file, table, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def routes_of(event: Event) -> dict[str, Any]:
    """The experts that a token came out of, by layer."""
    found: dict[str, dict[str, Any]] = {"experts": {}, "gates": {}, "shared": {}}
    for layer, route in event.routes.items():
        found["experts"][str(layer)] = list(route.experts)
        found["gates"][str(layer)] = [round(gate, 4) for gate in route.gates]
        if route.shared is not None:
            found["shared"][str(layer)] = round(route.shared, 4)
    return found if found["shared"] else {"experts": found["experts"], "gates": found["gates"]}


def chat_choice(whole: Delta, logprobs: bool) -> dict[str, Any]:
    """A choice of a whole chat answer; an empty one has no log-probabilities, but a place for them where asked for."""
    calls = [{name: value for name, value in call.items() if name != "index"} for call in whole.calls]
    message: dict[str, Any] = {"role": "assistant", "content": whole.content or (None if calls else "")}
    message["refusal"] = None
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if calls:
        message["tool_calls"] = calls
    return {"index": whole.index, "message": message, **rest_of(whole, _chat_logprobs(whole) if logprobs else None)}


def chat_chunk(delta: Delta, first: bool) -> dict[str, Any]:
    """A choice of a piece of a chat answer; the first names the role."""
    said: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
    if delta.content:
        said["content"] = delta.content
    if delta.reasoning:
        said["reasoning_content"] = delta.reasoning
    if delta.calls:
        said["tool_calls"] = delta.calls
    return {"index": delta.index, "delta": said, **rest_of(delta, _chat_logprobs(delta) if delta.logprobs else None)}


def _chat_logprobs(delta: Delta) -> dict[str, Any]:
    shown = [{name: value for name, value in entry.items() if name != "id"} for entry in delta.logprobs]
    return {"content": shown, "refusal": None}


def rest_of(delta: Delta, logprobs: Any) -> dict[str, Any]:
    """What a choice of either shape has."""
    rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": delta.finish_reason}
    if delta.tokens:
        rest["finemoe"] = {"tokens": delta.tokens}
    return rest


class TextLogprobs:
    """Log-probabilities in the older shape, with the place of each token in the text."""

    def __init__(self, tokenizer: Tokenizer, continues: bool) -> None:
        self._decoder = tokenizer.decoder(continues)
        self._tokenizer = tokenizer
        self._place = 0

    def shape(self, entries: Iterable[Mapping[str, Any] | None], ids: Iterable[int]) -> dict[str, Any]:
        """What tokens add: `entries` as `Choice.logprob` makes them, None where nothing came before."""
        shaped: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry, token_id in zip(entries, ids, strict=True):
            shaped["tokens"].append(_spelling(self._tokenizer.token_bytes.get(token_id, b"")))
            shaped["text_offset"].append(self._place)
            self._place += len(self._decoder.push(token_id))
            shaped["token_logprobs"].append(None if entry is None else entry["logprob"])
            shaped["top_logprobs"].append(None if entry is None else _table(entry))
        return shaped


def _table(entry: Mapping[str, Any]) -> dict[str, float]:
    """Texts of alternatives, and of the token itself; of tokens with one text the likelier counts."""
    table: dict[str, float] = {}
    for other in [*entry["top_logprobs"], entry]:
        name = _spelling(bytes(other["bytes"]))
        table[name] = max(other["logprob"], table.get(name, -9999.0))
    return table


def _spelling(content: bytes) -> str:
    """A token's text; as OpenAI writes them, `bytes:\\xe2` for those that are no whole characters."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
