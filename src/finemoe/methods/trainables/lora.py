"""Low-rank adaptation (LoRA, Hu et al., arXiv 2106.09685): every adapted matrix is W0 + alpha/rank · B A.

A and B are what the optimizer steps. The model computes with the sum at all times, so everything that opens, measures
or serves a model works on a run of this kind as on any other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, final

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from finemoe.checkpoint.adapters.low_rank import EXPERTS, A, B, merged, stack_name
from finemoe.checkpoint.selection import ExpertSelection, read_selection
from finemoe.checkpoint.weights.shapes import model_shapes
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.core.seeds import generator
from finemoe.methods.setting import Held, Kept, Setting, TrainableConfig
from finemoe.methods.trainables.experts import compare
from finemoe.methods.trainables.parts import PARTS, matches
from finemoe.model.size import measure
from finemoe.model.transformer import Transformer
from finemoe.training.method import Group, Method, Saved, Selected

_MATRICES = ("attention", "shared_experts", "experts", "dense")
_DEFAULT = ("attention", "shared_experts", "experts")
_STACK = ".feed_forward.experts."


class LoRAConfig(TrainableConfig):
    """Matrices of small rank, added to matrices that stay as they are."""

    kind: Literal["lora"] = "lora"
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = _DEFAULT
    """What is adapted: the matrices in attention, shared_experts, experts or dense; or globs of parameter names. As
    nothing is said, of the first three those that the model has."""
    rank: PositiveInt = 8
    """[rank] Of each adapter; of experts not where they share `expert_rank_budget`."""
    alpha: PositiveFloat = 16.0
    """[factor] What B A is multiplied by, times the adapter's rank."""
    selection: str | None = None
    """The file that `finemoe analyze relevance MODEL --out FILE` writes: experts that are not in it get no adapter."""
    expert_rank_budget: PositiveInt | None = None
    """[rank] Sum over the experts of a layer, given out in proportion to their relevance in `selection`."""

    @property
    def moves_routers(self) -> bool:
        """Routers stay as they are, and their biases too."""
        return False

    def held(self, shapes: Mapping[str, tuple[int, ...]], setting: Setting) -> Held:
        """Factors, and what the matrices were before: the sums are made of both after every update."""
        plan = _planned(self, setting, shapes.__contains__)
        factors = copies = 0
        for name, found in plan.ranks.items():
            outer, inner = shapes[name][-2:]
            for rank, chosen in found.items():
                several = len(chosen) or 1
                factors += several * rank * (outer + inner)
                copies += several * outer * inner
        return Held(
            stepped=factors,
            passing=max(math.prod(shapes[name]) for name in plan.ranks),
            kept=(
                Kept("the low-rank factors", 4 * factors, "a lower trainable.rank"),
                Kept("what they are added to, a second time", 4 * copies, "fewer trainable.targets"),
            ),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.expert_rank_budget is not None and self.selection is None:
            raise ValueError("expert_rank_budget is shared by relevance: name the file that says it as `selection`")
        return self


def share_ranks(scores: Sequence[float], budget: int) -> list[int]:
    """`budget` in whole ranks, in proportion to `scores` by largest remainders; of equal ones the first gets more."""
    scores = scores if sum(scores) else [1.0] * len(scores)
    exact = [budget * score / sum(scores) for score in scores]
    ranks = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(scores)), key=lambda one: ranks[one] - exact[one])
    for one in by_remainder[: budget - sum(ranks)]:
        ranks[one] += 1
    return ranks


@dataclass(frozen=True)
class _Part:
    """One pair of factors, and where their product belongs."""

    weight: nn.Parameter
    base: Tensor
    """What `weight`, or these experts of it, was when the run began."""
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    experts: Tensor | None

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Add to the gradients of both factors what follows from the weight's: dA = s Bᵀ G and dB = s G Aᵀ."""
        own = gradient if self.experts is None else gradient[self.experts]
        for factor, found in ((self.a, self.b.mT @ own), (self.b, own @ self.a.mT)):
            found = self.scale * found
            factor.grad = found if factor.grad is None else factor.grad + found

    @torch.no_grad()
    def put(self) -> None:
        """Write the sum where the model computes with it."""
        weight = merged(self.base, self.a, self.b, self.scale)
        if self.experts is None:
            self.weight.copy_(weight)
        else:
            self.weight[self.experts] = weight


@final
class LowRankFactors:
    """A and B of every target, which stand in for it."""

    def __init__(
        self, config: LoRAConfig, ranks: Mapping[str, Mapping[int, tuple[int, ...]]], setting: Setting
    ) -> None:
        """Of each weight its ranks: `{rank: experts}`, of which a matrix has one with no experts."""
        self._alpha, self._ranks = config.alpha, ranks
        self._seed, self._start = setting.seed, setting.start_from
        self._parts: dict[str, _Part] = {}
        self._sha256 = ""

    def __call__(self, model: Transformer, selected: list[Selected]) -> list[Selected]:
        """As in `training.method.StandIn`."""
        made = []
        for one in selected:
            parts = {}
            for rank, chosen in self._ranks.get(one.name, {}).items():
                name = stack_name(one.name, rank) if chosen else one.name
                parts[name] = self._part(one.parameter, name, rank, chosen)
            one.parameter.register_post_accumulate_grad_hook(_into(tuple(parts.values())))
            for name, part in parts.items():
                made += [Selected(name + A, part.a, one.group), Selected(name + B, part.b, one.group)]
            self._parts |= parts
        self._sha256 = self._fingerprint()
        return made

    def _part(self, weight: nn.Parameter, name: str, rank: int, chosen: tuple[int, ...]) -> _Part:
        experts = torch.tensor(chosen, device=weight.device) if chosen else None
        base = weight.detach().clone() if experts is None else weight.detach()[experts]
        *stack, outer, inner = base.shape
        # uniform up to 1 / sqrt(in): what PEFT's Kaiming draw with a = sqrt(5) comes to
        drawn = torch.rand((*stack, rank, inner), generator=generator(self._seed, "lora", name), dtype=base.dtype)
        a = nn.Parameter(((2 * drawn - 1) / math.sqrt(inner)).to(base.device))
        b = nn.Parameter(base.new_zeros(*stack, outer, rank))
        return _Part(weight, base, a, b, self._alpha / rank, experts)

    def after_update(self, model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        """Put the sums where the model computes with them."""
        for part in self._parts.values():
            part.put()

    def state(self) -> Saved:
        """The factors, the experts that they belong to, alpha, and what tells the base from another."""
        tensors: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            tensors |= {name + A: part.a.detach(), name + B: part.b.detach()}
            if part.experts is not None:
                tensors[name + EXPERTS] = part.experts
        return Saved(tensors, {"alpha": self._alpha, "base_sha256": self._sha256})

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Take the factors; the model holds the sums already.

        Raises:
            CheckpointError: the model at `start_from`, or the selection of experts, is not what the run began with.
        """
        for name, part in self._parts.items():
            if name + A not in saved.tensors or _listed(saved.tensors.get(name + EXPERTS)) != _listed(part.experts):
                raise CheckpointError(
                    f"the adapters of {name} are not those that were saved: trainable.selection does not name the "
                    "experts any more that this run began with; put the file back, or start a new run"
                )
        if saved.values["base_sha256"] != self._sha256:
            raise CheckpointError(
                f"start_from {self._start} does not hold the weights any more that this run began with, and its "
                "adapters are nothing without them: put them back, or start a new run"
            )
        for name, part in self._parts.items():
            part.a.copy_(saved.tensors[name + A])
            part.b.copy_(saved.tensors[name + B])

    def _fingerprint(self) -> str:
        """sha256 of what the targets were when the run began."""
        digest = hashlib.sha256()
        for name, part in sorted(self._parts.items()):
            digest.update(f"{name}{tuple(part.base.shape)}{part.base.dtype}".encode())
            digest.update(part.base.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _listed(experts: Tensor | None) -> list[int] | None:
    return None if experts is None else experts.tolist()


def _into(parts: tuple[_Part, ...]) -> Any:
    """Turn a weight's gradient into those of its factors, as soon as it is there."""

    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        for part in parts:
            part.take(weight.grad)
        weight.grad = None

    return move


def build(config: LoRAConfig, method: Method[Any], setting: Setting) -> Method[Any]:
    """`method` that moves nothing but low-rank adapters.

    Raises:
        ConfigError: there is no model to adapt, a target is no matrix of it, or the selection does not fit.
    """
    plan = _planned(config, setting, lambda name: method.select(name) is not None)
    factors = LowRankFactors(config, plan.ranks, setting)

    def select(name: str) -> Group | None:
        return method.select(name) if name in plan.ranks else None

    prepare = () if plan.selection is None else (compare(str(config.selection), plan.selection),)
    return replace(
        method,
        select=select,
        prepare=(*method.prepare, *prepare),
        stand_ins=(*method.stand_ins, factors),
        keeps_base=True,
        after_update=(*method.after_update, factors.after_update),
        state={**method.state, "lora": factors},
        notes=(*method.notes, _note(plan.ranks, plan.shapes, setting)),
    )


@dataclass(frozen=True)
class _Planned:
    """What is adapted, before there is a model."""

    ranks: Mapping[str, Mapping[int, tuple[int, ...]]]
    """By weight: `{rank: experts}`, of which a matrix has one with no experts."""
    shapes: Mapping[str, tuple[int, ...]]
    selection: ExpertSelection | None


def _planned(config: LoRAConfig, setting: Setting, trains: Callable[[str], bool]) -> _Planned:
    """`trains`: whether the method would train the parameter of that name.

    Raises:
        ConfigError: as `build`.
    """
    if setting.start_from is None:
        raise ConfigError('trainable.kind "lora" adapts a trained model: name it as start_from')
    shapes = model_shapes(setting.model)
    targets = [name for name in _targets(config, shapes) if trains(name)]
    selection = None
    if config.selection is not None:
        if not any(_STACK in name for name in targets):
            raise ConfigError("trainable.selection is set, and no target is a stack of experts: leave it out")
        selection = read_selection(Path(config.selection), setting.model)
    ranks = {name: found for name in targets if (found := _ranks(config, name, shapes[name], selection))}
    if not ranks:
        raise ConfigError("trainable.targets: nothing is left to adapt; name more of them")
    return _Planned(ranks, shapes, selection)


def _targets(config: LoRAConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The parameters that are adapted.

    Raises:
        ConfigError: a target matches nothing, or what is no matrix.
    """
    chosen: dict[str, None] = {}
    for one in config.targets:
        found = [name for name in shapes if matches(name, (one,))]
        fitting = [name for name in found if len(shapes[name]) > 1 and matches(name, _MATRICES)]
        fitting = [name for name in fitting if ".shared_gate." not in name]  # it routes
        if one in PARTS and one not in _MATRICES:
            raise ConfigError(f"trainable.targets: {one!r} cannot be adapted: use {', '.join(_MATRICES)}, or globs")
        if not found and one in _DEFAULT and config.targets == _DEFAULT:
            continue
        if not found:
            raise ConfigError(
                f"trainable.targets: {one!r} matches no parameter of the model: use {', '.join(_MATRICES)}, or a glob "
                "such as 'blocks.0.attention.*_proj.weight'"
            )
        if one not in PARTS and len(fitting) < len(found):
            wrong = next(name for name in found if name not in fitting)
            raise ConfigError(
                f"trainable.targets: {one!r} matches {wrong}, which is no matrix of attention or of a feed-forward "
                "layer: name matrices alone"
            )
        chosen |= dict.fromkeys(fitting)
    return list(chosen)


def _ranks(
    config: LoRAConfig, name: str, shape: tuple[int, ...], selection: ExpertSelection | None
) -> dict[int, tuple[int, ...]]:
    """Of one weight: which experts have which rank; of a matrix its rank, and no experts."""
    if _STACK not in name:
        return {config.rank: ()}
    if selection is None:
        return {config.rank: tuple(range(shape[0]))}
    if not name.startswith("blocks."):
        return {}  # relevance is of the main model's experts
    layers = {one.layer: one for one in selection.layers}
    one = layers.get(int(name.split(".")[1]))
    if one is None or not one.experts:
        return {}
    if config.expert_rank_budget is None:
        return {config.rank: tuple(sorted(one.experts))}
    ranks = dict(zip(one.experts, share_ranks(one.scores, config.expert_rank_budget), strict=True))
    return {rank: tuple(sorted(e for e in ranks if ranks[e] == rank)) for rank in sorted(set(ranks.values())) if rank}


def _note(
    ranks: Mapping[str, Mapping[int, tuple[int, ...]]], shapes: Mapping[str, tuple[int, ...]], setting: Setting
) -> str:
    matrices = count = 0
    for name, found in ranks.items():
        for rank, experts in found.items():
            several = len(experts) or 1
            matrices += several
            count += several * rank * sum(shapes[name][-2:])
    share = count / measure(setting.model, 1).total_parameters
    return (
        f"trained: low-rank adapters of {matrices:,} matrices, {count:,} parameters ({share:.1%} of the model's); all "
        "else stays as it is, routers and their biases too"
    )
