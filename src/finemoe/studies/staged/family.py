"""Which stages a stage came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Tables = Mapping[str, Any]


def parents(stages: Sequence[Tables]) -> dict[str, list[str]]:
    """By stage: those that it begins with, or that a path of it names, in order."""
    names = [str(one.get("name")) for one in stages]
    return {name: [other for other in names[:place] if _names(one, other)]
            for place, (name, one) in enumerate(zip(names, stages, strict=True))}  # fmt: skip


def _names(value: Any, stage: str) -> bool:
    if isinstance(value, Mapping):
        begins = value.get("start_from") == stage
        return begins or any(_names(one, stage) for key, one in value.items() if key not in ("name", "template"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(_names(one, stage) for one in value)
    return isinstance(value, str) and value.startswith(f"{{{stage}}}/")


def line(stage: str, parents: Mapping[str, Sequence[str]]) -> list[str]:
    """The stage and all that it came from, each once, in the order in which they run."""
    found = {stage}
    for name in reversed(list(parents)):
        if name in found:
            found |= set(parents[name])
    return [name for name in parents if name in found]
