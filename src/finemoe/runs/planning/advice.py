"""What makes a plan fit that does not: options that were tried on the same question, and of these those that do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from finemoe.core.errors import ConfigError
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.planner.memory import peak_memory
from finemoe.parallel.planner.plan import Plan, does_not_fit
from finemoe.runs.planning.asked import Options, Question

_DOUBLINGS = 14
"""Of the devices, before we say that more of them do not help."""


@dataclass(frozen=True)
class Request:
    """How a plan is asked for."""

    gpus: int
    options: Options
    overrides: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """What was changed, as one types it."""

    def with_options(self, words: str, **options: Any) -> Request:
        """This, with other options, which are called `words`."""
        return replace(self, options=replace(self.options, **options), words=(*self.words, words))

    def with_keys(self, *overrides: str) -> Request:
        """This, with other keys; what was said of the same before is not said again."""
        names = tuple(f"--set {one.partition('=')[0]}=" for one in overrides)
        kept = [one for one in self.words if not one.startswith(names)]
        words = (*kept, *(f"--set {one}" for one in overrides))
        return replace(self, overrides=(*self.overrides, *overrides), words=words)

    def by(self, gpus: int) -> Request:
        """This, on so many devices."""
        return replace(self, gpus=gpus, words=(*self.words, f"--gpus {gpus}"))


Ask = Callable[[Request], Question]
_Lever = Callable[[Request], Request]


def require_fit(made: Plan, request: Request, ask: Ask) -> None:
    """Refuse what does not fit.

    Args:
        made: the plan.
        request: that it is the plan of.
        ask: what a request comes to.

    Raises:
        ConfigError: with the memory of the rank that takes most, part by part, and options with which it fits.
    """
    if made.fits:
        return
    tried = _Tried(made, ask)
    levers = [one for one in _levers(made, ask(request), tried, request) if tried.needed(one(request)) < math.inf]
    found = [one(request) for one in levers if tried.fits(one(request))]
    together = request
    for lever in () if found else levers:
        if tried.needed(lever(together)) < tried.needed(together):
            together = lever(together)
            found = [together] if tried.fits(together) else []
        if found:
            break
    if made.device.name != "here":  # processes of one machine share its memory
        found += [more for more in (tried.devices(request) or tried.devices(together),) if more is not None]
    advice = ", or ".join(" ".join(one.words) for one in found)
    raise ConfigError(f"{does_not_fit(made)} {f'It fits with {advice}' if advice else 'Take a smaller model'}")


@dataclass(frozen=True)
class _Tried:
    made: Plan
    ask: Ask

    def needed(self, request: Request) -> float:
        """[bytes] Of the rank that takes most; infinite where it is refused."""
        with suppress(ConfigError):
            question, own = self.ask(request), self.made.setup
            layout = question.layout(request.gpus)
            if self.made.calibration == "torch":  # the others are for software that trains by more layouts
                question.refuse(layout)
            setup = question.setup(layout, self.made.device.name == "here")
            setup = replace(setup, once_a_node=own.once_a_node, narrow=own.narrow)
            return peak_memory(question.config.model, setup, beside=self.made.peak.beside).total
        return math.inf

    def fits(self, request: Request) -> bool:
        return self.needed(request) <= self.made.device.memory

    def devices(self, request: Request) -> Request | None:
        """By as many more of them as do; with more tokens a step where they have too few to share."""
        own = self.made.setup
        for times in (1 << power for power in range(1, _DOUBLINGS + 1)):
            more, tokens = request.by(request.gpus * times), own.tokens_per_step * times
            ways = [more, more.with_options(f"--tokens-per-step {tokens}", tokens_per_step=tokens)]
            shard = more.gpus // (own.pipeline * own.context)
            ways += [way.with_keys("parallel.replicate=1", f"parallel.shard={shard}") for way in tuple(ways)]
            if found := next((way for way in ways if self.fits(way)), None):
                return found
        return None


def _levers(made: Plan, question: Question, tried: _Tried, request: Request) -> Iterator[_Lever]:
    """What may take less memory by as many devices; pieces first, since other levers work on them alone."""
    own = made.setup
    if own.replicate > 1:
        yield lambda one: one.with_keys("parallel.replicate=1", f"parallel.shard={own.replicate * own.shard}")
    if own.gather == "step":
        yield lambda one: one.with_options("--gather micro_batch", gather="micro_batch")
    if not own.recompute:
        yield lambda one: one.with_options("--recompute", recompute=True)

    def at_once(sequences: int) -> _Lever:
        return lambda one: one.with_options(f"--micro-batch {sequences}", micro_batch=sequences)

    smaller = [own.micro_batch >> power for power in range(1, own.micro_batch.bit_length())]
    if smaller:
        yield next((lever for lever in map(at_once, smaller) if tried.fits(lever(request))), at_once(1))
    layers = [block.feed_forward for block in question.config.model.blocks]
    experts = [layer.num_routed_experts for layer in layers if isinstance(layer, MoEConfig)]
    most = math.gcd(own.fsdp, *experts) if experts else 1
    if most > own.expert:
        yield lambda one: one.with_keys(f"parallel.expert={most}")
    if own.state_bytes == 8:
        yield lambda one: one.with_keys("optimizer.moments=bf16")
