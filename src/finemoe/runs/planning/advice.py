"""What makes a plan fit that does not: options that were tried on the same question, and of these those that do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from finemoe.core.errors import ConfigError
from finemoe.model.moe.layer import MoEConfig
from finemoe.parallel.config import Layout
from finemoe.parallel.planner.devices import Device
from finemoe.parallel.planner.memory import BESIDE, peak_memory
from finemoe.parallel.planner.plan import Calibration, Plan, does_not_fit
from finemoe.parallel.planner.search import first_fit
from finemoe.parallel.planner.setup import Setup
from finemoe.runs.planning.asked import Options, Question
from finemoe.runs.planning.measured import HERE

_LAYOUT = re.compile(r"\s*(stage\.[^.=]+\.)?parallel\.")
"""What an override begins with that says a layout, which is looked for here."""
_DOUBLINGS = 12
"""Of the devices, before more of them are said not to help."""


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
    if not found and (several := _together(levers, tried, request)):
        found = [several]
    raise ConfigError(f"{does_not_fit(made)} {_said(found, request, ask, made.device, made.calibration)}")


def nothing_fits(nearest: str, request: Request, ask: Ask, device: Device, calibration: Calibration) -> str:
    """What is said of a search that found no layout: how near it came, and options with which it finds one."""
    smaller = request.with_options("--micro-batch 1", micro_batch=1)
    found = [smaller] if _first_fit(smaller, ask, device, calibration) is not None else []
    return f"{nearest} {_said(found, request, ask, device, calibration, searches=True)}"


def _said(
    found: list[Request], request: Request, ask: Ask, device: Device, calibration: Calibration, searches: bool = False
) -> str:
    here = device.name == "here"  # whose processes share its memory
    more = None if here else _more_devices(request, ask, device, calibration, searches)
    advice = ", or ".join([*(" ".join(one.words) for one in found), *([more] if more else [])])
    return f"It fits with {advice}" if advice else "Take a smaller model"


def _together(levers: list[_Lever], tried: _Tried, request: Request) -> Request | None:
    """As few of them as make it fit; None where all together do not."""
    used: list[_Lever] = []
    for lever in levers:
        if tried.needed(lever(_by(used, request))) < tried.needed(_by(used, request)):
            used.append(lever)
    if not tried.fits(_by(used, request)):
        return None
    for lever in reversed(used.copy()):  # those that changed most of how it is computed stand last
        without = [one for one in used if one is not lever]
        used = without if tried.fits(_by(without, request)) else used
    return _by(used, request)


def _by(levers: list[_Lever], request: Request) -> Request:
    for lever in levers:
        request = lever(request)
    return request


def _more_devices(request: Request, ask: Ask, device: Device, calibration: Calibration, searches: bool) -> str | None:
    """Twice as many, four times and so on, and a layout of them; with more tokens a step where there are too few."""
    asked = ask(request).config
    said = {one.partition("=")[0] for one in request.overrides}
    said |= {f"parallel.{name}" for name in asked.parallel.model_fields_set}
    for times in (1 << power for power in range(_DOUBLINGS + 1)):  # as many by another layout, twice as many ...
        more = request.by(request.gpus * times) if times > 1 else request
        tokens = asked.training.tokens_per_step * times
        for way in (more, more.with_options(f"--tokens-per-step {tokens}", tokens_per_step=tokens)):
            if (layout := _first_fit(way, ask, device, calibration)) is not None:
                return " ".join(way.words if searches else [*way.words, options_of(layout, said)])
    return None


def options_of(layout: Setup, said: Collection[str] = ()) -> str:
    """A layout as `train`, `launch` and `plan` take it, beside keys that were `said` of another."""
    sizes = {
        f"parallel.{name}": getattr(layout, name) for name in ("pipeline", "replicate", "shard", "context", "expert")
    }
    keys = {key: str(size) for key, size in sizes.items() if size > 1 or key == "parallel.shard" or key in said}
    if layout.pipeline > 1 or "parallel.schedule" in said:
        keys["parallel.schedule"] = layout.schedule
    if layout.recompute:
        keys["kernels.recompute"] = "true"
    return " ".join(f"--set {key}={value}" for key, value in keys.items())


def _first_fit(request: Request, ask: Ask, device: Device, calibration: Calibration) -> Setup | None:
    with suppress(ConfigError):
        free = tuple(one for one in request.overrides if not _LAYOUT.match(one))
        question = ask(replace(request, overrides=free))
        return first_fit(
            question.config.model,
            question.setup(Layout(), device.name == "here"),
            request.gpus,
            device,
            refuse=question.refuse if calibration == "torch" else lambda layout: None,  # others train by more layouts
            calibration=calibration,
            beside=HERE.beside if device.name == "here" else BESIDE,
        )
    return None


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
