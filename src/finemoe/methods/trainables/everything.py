"""Everything is trained, or all but some parts; and by name, nothing but some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from finemoe.core.errors import ConfigError
from finemoe.methods.setting import Held, Setting, TrainableConfig, numbers
from finemoe.methods.trainables.parts import matches, require_known
from finemoe.model.transformer import Transformer
from finemoe.training.method import Group, Method

_ROUTERS = tuple(f"blocks.{layer}.feed_forward.router.weight" for layer in range(256))
"""Names that a glob may match, whatever model it is for."""


class EverythingConfig(TrainableConfig):
    """All parameters, but for the parts that are frozen."""

    kind: Literal["everything"] = "everything"
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: embeddings, attention, routers, experts, shared_experts, dense, norms, mtp; or globs
    of parameter names."""

    @property
    def moves_routers(self) -> bool:
        """Whether all routers are trained: where any is not, biases stay too."""
        return not any(matches(name, self.freeze) for name in _ROUTERS)

    def held(self, shapes: Mapping[str, tuple[int, ...]], setting: Setting) -> Held:
        """What is frozen has neither gradients nor optimizer state."""
        return Held(numbers({name: shape for name, shape in shapes.items() if not matches(name, self.freeze)}))


class NamesConfig(TrainableConfig):
    """Only the parameters that are named."""

    kind: Literal["names"] = "names"
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parts that are trained: embeddings, attention, routers, experts, shared_experts, dense, norms, mtp; or globs of
    parameter names."""

    @property
    def moves_routers(self) -> bool:
        """Whether all routers are trained: where any is not, biases stay too."""
        return all(matches(name, self.train) for name in _ROUTERS)

    def held(self, shapes: Mapping[str, tuple[int, ...]], setting: Setting) -> Held:
        """Only what is named has gradients and optimizer state."""
        return Held(numbers({name: shape for name, shape in shapes.items() if matches(name, self.train)}))


def everything(config: EverythingConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` without what is frozen."""
    if not config.freeze:
        return method
    notes = (f"frozen: {', '.join(config.freeze)}",)
    wanted = _only(method, lambda name: not matches(name, config.freeze))
    return replace(
        wanted,
        checks=(*method.checks, _check(wanted, config.freeze, "trainable.freeze", "freeze less")),
        notes=method.notes + notes,
    )


def names(config: NamesConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` with nothing but what is named."""
    wanted = _only(method, lambda name: matches(name, config.train))
    notes = (f"trained: {', '.join(config.train)}; all else stays as it is",)
    return replace(
        wanted,
        checks=(*method.checks, _check(wanted, config.train, "trainable.train", "name more")),
        notes=method.notes + notes,
    )


def _only(method: Method[Any], wanted: Callable[[str], bool]) -> Method[Any]:
    def select(name: str) -> Group | None:
        return method.select(name) if wanted(name) else None

    return replace(method, select=select)


def _check(method: Method[Any], wanted: tuple[str, ...], field: str, mend: str) -> Callable[[Transformer], None]:
    """Refuse names that the model has not, and a run in which nothing would train."""

    def check(model: Transformer) -> None:
        require_known(model, wanted, field)
        names = [name for name, _ in model.named_parameters()]
        if any(method.select(name) is not None for name in names):
            return
        frozen = any(name.startswith("mtp.") for name in names) and method.select("mtp.") is None
        said = '; prediction modules train with method.mtp = "train"' if frozen else ""
        raise ConfigError(f"{field}: nothing of the model is left to train: {mend}{said}")

    return check
