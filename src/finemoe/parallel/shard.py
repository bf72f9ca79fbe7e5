"""A model's weights spread over processes: experts whole, then everything by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from finemoe.model.transformer import Transformer
from finemoe.parallel.expert import AllToAll, DistributedExperts
from finemoe.parallel.processes import Processes


def spread(model: Transformer, world: Processes) -> Transformer:
    """Keep this process's pieces of a model that is whole here, in place.

    Gradients are summed and never averaged: losses are divided by counts of the whole step.
    """
    layout = world.layout
    if layout.expert > 1:
        mesh = world.routed["expert"]
        for layer in model.moe_layers.values():
            layer.dispatch = AllToAll(mesh.get_group(), layout.expert)
            layer.experts = DistributedExperts(layer.experts, mesh)  # type: ignore[assignment]
    if not world.sharded:
        return model
    dense = _data(world.dense, "fsdp", layout.replicate)
    if layout.expert > 1:
        routed = _data(world.routed, "expert_shard", layout.replicate)
        for layer in model.moe_layers.values():
            fully_shard(layer.experts, mesh=routed)
    for block in (*model.blocks, *(module.block for module in model.mtp)):
        fully_shard(block, mesh=dense)  # type: ignore[arg-type]
    fully_shard(model, mesh=dense)
    for module in pieces(model):
        module.set_gradient_divide_factor(1.0)
        # gloo cannot multiply while it sums, which is how the factor would be applied
        module.set_force_sum_reduction_for_comms(True)
    return model


def settle(model: nn.Module) -> None:
    """Give weights back that an evaluation left whole on every process: what is saved are the pieces."""
    for module in pieces(model):
        module.reshard()


def pieces(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose weights are cut together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def _data(mesh: DeviceMesh, cut: str, copies: int) -> DeviceMesh:
    """The processes that weights are cut over, and those that hold copies of the pieces."""
    return mesh["replicate", cut] if copies > 1 else mesh[cut]
