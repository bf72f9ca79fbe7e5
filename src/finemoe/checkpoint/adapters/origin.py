"""The model that an adapter was made on: found again when the adapter is written, to be told from any other later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finemoe.checkpoint.adapters.delta import apply_delta
from finemoe.checkpoint.adapters.low_rank import merged, read_low_rank
from finemoe.checkpoint.adapters.tuned import Base, Tuned
from finemoe.checkpoint.fingerprint import weights_fingerprint
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import FinemoeError
from finemoe.core.logs import logger
from finemoe.model.transformer import Transformer

_CLOSE = 1e-5
"""Of the largest weight: a run on a GPU adds in another order."""


def base_of_run(tuned: Tuned, model: Transformer, delta: Mapping[str, Tensor] | None) -> Base:
    """What names the base of a run; with all of its weights, where `start_from` still holds the model that was tuned.

    It does where putting in what was tuned gives the tuned model. Otherwise a warning says what nobody can check later.

    Args:
        tuned: of the run.
        model: of the same run.
        delta: the tuned experts; None: the run has low-rank adapters.
    """
    known = Base.of(model)
    start = tuned.start_from
    try:
        base = load_model(start, dtype=None) if start is not None else None
    except (FinemoeError, OSError):
        base = None
    if base is not None and Base.of(base) == known and _gives(tuned, base.state_dict(), model.state_dict(), delta):
        return known.model_copy(update={"weights_sha256": weights_fingerprint(base)})
    logger.warning(
        "start_from %s does not hold the model any more that this run began with: the adapter will go into any model "
        "of its shape that has the same routers and embeddings",
        start,
    )
    return known


def _gives(
    tuned: Tuned, base: Mapping[str, Tensor], wanted: Mapping[str, Tensor], delta: Mapping[str, Tensor] | None
) -> bool:
    """Whether the base becomes the tuned model, but for its prediction modules."""
    changed: dict[str, Tensor] = {}
    if delta is not None:
        try:
            changed = apply_delta(delta, base, "")
        except FinemoeError:
            return False
    else:
        for one in read_low_rank(tuned.tensors):
            if one.weight not in base:
                return False
            at: Any = () if one.experts is None else one.experts
            whole = changed.setdefault(one.weight, base[one.weight].to(torch.float32, copy=True))
            whole[at] = merged(whole[at], one.a, one.b, tuned.values["alpha"] / one.rank)
    for name, tensor in wanted.items():
        if name.startswith("mtp."):
            continue
        if name not in base or base[name].shape != tensor.shape:
            return False
        found = changed.get(name, base[name]).to(tensor.dtype)
        if name not in changed:
            if not torch.equal(found, tensor):
                return False
        elif (found - tensor).abs().max() > _CLOSE * tensor.abs().max():
            return False
    return True
