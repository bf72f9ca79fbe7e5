"""A model's weights spread over processes: experts whole, then everything by FSDP2; pieces of tensors and the whole."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout
from finemoe.parallel.expert import AllToAll, DistributedExperts
from finemoe.parallel.world import Parts, require_shape

# Gathering a tensor that is cut twice takes two collectives, of which torch would warn at every checkpoint.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

_BUNDLE_BYTES = 16 << 20
"""Of whole tensors that are gathered at once, unless one is larger by itself: little beside the weights of a model."""


def spread(
    model: Transformer, layout: Layout, dense: DeviceMesh, routed: DeviceMesh, products: torch.dtype | None = None
) -> None:
    """Keep this process's pieces of a model that is whole here, in place.

    Gradients are summed and never averaged: losses are divided by counts of the whole step.

    Args:
        model: alike on all processes.
        layout: of the run.
        dense: replicate and fsdp, for weights that every token meets.
        routed: replicate, expert_shard and expert, for routed experts; the same processes.
        products: what autocast computes products in; None: as the weights are.
    """
    if layout.expert > 1:
        place_experts(model, routed["expert"])
    if layout.fsdp > 1:
        experts = _data(routed, "expert_shard", layout.replicate) if layout.expert > 1 else None
        cut(model, _data(dense, "fsdp", layout.replicate), experts, products)


def place_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Keep those routed experts that lie here, whole; `mesh`: one dimension, the processes that share a layer's."""
    for layer in model.moe_layers.values():
        layer.dispatch = AllToAll(mesh.get_group(), mesh.size())
        layer.experts = DistributedExperts(layer.experts, mesh)  # type: ignore[assignment]


def cut(model: Transformer, mesh: DeviceMesh, experts: DeviceMesh | None, products: torch.dtype | None = None) -> None:
    """Spread weights by FSDP2 over `mesh`, and those of routed experts that were placed over `experts`.

    `products` as in `spread`.
    """
    # Nothing here writes into what a module returned, view or not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if experts is not None or products is not None:
        # Experts are products alone: gathered as these take them they are the same numbers in half the bytes, and no
        # copy waits for the backward pass. The rest has norms, routers and the residual stream in it: float32.
        narrow = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=products and torch.float32)
        for layer in model.moe_layers.values():
            fully_shard(layer.experts, mesh=mesh if experts is None else experts, mp_policy=narrow)
    for block in (*model.blocks, *(module.block for module in model.mtp)):
        if next(block.parameters(), None) is not None:  # of a pipeline, what lies on another stage has none  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    for module in pieces(model):
        module.set_gradient_divide_factor(1.0)
        # gloo cannot multiply while it sums, which is how the factor would be applied
        module.set_force_sum_reduction_for_comms(True)


def settle(model: nn.Module) -> None:
    """Give weights back that an evaluation left whole on every process: what is saved are the pieces."""
    for module in pieces(model):
        module.reshard()


def pieces(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose weights are cut together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def _data(mesh: DeviceMesh, across: str, copies: int) -> DeviceMesh:
    """The processes that weights are cut over, and those that hold copies of the pieces."""
    return mesh["replicate", across] if copies > 1 else mesh[across]


@torch.no_grad()
def put(target: Tensor, whole: Parts) -> None:
    """Copy `whole`, or this process's piece of it, into `target`; nobody else is asked.

    Raises:
        ValueError: the shapes differ.
    """
    require_shape(target, whole)
    if isinstance(target, DTensor):
        target.to_local().copy_(whole[rows(target)])
    else:
        target.copy_(whole[...])


def local(tensor: Tensor) -> Tensor:
    """What lies here, in the same memory: the tensor itself where it was not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows(tensor: DTensor) -> slice:
    """Which rows of the whole tensor lie here; everything that is cut is cut by rows.

    Cuts in the order in which they were made: experts first whole over processes, then FSDP's, which a strided shard
    says.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every process of a run is in its meshes
    cuts = [(at, one) for at, one in enumerate(tensor.placements) if not isinstance(one, Replicate)]
    cuts.sort(key=lambda cut: isinstance(cut[1], _StridedShard))
    first, count = 0, tensor.shape[0]
    for at, placement in cuts:
        assert isinstance(placement, Shard | _StridedShard)
        assert placement.dim == 0
        each = -(-count // mesh.size(at))  # as torch.chunk does: the last ones may get less, or nothing
        skipped = min(each * coordinate[at], count)
        first, count = first + skipped, min(each, count - skipped)
    return slice(first, first + count)


@torch.no_grad()
def wholes(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """All pieces of each together, in their order, on every process: a meeting point where one is cut."""
    for some in _bundles(tensors):
        if (cut := _even(some[0])) is None:
            yield from (one.full_tensor() if isinstance(one, DTensor) else one for one in some)
        else:
            yield from _together([one for one in some if isinstance(one, DTensor)], *cut[:2])


def _bundles(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those that follow one another and are cut alike: an exchange costs a millisecond however little it carries."""
    found: list[Tensor] = []
    for one in tensors:
        full = sum(other.nbytes for other in found) + one.nbytes > _BUNDLE_BYTES
        if found and (full or _even(one) is None or _even(one) != _even(found[0])):
            yield found
            found = []
        found.append(one)
    if found:
        yield found


def _even(tensor: Tensor) -> tuple[DeviceMesh, int, torch.dtype] | None:
    """How it is cut, where that is once, over one dimension of its mesh, and every process there has as many rows."""
    if not isinstance(tensor, DTensor):
        return None
    cuts = [at for at, one in enumerate(tensor.placements) if not isinstance(one, Replicate)]
    if len(cuts) != 1 or type(tensor.placements[cuts[0]]) is not Shard:
        return None
    if tensor.shape[0] % tensor.device_mesh.size(cuts[0]):
        return None
    return tensor.device_mesh, cuts[0], tensor.dtype


def _together(tensors: list[DTensor], mesh: DeviceMesh, dim: int) -> Iterator[Tensor]:
    """In one exchange, without the plan of many that a DTensor makes first."""
    own = torch.cat([one.to_local().flatten() for one in tensors])
    came = own.new_empty(mesh.size(dim), len(own))
    dist.all_gather(list(came), own, group=mesh.get_group(dim))
    at = 0
    for one in tensors:
        each = one.numel() // mesh.size(dim)
        yield came[:, at : at + each].reshape(one.shape)
        at += each
