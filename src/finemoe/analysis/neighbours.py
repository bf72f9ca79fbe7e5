"""How alike the experts of a layer are: by their weights, and by the directions that their router looks for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finemoe.model.moe.layer import MoELayer

Floats = NDArray[np.float64]


def weight_likeness(layer: MoELayer) -> Floats:
    """[experts, experts] cosine of the experts' flattened weights less their mean; NaN on the diagonal.

    Hidden units stand in any order, so experts that grew from different draws have a cosine near 0 whatever they
    compute: a high one says that they have a common origin.
    """
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    return _cosines(_products(gate_up, gate_up) + _products(down, down))


def centroid_likeness(layer: MoELayer) -> Floats | None:
    """[experts, experts] cosine of the router's centroids less their mean: whether two experts want the same tokens.

    None for a router that learns nothing.
    """
    if not layer.config.router.learned:
        return None
    weight: Tensor = layer.router.weight
    return _cosines(_products(weight, weight))


def matched(first: MoELayer, second: MoELayer, least: float = 0.9) -> tuple[list[int], float]:
    """For each expert of `second` the one of `first` that has its weights, as after pruning, and the lowest cosine.

    The list is empty where that is no pairing: two want the same one, or the lowest cosine is below `least`.
    """
    names = ("gate_up_proj", "down_proj")
    ours, theirs = (dict(layer.experts.named_parameters()) for layer in (first, second))
    cross = sum(_products(theirs[name], ours[name]) for name in names)
    lengths = [np.sqrt(sum(np.diag(_products(table[name], table[name])) for name in names)) for table in (theirs, ours)]
    cosine = cross / np.maximum(np.outer(*lengths), np.finfo(np.float64).tiny)
    nearest = cosine.argmax(axis=1)
    lowest = float(cosine.max(axis=1).min())
    paired = lowest >= least and len(set(nearest.tolist())) == len(nearest)
    return ([int(i) for i in nearest] if paired else []), lowest


@torch.inference_mode()
def _products(first: Tensor, second: Tensor) -> Floats:
    """Every row of `first`, flattened, times every row of `second`; a slice at a time, summed in float64."""
    rows, columns = first.detach().flatten(1), second.detach().flatten(1)
    total = np.zeros((len(rows), len(columns)))
    step = 1 << 16
    for start in range(0, rows.shape[1], step):
        part = slice(start, start + step)
        total += (rows[:, part].float() @ columns[:, part].float().t()).double().cpu().numpy()
    return total


def _cosines(products: Floats) -> Floats:
    """Cosines of rows less their mean, from the rows' inner products: those are centred without a copy of the rows."""
    across = products.mean(axis=0)
    centred = products - across[None, :] - across[:, None] + across.mean()
    length = np.sqrt(np.maximum(np.diag(centred), 0))
    cosine = np.full(products.shape, np.nan)
    norms = np.outer(length, length)
    np.divide(centred, norms, out=cosine, where=norms > 0)
    np.fill_diagonal(cosine, np.nan)
    return np.clip(cosine, -1, 1)
