"""Everything is trained, or all but some parts; and by name, nothing but some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from finemoe.methods.setting import Setting, TrainableConfig
from finemoe.methods.trainables.parts import matches, require_known
from finemoe.model.transformer import Transformer
from finemoe.training.method import Group, Method, Prepare


class EverythingConfig(TrainableConfig):
    """All parameters, but for the parts that are frozen."""

    kind: Literal["everything"] = "everything"
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: embeddings, attention, routers, experts, shared_experts, dense, norms, mtp; or globs
    of parameter names."""

    @property
    def moves_routers(self) -> bool:
        """Whether routers are trained: where they are not, their biases stay too."""
        return "routers" not in self.freeze


class NamesConfig(TrainableConfig):
    """Only the parameters that are named."""

    kind: Literal["names"] = "names"
    train: Annotated[tuple[str, ...], Field(min_length=1)]
    """Parts that are trained: embeddings, attention, routers, experts, shared_experts, dense, norms, mtp; or globs of
    parameter names."""

    @property
    def moves_routers(self) -> bool:
        """Whether routers are trained: where they are not, their biases stay too."""
        return "routers" in self.train


def everything(config: EverythingConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` without what is frozen."""
    if not config.freeze:
        return method
    notes = (f"frozen: {', '.join(config.freeze)}",)
    wanted = _only(method, lambda name: not matches(name, config.freeze))
    return replace(
        wanted, prepare=(*method.prepare, _check(config.freeze, "trainable.freeze")), notes=method.notes + notes
    )


def names(config: NamesConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` with nothing but what is named."""
    wanted = _only(method, lambda name: matches(name, config.train))
    notes = (f"trained: {', '.join(config.train)}; all else stays as it is",)
    return replace(
        wanted, prepare=(*method.prepare, _check(config.train, "trainable.train")), notes=method.notes + notes
    )


def _only(method: Method[Any], wanted: Callable[[str], bool]) -> Method[Any]:
    def select(name: str) -> Group | None:
        return method.select(name) if wanted(name) else None

    return replace(method, select=select)


def _check(wanted: tuple[str, ...], field: str) -> Prepare:
    def check(model: Transformer, begins: bool) -> None:
        require_known(model, wanted, field)

    return check
