"""Sequence: one prompt and the completion that grows behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from finemoe.core import seeds
from finemoe.generation.config import SamplingConfig
from finemoe.generation.grammar import GrammarState
from finemoe.generation.processors import Context
from finemoe.generation.text import TextStream
from finemoe.model.moe.decision import RoutingConstraint

FinishReason = Literal["length", "stop", "cancelled", "deadline"]
"""`length`: max_new_tokens reached. `stop`: the model ended the text. The others: somebody did, or its time was up."""
Likely = tuple[tuple[int, float], ...]
"""Ids and log-probabilities in nats, the most probable first."""
Constraint = Mapping[int, RoutingConstraint]
"""By layer, as `Transformer.forward` takes it; the same for every token of a sequence."""


@dataclass(eq=False)
class Sequence:
    """State of one request. Its random stream is its own: neighbours do not change its completion."""

    id: int
    prompt: tuple[int, ...]
    """Never empty."""
    sampling: SamplingConfig
    generator: torch.Generator
    completion: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of each completion token under the model, in nats."""
    likely: list[Likely] = field(default_factory=list)
    """Beside each completion token, the most probable ones that `sampling.logprobs` asks for."""
    prompt_logprobs: list[tuple[float, Likely]] = field(default_factory=list)
    """Of each token of the prompt but the first, where `sampling.prompt_logprobs` asks for them."""
    grammar: GrammarState | None = None
    """Where the completion is in its grammar."""
    text: TextStream | None = None
    """Its text as far as it is certain; None where nobody knows the tokenizer."""
    finish_reason: FinishReason | None = None
    """None while it is still growing."""
    stopped_by: str | None = None
    """The stop string that ended the text, which ends before it; empty: its grammar lets nothing follow."""
    num_cached: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    """Of the cache, in the order of its tokens."""
    parent: Sequence | None = None
    """Another with the same prompt, whose blocks it shares once the prompt is read."""
    salt: bytes = b""
    """Texts read under different ones never share blocks."""
    constraint: Constraint | None = None
    """What holds for its experts, by layer."""
    guess: str | None = None
    """Which source guesses its next tokens, of an engine that has several."""
    passes: int = 0
    """In which tokens of it were drawn."""
    experts: dict[int, list[list[int]]] = field(default_factory=dict)
    """By layer, where they were asked for: the experts that each token chose, best first."""

    @staticmethod
    def start(id: int, prompt: tuple[int, ...], sampling: SamplingConfig, repetition: int) -> Sequence:
        """A fresh sequence. `repetition` gives the n-th request for the same prompt a stream of its own."""
        stream = seeds.generator(sampling.seed, "sampling", repetition, *prompt)
        return Sequence(id, prompt, sampling, stream)

    def context(self, stop_ids: frozenset[int]) -> Context:
        """What the next token is drawn after, of a model that stops at `stop_ids`."""
        return Context(self.prompt, self.completion, self.sampling.end_ids(stop_ids))

    def append(self, token_id: int, logprob: float, stop_ids: frozenset[int]) -> str:
        """Take the token that was drawn, and finish where it is the last; what it makes certain of the text."""
        self.completion.append(token_id)
        self.logprobs.append(logprob)
        if self.grammar is not None:
            self.grammar.advance(token_id)
        ends = token_id in self.sampling.end_ids(stop_ids)
        certain = self.text.push(token_id) if self.text is not None and not ends else ""
        if ends:
            self.finish_reason = "stop"
        elif self.text is not None and self.text.stopped is not None:
            self.stop(self.text.stopped)
        elif len(self.completion) == self.sampling.max_new_tokens:
            self.finish_reason = "length"
        elif self.grammar is not None and self.grammar.ended and self.sampling.ignore_end:
            self.stop("")  # nothing but an end could follow
        return certain + (self.finish_text() if self.finish_reason is not None else "")

    def finish_text(self) -> str:
        """What was held back of the text, as nothing follows any more."""
        return "" if self.text is None else self.text.finish()

    def remember(self, start: int, experts: Mapping[int, list[list[int]]]) -> None:
        """Which experts, by layer and token, the tokens from `start` on chose; of a text read again, the last time."""
        for layer, chosen in experts.items():
            known = self.experts.setdefault(layer, [])
            known += [[] for _ in range(start - len(known))]  # what was found in the cache chose nothing here
            known[start : start + len(chosen)] = chosen

    def take_experts(self, parent: Sequence) -> None:
        """Those of the prompt that `parent` read for both."""
        for layer, known in self.experts.items():
            for place, chosen in enumerate(parent.experts.get(layer, [])[: len(self.prompt)]):
                known[place] = known[place] or chosen

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was drawn."""
        return [*self.prompt, *self.completion]

    def stop(self, stopped_by: str) -> None:
        """End it at a stop string."""
        self.finish_reason, self.stopped_by = "stop", stopped_by

    @property
    def text_ids(self) -> list[int]:
        """The completion without the token that stopped it."""
        by_token = self.finish_reason == "stop" and self.stopped_by is None
        return self.completion[:-1] if by_token else list(self.completion)
