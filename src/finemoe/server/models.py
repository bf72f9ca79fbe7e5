"""The models of a server by name, opened when they are asked for; when memory is short, the least used one goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from finemoe.analysis.written import Cards, short_cards
from finemoe.checkpoint.language_model import LanguageModel, Weights, open_language_model, weights_for
from finemoe.checkpoint.open import read_model_config
from finemoe.checkpoint.sizes import bytes_in_memory
from finemoe.core.config import Config, did_you_mean
from finemoe.core.errors import ConfigError, FinemoeError
from finemoe.core.logs import logger
from finemoe.generation.engine import Engine, engine_for
from finemoe.generation.runner import BLOCK_SIZE, blocks_for
from finemoe.generation.scoring import reach_of
from finemoe.generation.speculation import Chosen, FromModule, FromText
from finemoe.model.config import ModelConfig
from finemoe.model.quantised.blocks import states_type
from finemoe.model.size import measure
from finemoe.server.dialects import Dialect
from finemoe.server.errors import ApiError
from finemoe.server.worker import Worker, apart

_LOOK_SECONDS = 0.01


class Limits(Config):
    """Bounds that keep one client from taking what belongs to all. Who goes beyond them is told which one it was."""

    max_waiting: NonNegativeInt = 64
    """[requests] Completions that may wait for their turn, beside those that run; beyond it the answer is 429."""
    max_running: PositiveInt = 32
    """[requests] Completions that a model writes at the same time."""
    max_body_bytes: PositiveInt = 4 << 20
    """[bytes] Of a request."""
    max_prompt_tokens: PositiveInt | None = None
    """[tokens] None: as long as the model was made or trained for."""
    max_new_tokens: PositiveInt = 4096
    """[tokens] Of a completion. More is refused; without `max_tokens` a chat answer may be as long as this."""
    max_choices: PositiveInt = 16
    """[completions] Of one request: its prompts times its n."""
    max_seconds: PositiveFloat = 600.0
    """[s] After which an answer ends where it is, with `finish_reason` "length"."""
    slow_seconds: PositiveFloat = 30.0
    """[s] A reader of a stream who takes nothing for so long is cut off."""
    drain_seconds: PositiveFloat = 30.0
    """[s] That answers have to end after SIGTERM."""


@dataclass(frozen=True)
class Options:
    """How models are opened."""

    weights: Weights = "auto"
    cache_bytes: int | None = None
    """[bytes] Of a model's cache; None: a quarter of what is free, or of `memory`."""
    memory: int | None = None
    """[bytes] For weights and caches of all models; None: none of them ever goes."""
    limits: Limits = field(default_factory=Limits)
    weights_below: Path | None = None
    """Folder below which POST /update_weights_from_disk finds weights; None: it is refused."""


@dataclass(eq=False)
class Served:
    """A model that is open."""

    name: str
    opened: LanguageModel
    worker: Worker
    dialect: Dialect
    bytes: int
    last_used: float = field(default_factory=time.monotonic)
    weight_version: str = "default"
    """What whoever renewed its weights calls them."""


@dataclass(frozen=True)
class Ready:
    """A model in memory, with its engine, before anybody asks it."""

    opened: LanguageModel
    engine: Engine
    make_engine: Callable[[], Engine]
    dialect: Dialect
    bytes: int


def prepare(name: str, source: Path, options: Options) -> Ready:
    """Open a model.

    Raises:
        FinemoeError: it cannot be opened, or its cache has no room.
    """
    started = time.monotonic()
    opened = open_language_model(source, options.weights)
    cache = _cache_bytes(opened, options)
    make = lambda: _engine(opened, cache, options.limits)  # noqa: E731
    engine = make()
    template = [] if opened.template is None else list(opened.template.sources.values())
    size = sum(tensor.nbytes for tensor in opened.model.state_dict().values()) + cache
    logger.info("%s is ready after %.1f s", name, time.monotonic() - started)
    return Ready(opened, engine, make, Dialect.of(template), size)


def _cache_bytes(opened: LanguageModel, options: Options) -> int:
    """What is given, or a quarter of the free memory, and no more than all that run can fill."""
    config = opened.model.config
    numbers = sum(one.attention.cache_elements_per_token() for one in [*config.blocks, *config.mtp])
    block = BLOCK_SIZE * numbers * states_type(opened.model.embedding.weight).itemsize
    most = options.limits.max_running * -(-(reach_of(opened) + BLOCK_SIZE) // BLOCK_SIZE)
    if options.cache_bytes is not None:
        return options.cache_bytes
    blocks = min(blocks_for(opened.model, BLOCK_SIZE, None, None), most)
    if options.memory is not None:
        blocks = max(1, min(blocks, options.memory // 4 // block))
    return block * blocks


def prepare_all(sources: Mapping[str, Path], options: Options) -> dict[str, Ready]:
    """Open all models.

    Raises:
        ConfigError: together they need more than the memory that is allowed.
        FinemoeError: as `prepare`.
    """
    found: dict[str, Ready] = {}
    for name, path in sources.items():
        found[name] = prepare(name, path, options)
        needed = sum(one.bytes for one in found.values())
        if options.memory is not None and needed > options.memory:
            raise ConfigError(
                f"{', '.join(found)}: weights and caches take {needed:,} bytes, and --memory allows "
                f"{options.memory:,}: give more, a smaller --cache-size, or --on-demand for one at a time"
            )
    return found


class Models:
    """All that a server has."""

    def __init__(
        self,
        sources: Mapping[str, Path],
        options: Options,
        observe: Callable[[str, float], None] = lambda name, seconds: None,
        ready: Mapping[str, Ready] = MappingProxyType({}),
    ) -> None:
        """Nothing is opened but what is `ready`.

        Raises:
            FinemoeError: one of them is no model.
        """
        self._ready = dict(ready)
        self._sources, self._options, self._observe = dict(sources), options, observe
        self._configs = {name: read_model_config(path) for name, path in self._sources.items()}
        self._cards = {name: Cards(path, self._configs[name]) for name, path in self._sources.items()}
        self._open: dict[str, Served] = {}
        self._sizes: dict[str, int] = {}
        self._renewed: dict[str, tuple[Path, str]] = {}
        self._renewing: dict[str, Served] = {}
        self._turns = {name: asyncio.Lock() for name in self._sources}  # one opens or renews a model at a time
        self._lock = asyncio.Lock()  # and one makes room and fills it; whoever has both took a turn first
        self.created = int(time.time())

    @property
    def limits(self) -> Limits:
        """What each request is bound by."""
        return self._options.limits

    @property
    def names(self) -> list[str]:
        """In the order in which they were given."""
        return list(self._sources)

    @property
    def open(self) -> list[Served]:
        """Those that are in memory."""
        return list(self._open.values())

    def check(self, name: str) -> None:
        """Whether there is such a model.

        Raises:
            ApiError: there is none.
        """
        if name not in self._sources:
            said = f"there is no model {name[:100]!r}{did_you_mean(name, self.names)}"
            raise ApiError(404, said, param="model", code="model_not_found")

    def opened(self, name: str) -> Served:
        """One that is in memory.

        Raises:
            KeyError: it is not.
        """
        return self._open[name]

    async def get(self, name: str) -> Served:
        """The model of that name, opened first where that has not been done.

        Raises:
            ApiError: there is none, or it cannot be opened.
        """
        self.check(name)
        served = self._held(name)
        if served is None:
            async with self._turns[name]:
                served = self._held(name) or await self._load(name)
        served.last_used = time.monotonic()
        return served

    def _held(self, name: str) -> Served | None:
        """It, where it is in memory and answers."""
        served = self._open.get(name)
        if served is not None and served.worker.broken:
            del self._open[name]
            return None
        return served

    def holds(self, served: Served) -> bool:
        """Whether it was not closed since."""
        return self._open.get(served.name) is served

    async def renew(self, name: str, path: Path, version: str) -> None:
        """Give a model the weights at `path`, which are then called `version`; another time that it is opened, too.

        Requests in flight end with the old ones, those that come meanwhile wait for the new, and nothing that the old
        ones read is found again. Other models are asked and opened meanwhile.

        Raises:
            ApiError: there is no such model, or it cannot be opened.
            FinemoeError: what is there is no model, damaged, or another one; the old weights stay.
            StoppedError: the server stops.
        """
        self.check(name)
        async with self._turns[name]:
            served = self._held(name) or await self._load(name)
            del self._open[name]  # who comes now waits for a turn
            self._renewing[name] = served
            try:
                while served.worker.open:
                    await asyncio.sleep(_LOOK_SECONDS)
                fresh = await asyncio.to_thread(apart, lambda: weights_for(served.opened, path))
                await served.worker.renew(lambda: served.opened.model.load_state_dict(fresh))
                self._renewed[name], served.weight_version = (path, version), version
            finally:
                if self._renewing.pop(name, None) is not None:  # else all were closed meanwhile
                    self._open[name] = served

    @property
    def weights_below(self) -> Path | None:
        """Where weights may come from."""
        return self._options.weights_below

    async def close(self) -> None:
        """End everything, what is given new weights too."""
        ending = [*self._open.values(), *self._renewing.values()]
        self._open.clear()
        self._renewing.clear()
        for served in ending:
            await served.worker.close()

    async def _load(self, name: str) -> Served:
        async with self._lock:
            return await self._loaded(name)

    async def _loaded(self, name: str) -> Served:
        ready = self._ready.pop(name, None)
        if ready is None:
            try:
                needed = self._sizes[name] if name in self._sizes else await asyncio.to_thread(self._estimate, name)
                await self._make_room(name, needed)
                ready = await asyncio.to_thread(apart, lambda: self._prepared(name))
            except (FinemoeError, OSError, MemoryError) as error:
                logger.error("%s cannot be opened: %s", name, error)
                raise ApiError(503, f"the model {name} cannot be opened now; the server's log says why") from error
        self._sizes[name] = ready.bytes  # with its cache, which nobody knew before
        await self._make_room(name, ready.bytes)
        limits = self._options.limits
        worker = Worker(
            ready.engine,
            ready.make_engine,
            most_open=limits.max_running + limits.max_waiting,
            observe=lambda seconds: self._observe(name, seconds),
        )
        served = Served(name, ready.opened, worker, ready.dialect, ready.bytes)
        if name in self._renewed:
            served.weight_version = self._renewed[name][1]
        self._open[name] = served
        return served

    def _prepared(self, name: str) -> Ready:
        """It, with the weights that it had last; where they are gone, as a trainer deletes old ones, with its own."""
        ready = prepare(name, self._sources[name], self._options)
        if name in self._renewed:
            path, version = self._renewed[name]
            try:
                ready.opened.model.load_state_dict(weights_for(ready.opened, path))
            except (FinemoeError, OSError) as error:
                logger.warning("%s has its own weights again: %s cannot be read any more: %s", name, version, error)
                del self._renewed[name]
        return ready

    def _estimate(self, name: str) -> int:
        return bytes_in_memory(self._sources[name], self._options.weights) + (self._options.cache_bytes or 0)

    async def _make_room(self, name: str, needed: int) -> None:
        """Close what was not used for longest, and is idle, until the new one has room.

        Raises:
            ApiError: those that are busy leave none, or there is none at all.
        """
        if self._options.memory is None:
            return
        if self._sizes.get(name, 0) > self._options.memory:
            logger.error("%s takes %d bytes, and --memory allows %d", name, needed, self._options.memory)
            raise ApiError(503, f"the model {name} is larger than the memory that this server may use: give it more")
        while (held := [*self.open, *self._renewing.values()]) and (
            sum(one.bytes for one in held) + needed > self._options.memory
        ):
            idle = [one for one in self._open.values() if not one.worker.open]
            if not idle:
                raise ApiError(503, f"there is no memory for {name} while the others are at work: try again later")
            oldest = min(idle, key=lambda one: one.last_used)
            del self._open[oldest.name]
            await oldest.worker.close()
            logger.info("%s was closed to make room for %s", oldest.name, name)

    def describe(self, name: str) -> dict[str, Any]:
        """As GET /v1/models shows it."""
        config, served = self._configs[name], self._open.get(name)
        size = measure(config, 1)
        facts: dict[str, Any] = {
            "loaded": served is not None,
            "parameters": size.total_parameters,
            "active_parameters": size.active_parameters,
            "guesses": ["text", *(["module"] if config.mtp else [])],
            "layers": [_layer(number, config) for number in range(len(config.blocks))],
            "cards": self._cards[name].newest() is not None,
        }
        if served is not None:
            facts["chat"] = served.opened.template is not None
            facts["tools"] = served.dialect.tools is not None
            facts["reasoning"] = served.dialect.reasoning
            facts["context"] = reach_of(served.opened)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "finemoe", "finemoe": facts}

    def cards(self, name: str) -> dict[str, Any]:
        """What an analysis says of the experts, by layer and expert.

        Raises:
            ApiError: there is none.
        """
        self.check(name)
        report = self._cards[name].newest()
        if report is None:
            source = self._sources[name]
            folder = source / "experts" if source.is_dir() else source.with_name(f"{source.stem}-experts")
            command = f"finemoe analyze experts {source.name} --out {folder.relative_to(source.parent)}"
            raise ApiError(404, f"there is no analysis of {name}: `{command}` writes one", param="model")
        return {"experts": short_cards(report)}


def _engine(opened: LanguageModel, cache_bytes: int, limits: Limits) -> Engine:
    size = opened.tokenizer.vocab_size
    sources: dict[str, Any] = {"text": FromText()}
    if opened.model.mtp:
        sources["module"] = FromModule(opened.model, 2, size)
    return engine_for(opened, guesses=Chosen(sources), cache_bytes=cache_bytes, max_sequences=limits.max_running)


def _layer(number: int, config: ModelConfig) -> dict[str, Any]:
    layer = config.blocks[number].feed_forward
    if layer.kind == "dense":
        return {"layer": number, "kind": "dense"}
    counts = {
        "experts": layer.num_routed_experts,
        "active": layer.experts_per_token,
        "shared": layer.num_shared_experts,
    }
    return {"layer": number, "kind": "moe", **counts}
