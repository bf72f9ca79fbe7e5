"""Few tokens through whole blocks in one native call.

What a block computes with is collected once and then kept: anew for every token it would take longer than the
arithmetic of a small model. Whatever was exchanged since is noticed, and the block is asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finemoe.model.attention.places import Places
from finemoe.model.backend import Backend
from finemoe.model.moe.decision import RoutingRecord

_SAYS_HOW = ("training", "dispatch", "form")
"""Attributes of modules, beside what they hold, on which it depends how they compute."""


class Parts:
    """What a block and its cache compute with, by kind, each in the order in which C++ uses it."""

    def __init__(self, block: nn.Module, found: Sequence[Any] | None) -> None:
        """`found`: tensors, numbers and None; None as a whole where the block has to go operation by operation."""
        self._possible = found is not None
        found = found or ()
        self.tensors = [part for part in found if part is None or isinstance(part, Tensor)]
        self.reals = [part for part in found if isinstance(part, float)]
        self.integers = [int(part) for part in found if isinstance(part, int)]
        modules = list(block.modules())
        self._hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        holders: list[dict[str, Any]] = [
            held for one in modules for held in (one._parameters, one._buffers, one._modules)
        ]
        seen = [(held, name, value) for held in holders for name, value in held.items()]
        own = [one.__dict__ for one in modules]
        seen += [(held, name, held[name]) for held in own for name in _SAYS_HOW if name in held]
        self._seen = tuple(zip(*seen, strict=True))

    @property
    def still_hold(self) -> bool:
        """Whether nothing was exchanged since."""
        held, names, values = self._seen
        return all(map(is_, map(dict.get, held, names), values))

    @property
    def usable(self) -> bool:
        """Whether C++ can compute with them, and nobody wants to see, or to change, what passes a module."""
        return self._possible and not any(self._hooks)


class _Block(Protocol):
    """What is asked of a block here."""

    backend: Backend
    routes: bool

    def parts(self, cache: Any) -> Parts: ...

    def where(self, places: Places) -> tuple[Tensor | None, ...] | None: ...


def in_one_call(
    blocks: Sequence[_Block], hidden: Tensor, places: Places, cache: Sequence[Any]
) -> tuple[Tensor, list[RoutingRecord | None]] | None:
    """`hidden [batch, seq, hidden]` of few tokens through `blocks`; None where that cannot be.

    Returns what comes out, and of each block what it routed.
    """
    decode = blocks[0].backend.decode if blocks else None
    if decode is None or torch.is_grad_enabled() or not decode.takes(hidden):
        return None
    tensors: list[Tensor | None] = []
    stands: list[Tensor | None] = []
    integers: list[int] = []
    reals: list[float] = []
    for block, layer in zip(blocks, cache, strict=True):
        parts, where = block.parts(layer), block.where(places)
        if where is None or not parts.usable:
            return None
        tensors += parts.tensors
        integers += parts.integers
        reals += parts.reals
        stands += where
    found = decode.blocks(places.apart(hidden), len(blocks), tensors, integers, reals, stands)
    if not found:
        return None
    chosen, none = iter(zip(found[1::2], found[2::2], strict=True)), torch.zeros((), dtype=torch.int64)
    routed = [_record(*next(chosen), none) if block.routes else None for block in blocks]
    return found[0].view_as(hidden), routed


def _record(counts: Tensor, expert_ids: Tensor, dropped: Tensor) -> RoutingRecord:
    return RoutingRecord(counts, dropped, {}, None, expert_ids=expert_ids)
