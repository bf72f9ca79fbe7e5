"""Do two configurations compute the same? What a foreign format says of a model, beside the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from finemoe.model.config import BlockConfig, ModelConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.moe.routers.group_limited import GroupLimitedConfig
from finemoe.model.moe.routers.select import GroupsConfig
from finemoe.model.rope import Llama3Scaling, NTKScaling, RopeConfig

EXACT: Final = 1e-9
"""Relative difference of two numbers that were written in full."""
SINGLE: Final = 1e-5
"""The same where they went through float32 and back."""
_NO_FUNCTION = frozenset({"init_std", "max_positions"})


def differences(ours: ModelConfig, theirs: ModelConfig, tolerance: float = EXACT) -> list[str]:
    """The settings in which two models compute something else, `field ours (theirs theirs)` each.

    Aside are settings of training and lengths, which have no function, and spellings of one rotary scaling.
    """
    return list(_differences("", _computed(ours), _computed(theirs), tolerance))


def _computed(config: ModelConfig) -> dict[str, Any]:
    table = config.model_dump(exclude=set(_NO_FUNCTION))
    for name in ("blocks", "mtp"):
        table[name] = [_block(block) for block in getattr(config, name)]
    return table


def _block(block: BlockConfig) -> dict[str, Any]:
    layer, attention = block.feed_forward, block.attention
    return {
        "attention": {**attention.model_dump(), "rope": _rope(attention.rope, attention.turning)},
        "feed_forward": _routed(layer) if isinstance(layer, MoEConfig) else layer.model_dump(),
    }


def _routed(layer: MoEConfig) -> dict[str, Any]:
    """Without what concerns training; groups that are all used are none."""
    table = layer.without_training().model_dump()
    router = layer.router
    if isinstance(router, GroupsConfig) and router.num_groups == router.groups_per_token:
        table["router"] |= {"num_groups": 1, "groups_per_token": 1}
        if isinstance(router, GroupLimitedConfig):
            plain = {"kind": "softmax_topk", "normalize_gates": False}
            left = {key: value for key, value in table["router"].items() if key not in GroupsConfig.model_fields}
            table["router"] = {**left, **plain}
    return table


def _rope(rope: RopeConfig, dim: int) -> dict[str, Any]:
    """One spelling of each rotation: NTK is a larger base, Llama 3's is its frequencies, a factor of 1 is idle."""
    table: dict[str, Any] = rope.model_dump()
    scaling = rope.scaling
    if scaling is not None and scaling.factor == 1:
        return {**table, "scaling": None}
    if isinstance(scaling, NTKScaling):
        return {**table, "theta": scaling.scaled_theta(rope.theta, dim), "scaling": None}
    if isinstance(scaling, Llama3Scaling):
        plain = rope.theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        frequencies = scaling.inverse_frequencies(plain, rope.theta)
        kept = torch.equal(frequencies, plain)  # all turn often enough within the original context
        table["scaling"] = None if kept else {"kind": scaling.kind, "frequencies": frequencies.tolist()}
    return table


def _differences(where: str, ours: Any, theirs: Any, tolerance: float) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in {**ours, **theirs}:
            yield from _differences(f"{where}.{key}".lstrip("."), ours.get(key), theirs.get(key), tolerance)
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            yield f"{where}: {len(ours)} of them ({len(theirs)} there)"
        for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from _differences(f"{where}.{index}", one, other, tolerance)
    elif not _equal(ours, theirs, tolerance):
        yield f"{where} {_shown(ours)} ({_shown(theirs)} there)"


def _equal(ours: Any, theirs: Any, tolerance: float) -> bool:
    numbers = [type(value) in (int, float) for value in (ours, theirs)]
    return math.isclose(ours, theirs, rel_tol=tolerance) if all(numbers) else bool(ours == theirs)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
