"""Tensors that are cut over processes: the piece that lies here, and the whole."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

# Gathering a tensor that is cut twice takes two collectives, of which torch would warn at every checkpoint.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or this process's piece of it, into `target`; nobody else is asked.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != whole.shape:
        raise ValueError(f"shape {tuple(whole.shape)} does not go into {tuple(target.shape)}")
    if isinstance(target, DTensor):
        target.to_local().copy_(piece(whole, target))
    else:
        target.copy_(whole)


def piece(whole: Tensor, like: DTensor) -> Tensor:
    """What lies here of a tensor that is cut as `like` is.

    Cuts in the order in which they were made: experts first whole over processes, then FSDP's, which a strided shard
    says.
    """
    mesh = like.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # every process of a run is in its meshes
    cuts = [(at, one) for at, one in enumerate(like.placements) if not isinstance(one, Replicate)]
    cuts.sort(key=lambda cut: isinstance(cut[1], _StridedShard))
    for at, placement in cuts:
        assert isinstance(placement, Shard | _StridedShard)
        pieces = torch.chunk(whole, mesh.size(at), dim=placement.dim)
        mine = coordinate[at]
        whole = pieces[mine] if mine < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All pieces together, on every process: a meeting point where `tensor` is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
