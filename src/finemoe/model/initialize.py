"""Drawing the first weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finemoe.core.seeds import generator
from finemoe.model.moe.layer import MoELayer
from finemoe.model.norm import RMSNorm
from finemoe.model.transformer import Transformer


@torch.no_grad()
def initialize(
    model: Transformer,
    seed: int,
    token_frequencies: Callable[[], Tensor] | None = None,
    put: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Draw every weight from a normal of `config.init_std`, norms at 1, selection biases at 0, hash tables by rule.

    Each tensor has a random stream of its own name: models that share a tensor's name and shape share its first value,
    whatever else differs, so that arms of a comparison start as alike as they can.

    Args:
        model: any fresh model.
        seed: of the run.
        token_frequencies: gives [vocab] counts of the training text; called for balanced hash tables only.
        put: copies what was drawn, a whole tensor at a time, into a parameter that may be a piece of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            router: Any = module.router
            router.reset(generator(seed, "hash", f"{name}.router"), token_frequencies)
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if isinstance(module, RMSNorm):
                nn.init.ones_(parameter)
            elif isinstance(module, nn.Linear) and parameter is module.bias:
                nn.init.zeros_(parameter)
            else:
                drawn = torch.empty(parameter.shape).normal_(
                    0.0, model.config.init_std, generator=generator(seed, "init", key)
                )
                put(parameter, drawn)
