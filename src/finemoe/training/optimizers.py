"""Optimizers: a config, a function and a line each. The trainer sets the rate and steps; it knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.core.config import Config, union_of
from finemoe.core.logs import logger
from finemoe.parallel.world import SOLO, Parts
from finemoe.training.adamw import LARGEST_BETA, MOMENTS, AdamWOfPieces, CompactAdamW
from finemoe.training.method import Group, Selected
from finemoe.training.muon import Muon

Beta = Annotated[float, Field(ge=0, lt=1)]
ROWS = ".rows"
"""Behind the name of a stack: some of its matrices, which are trained in its place."""
RATE_FACTOR = "learning_rate_factor"
"""In every group of parameters: what the learning rate of the step is multiplied by."""


class AdamWConfig(Config):
    """AdamW as in all the papers up to V3; the learning rate is the peak of the schedule."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat
    """[per step] The peak of the schedule. 0.004 suits a hidden size of 64; larger models want less (papers: 1.08e-3 at
    1280)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """[share] How much of the running means of gradients and of their squares stays from step to step."""
    eps: PositiveFloat = 1e-8
    """[added] To the root of the squares, against a division by zero."""
    weight_decay: NonNegativeFloat = 0.1
    """[per rate] Matrices shrink by learning rate times this at every step; norms do not."""
    max_gradient_norm: PositiveFloat = 1.0
    """[norm] Longer gradients are scaled down to it."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What the two running means are kept in. bf16, as DeepSeek-V3 trains: 4 bytes a parameter instead of 8, computed
    with in float32 and rounded to nearest; neither of `betas` may be above 0.996 then, as rounding would hold a mean
    so slow where it is. Weights and gradients are in float32 either way."""

    @property
    def state_bytes(self) -> int:
        """[bytes] Of both moments, a parameter."""
        return 4 if self.moments == "bf16" else 8

    @property
    def most_state_bytes(self) -> int:
        """[bytes] The same: no parameter has more."""
        return self.state_bytes

    @property
    def may_be_smaller(self) -> bool:
        """Whether `moments` could be bf16 and is not."""
        return self.moments == "fp32" and max(self.betas) <= LARGEST_BETA

    @model_validator(mode="after")
    def _check(self) -> Self:
        slow = [beta for beta in self.betas if beta > LARGEST_BETA]
        if self.moments == "bf16" and slow:
            raise ValueError(
                f'moments = "bf16" keeps 8 bits of a number, in which a mean with a beta of {slow[0]:g} stands still '
                f"where it should fall, as each step's change is rounded away: make betas {LARGEST_BETA:.3f} or less "
                '(DeepSeek-V3 has 0.9 and 0.95), or moments = "fp32"'
            )
        return self


class MuonConfig(Config):
    """Muon for matrices, AdamW for embedding, head and vectors: as DeepSeek-V4 trains (its report, section 4.2)."""

    kind: Literal["muon"] = "muon"
    learning_rate: PositiveFloat
    """[per step] Of both: an update of Muon is scaled to the size of one of AdamW."""
    momentum: Beta = 0.95
    """[share] How much of the running mean of gradients stays from step to step."""
    update_rms: PositiveFloat = 0.18
    """[root mean square] That an update is scaled to, before the learning rate."""
    iterations: PositiveInt = 5
    """[iterations] Of Newton and Schulz."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """[share] Of AdamW, like `eps`."""
    eps: PositiveFloat = 1e-8
    """[added] To the root of AdamW's squares, against a division by zero."""
    weight_decay: NonNegativeFloat = 0.1
    """[per rate] Matrices shrink by learning rate times this at every step; norms do not."""
    max_gradient_norm: PositiveFloat = 1.0
    """[norm] Longer gradients are scaled down to it."""

    @property
    def state_bytes(self) -> int:
        """[bytes] Of a matrix's momentum, a parameter."""
        return 4

    @property
    def most_state_bytes(self) -> int:
        """[bytes] Of AdamW's two moments, a parameter of those that are no matrix."""
        return 8

    @property
    def may_be_smaller(self) -> bool:
        """Not by a key."""
        return False


Local = Callable[[Tensor], Tensor]


def _adamw(config: AdamWConfig, selected: Sequence[Selected], local: Local) -> tuple[torch.optim.Optimizer, ...]:
    groups = _groups(selected, config.weight_decay)
    if not groups:
        return ()
    rest: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "local": local}
    if config.moments == "bf16":
        return (CompactAdamW(groups, learning_rate=config.learning_rate, **rest),)
    if any(local(one.parameter) is not one.parameter for one in selected):
        return (AdamWOfPieces(groups, learning_rate=config.learning_rate, **rest),)
    # fused: one pass over the weights instead of a dozen
    return (torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True),)


def _muon(config: MuonConfig, selected: Sequence[Selected], local: Local) -> tuple[torch.optim.Optimizer, ...]:
    matrices = [one for one in selected if one.parameter.ndim >= 2 and one.name not in _NO_MATRIX]
    rest = [one for one in selected if one.parameter.ndim < 2 or one.name in _NO_MATRIX]
    groups = [
        {**group, "stacked": stacked}
        for stacked in (1, 2)
        for group in _groups([one for one in matrices if _stacked(one.name) == stacked], config.weight_decay)
    ]
    fields = {"learning_rate", "betas", "eps", "weight_decay", "max_gradient_norm"}
    others = _adamw(AdamWConfig(**config.model_dump(include=fields)), rest, local)
    if not groups:
        return others
    made = Muon(
        groups,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        update_rms=config.update_rms,
        iterations=config.iterations,
    )
    return (made, *others)


_NO_MATRIX = ("embedding.weight", "head.weight")
"""Tables of vectors, one a token: their rows have nothing to be orthogonal to."""


def _stacked(name: str) -> int:
    """Matrices that lie above each other in one: gate above up, in the experts."""
    return 2 if name.removesuffix(ROWS).endswith("gate_up_proj") else 1


def _groups(selected: Sequence[Selected], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay, vectors (norms) do not; each by its factors."""
    groups: dict[tuple[Group, bool], list[nn.Parameter]] = {}
    for decays in (True, False):
        for one in selected:
            if (one.parameter.ndim >= 2) == decays:
                groups.setdefault((one.group, decays), []).append(one.parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay * group.weight_decay if decays else 0.0,
            RATE_FACTOR: group.learning_rate,
        }
        for (group, decays), parameters in groups.items()
    ]


_Build = Callable[[Any, Sequence[Selected], Local], tuple[torch.optim.Optimizer, ...]]
OPTIMIZERS: dict[str, tuple[type[Config], _Build]] = {
    "adamw": (AdamWConfig, _adamw),
    "muon": (MuonConfig, _muon),
}
OptimizerConfig: Any = union_of((config for config, _ in OPTIMIZERS.values()), default="adamw")


def build_optimizers(
    config: Any, selected: Sequence[Selected], local: Local = SOLO.local
) -> tuple[torch.optim.Optimizer, ...]:
    """What steps `selected`: one or several, each over parameters of its own; none where nothing is selected.

    Args:
        config: a configuration of OPTIMIZERS.
        selected: the parameters, by name.
        local: of a tensor that is cut over processes, the piece that lies here.
    """
    return OPTIMIZERS[config.kind][1](config, selected, local)


def optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizers' state by `parameter name/state name`, for a checkpoint."""
    return {
        f"{name}/{key}": value
        for name, (optimizer, parameter) in _owners(optimizers, parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Parts],
    put: Callable[[Tensor, Parts], object] = SOLO.put,
) -> None:
    """Put back what `optimizer_tensors` gave; `put(target, whole)` where parameters are cut over processes.

    Moments that were saved in another type than the optimizer keeps them in are converted, and the log says so.

    Raises:
        ValueError: a tensor belongs to no parameter.
    """
    left = dict(tensors)
    converted: set[tuple[torch.dtype, torch.dtype]] = set()
    for name, (optimizer, parameter) in _owners(optimizers, parameters):
        keys = [key for key in left if key.rpartition("/")[0] == name]
        state = optimizer.state[parameter] = {}
        for key in keys:
            whole = left.pop(key)
            if whole.shape == parameter.shape:
                kept: torch.dtype = optimizer.defaults.get(MOMENTS, parameter.dtype)
                state[key.rpartition("/")[2]] = like = torch.zeros_like(parameter, dtype=kept)
                put(like, whole)
                converted |= {(whole.dtype, kept)} - {(kept, kept)}
            else:
                state[key.rpartition("/")[2]] = whole[...].to(parameter.device, copy=True)
    if left:
        raise ValueError(f"optimizer state of unknown parameters: {sorted(left)[:3]}")
    for before, after in converted:
        logger.warning(
            "the optimizer's moments were saved in %s and go on in %s, as optimizer.moments says now",
            *(str(dtype).removeprefix("torch.") for dtype in (before, after)),
        )


def _owners(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, tuple[torch.optim.Optimizer, nn.Parameter]]]:
    """Each parameter by name, with the optimizer that steps it."""
    owner = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in parameters.items():
        yield name, (owner[id(parameter)], parameter)
