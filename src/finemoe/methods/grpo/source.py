"""Where answers come from: ids in; ids, log-probabilities and experts out. Never text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, final

import torch

from finemoe.generation.config import SamplingConfig
from finemoe.generation.engine import Engine, Request
from finemoe.generation.runner import cache_bytes
from finemoe.generation.sequence import Sequence as Completed
from finemoe.methods.grpo.rollout import Drawn
from finemoe.model.transformer import Transformer
from finemoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """A prompt, and which random streams answer it."""

    ids: tuple[int, ...]
    streams: tuple[int, ...]
    """One an answer: how many answers were drawn before it in the run."""


class Source(Protocol):
    """Answers prompts as the policy."""

    def renew(self, number: int) -> None:
        """A rollout begins, of that number: what is asked from now on is answered by the policy as it is now."""
        ...

    def __call__(self, asked: Sequence[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
        """The answers of each, in the order of its streams."""
        ...


@final
@dataclass(frozen=True)
class OwnEngine:
    """The engine of this process, on the weights that are trained: every answer is of the policy itself."""

    model: Transformer
    tokenizer: Tokenizer
    autocast: Callable[[], AbstractContextManager[object]]
    """The precision of training."""
    at_once: int = 64
    """[answers] That are written at once."""
    experts: bool = True
    """Tell those of every token."""

    def renew(self, number: int) -> None:
        """It has the very weights."""

    def __call__(self, asked: Sequence[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
        """As in `Source`. A prompt is read once for all of its answers; what is drawn depends on weights, sampling and
        streams alone.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                return self._written(asked, sampling)
        finally:
            self.model.train(was_training)

    def _written(self, asked: Sequence[Asked], sampling: SamplingConfig) -> list[list[Drawn]]:
        room = sampling.max_new_tokens
        lengths = [len(one.ids) + room for one in asked for _ in one.streams]
        engine = Engine(
            self.model,
            end_of_text_id=self.tokenizer.end_of_text_id,
            stop_ids=self.tokenizer.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
            cache_bytes=cache_bytes(self.model, sorted(lengths)[-self.at_once :]),
            max_sequences=min(self.at_once, len(lengths)),
            max_tokens=max(512, self.at_once),
        )
        routed = self.experts and bool(self.model.moe_layers)
        numbers: list[list[int]] = []
        for one in asked:
            first: int | None = None
            numbers.append([])
            for stream in one.streams:
                request = Request(one.ids, sampling, repetition=stream, parent=first, experts=routed)
                numbers[-1].append(engine.submit(request))
                first = numbers[-1][0]
        done: dict[int, Completed] = {}
        for event in engine.events():
            if event.finish_reason is not None:
                done[event.sequence.id] = event.sequence
        return [[_drawn(done[number]) for number in group] for group in numbers]


def _drawn(one: Completed) -> Drawn:
    assert one.finish_reason is not None
    routes = {layer: torch.tensor(chosen, dtype=torch.int16) for layer, chosen in one.experts.items()}
    return Drawn(one.prompt, tuple(one.completion), tuple(one.logprobs), one.finish_reason, routes)
