"""What comes to the same bits in C++ and in torch, so that there is nothing to choose, and C++ runs wherever it can.

Moving and ordering round nothing, and the optimizer's update rounds each operation as torch does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finemoe.model.native import available, usable
from finemoe.model.native.attention import store as native_store


def top_k(scores: Tensor, k: int) -> Tensor:
    """Ids `[tokens, k]` of the largest of `scores [tokens, experts]`, largest first. In C++, of equals the first."""
    if not usable(scores):
        return scores.topk(k, dim=-1).indices
    chosen = torch.empty(len(scores), k, dtype=torch.int64)
    torch.ops.finemoe.top_k(scores.contiguous(), chosen)
    return chosen


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments `expert_ids [tokens, k]` sorted by expert, stably.

    Returns order [tokens · k], slots [tokens · k] (its inverse) and counts [experts].
    """
    flat = expert_ids.reshape(-1).contiguous()  # one column of a wider tensor stays a view
    if type(flat) is not Tensor or flat.device.type != "cpu" or not available():  # such as fake ones, of shapes alone
        order = flat.argsort(stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=flat.device)
        return order, slots, flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    order, slots = torch.empty_like(flat), torch.empty_like(flat)
    counts = flat.new_empty(num_experts)
    torch.ops.finemoe.sort_by_expert(flat, order, slots, counts)
    return order, slots, counts


def store(states: Tensor, positions: Tensor, cache: Tensor) -> None:
    """Write `states [batch, heads, seq, width]` into `cache [batch, heads, capacity, width]` at [batch, seq] places."""
    if usable(states, cache) and not states.requires_grad:
        native_store(states, positions, cache)
    else:
        cache.scatter_(2, positions[:, None, :, None].expand_as(states), states.to(cache.dtype))


def store_in_blocks(
    states: Tensor, positions: Tensor, index: Tensor, blocks: Tensor, places: Tensor, store: Tensor
) -> None:
    """Write `states [sequences, heads, seq, width]` into `store [blocks, heads, size, width]`, in the store's type.

    `positions`, `blocks` and `places`, all `[sequences, seq]`: within the sequence, and of which block which row;
    `index` as in `native.attention.in_blocks`.
    """
    if usable(states, store) and not states.requires_grad:
        native_store(states, positions, store, index)
    else:
        bits(store)[blocks, :, places] = bits(states.transpose(1, 2).to(store.dtype).contiguous())


def adamw_step(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Sequence[float]) -> bool:
    """AdamW's update in place, where C++ takes these tensors; whether it did.

    Args:
        weight, gradient: of one shape, in float32.
        first, second: moments of that shape, in bfloat16.
        numbers: keep, beta1, beta2, eps, rate and root of `training.adamw.Step`, whose `advance` is the plain path.
    """
    whole = all(one.is_contiguous() for one in (weight, gradient, first, second))
    if not whole or not usable(weight, gradient):
        return False
    torch.ops.finemoe.adamw(weight, gradient, first, second, *numbers)
    return True


_BITS = {1: torch.uint8, 2: torch.int16}


def bits(states: Tensor) -> Tensor:
    """The same memory in a type that can be indexed: not every narrow one can, everywhere."""
    kind = _BITS.get(states.element_size())
    return states if kind is None else states.view(kind)
