"""The arms of a comparison, sized from one standard feed-forward layer (DeepSeekMoE sections 4.1 to 4.4).

Everything is counted in standard FFNs: a mixture holds `total_multiple` of them (16 in the paper) and a token passes
through `active` of them (1 for Hash and Switch, `active_multiple` = 2 for GShard and DeepSeekMoE). Segmentation by m
makes experts m times narrower and m times more; s of those slots become shared experts that are always on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from finemoe.core.config import Config, did_you_mean, parse, read_toml
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig, ModelRecipe, expand
from finemoe.model.feed_forward import DenseConfig
from finemoe.model.presets import PRESETS, resolve
from finemoe.model.size import measure
from finemoe.training.balancing import BalancingConfig


class MatchingConfig(Config):
    """What "matched" means."""

    total_multiple: PositiveInt = 16
    """[standard FFNs] Feed-forward weights of a mixture."""
    active_multiple: PositiveInt = 2
    """[standard FFNs] What a token passes through in GShard and DeepSeekMoE."""
    segments: PositiveInt = 4
    """[segments] m of DeepSeekMoE's fine-grained segmentation."""


class RoutingConfig(Config):
    """Settings that every learned router of the comparison shares."""

    balance: NonNegativeFloat = 0.01
    """[coefficient] Expert-level balance loss, alpha_1."""
    normalize_gates: bool = False
    """Divide the chosen gates by their sum."""
    route_scale: PositiveFloat = 1.0
    """[factor] Multiply the gates, after any normalisation."""
    capacity_factor: PositiveFloat | None = None
    """[times] None: dropless, as the paper's own baselines."""
    hash_table: Literal["random", "balanced"] = "random"
    """How Hash Layer assigns token ids: drawn evenly, or by how often they occur."""


@dataclass(frozen=True)
class Arm:
    """One architecture, in units of standard FFNs; None stands for the comparison's own multiple."""

    label: str
    dense: float | None = None
    """Width of a dense arm; 0 means the total multiple."""
    active: int | None = None
    segments: int | None = 1
    shared: int = 0
    width: float = 1.0
    """Experts this much wider, which also scales the totals."""
    halve_routed: bool = False
    """Activate half of the expert parameters (section 4.5)."""
    router: str = "softmax_topk"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the router, where they are not the comparison's."""
    balance: Mapping[str, float] | None = None
    """Balance coefficients; None: the comparison's expert-level one for routers that learn."""
    fixed_bias: bool = False
    """Selection biases stay at 0, so that losses alone balance."""
    mtp_depth: int = 0
    paper: tuple[str, float] | None = None
    """Name in the paper and its Pile loss (Tables 1, 2 and section 4.4)."""


_V3: Mapping[str, Any] = {"segments": None, "shared": 1, "settings": {"normalize_gates": True}}
"""What the arms of V3's balancing ablation share (V3 section 4.5.2): sigmoid scores, gates over their sum."""

ARMS: Mapping[str, Arm] = {
    "dense": Arm("Dense", dense=1.0, paper=("Dense", 2.060)),
    "hash": Arm("Hash Layer", active=1, router="hash_layer", paper=("Hash Layer", 1.932)),
    "switch": Arm("Switch", active=1, paper=("Switch", 1.881)),
    "gshard": Arm("GShard", paper=("GShard", 1.867)),
    "deepseek-moe": Arm("DeepSeekMoE", segments=None, shared=1, paper=("DeepSeekMoE", 1.808)),
    "dense-x4": Arm("Dense x4", dense=4.0, paper=("Dense x4", 1.908)),
    "dense-x16": Arm("Dense x total", dense=0.0, paper=("Dense x16", 1.806)),
    "gshard-x1.2": Arm("GShard x1.2", width=1.2, paper=("GShard x1.2", 1.824)),
    "gshard-x1.5": Arm("GShard x1.5", width=1.5, paper=("GShard x1.5", 1.808)),
    "shared-isolation": Arm("1 + 1/15", shared=1),
    "segments-2": Arm("1 + 3/31", shared=1, segments=2),
    "deepseek-moe-2-shared": Arm("2 + 6/62", segments=None, shared=2, paper=("2 shared", 1.806)),
    "deepseek-moe-4-shared": Arm("4 + 4/60", segments=None, shared=4, paper=("4 shared", 1.811)),
    "deepseek-moe-half": Arm("1 + 3/63", segments=None, shared=1, halve_routed=True),
    "deepseek-moe-mtp": Arm("DeepSeekMoE, MTP", segments=None, shared=1, mtp_depth=1),
    "sigmoid-loss": Arm(
        "Sigmoid, loss 1e-3", router="sigmoid_biased", balance={"sequence": 1e-3}, **_V3, fixed_bias=True
    ),
    "sigmoid-loss-strong": Arm(
        "Sigmoid, loss 1e-2", router="sigmoid_biased", balance={"sequence": 1e-2}, **_V3, fixed_bias=True
    ),
    "sigmoid-bias": Arm("Sigmoid, bias", router="sigmoid_biased", balance={}, **_V3),
}
"""The ablation ladder of Figure 3 is gshard (0 + 2/16), shared-isolation (1 + 1/15), segments-2 (1 + 3/31) and
deepseek-moe (1 + 7/63)."""


@dataclass(frozen=True)
class SizedArm:
    """An arm with its model and how far it is from what was asked for."""

    name: str
    label: str
    model: ModelConfig
    routing: str
    mismatch: Mapping[str, float | None]
    """Percent by which expert parameters (total, active) and FLOPs miss their targets; None without a target."""
    paper: tuple[str, float] | None
    balancing: BalancingConfig | None = None
    """How selection biases move, where that is not the default."""

    @property
    def folder(self) -> str:
        """Its name as one folder name: a recipe's path has slashes."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-.")


def solve(name: str, base: ModelRecipe, matching: MatchingConfig, routing: RoutingConfig, seq_len: int) -> SizedArm:
    """Size the arm `name` from `base`, whose dense feed-forward layer is the standard FFN.

    `name` is one of ARMS, a preset, or the path of a recipe. Of the last two the model is taken as it is; the rest of
    a recipe (data, training, optimizer ...) must not be there, because the comparison sets it for all arms.

    Raises:
        ConfigError: an unknown arm, or multiples that leave it without routed experts.
    """
    if name not in ARMS:
        return _foreign(name, base)
    arm = ARMS[name]
    standard = base.feed_forward.ffn_hidden_size
    if arm.dense is not None:
        multiple = arm.dense or matching.total_multiple
        feed_forward: dict[str, Any] = {"kind": "dense", "ffn_hidden_size": round(multiple * standard)}
        targets = (multiple, multiple)
        text = "one FFN" if multiple == 1 else f"{multiple:g} FFNs, all on"
    else:
        feed_forward, text = _mixture(name, arm, standard, matching, routing)
        active = (arm.active or matching.active_multiple) * arm.width
        targets = (matching.total_multiple * arm.width, active / 2 if arm.halve_routed else active)
    tables = {**base.model_dump(), "feed_forward": feed_forward, "mtp_depth": base.mtp_depth or arm.mtp_depth}
    model = expand(parse(ModelRecipe, tables, f"arm `{name}`"))
    mismatch = _mismatch(model, expand(base), targets, seq_len)
    if arm.mtp_depth:  # it costs more, and is meant to: what it buys is the question
        mismatch = {**mismatch, "flops_percent": None}
    balancing = BalancingConfig(rate=0.0) if arm.fixed_bias else None
    return SizedArm(name, arm.label, model, text, mismatch, arm.paper, balancing)


def _mixture(
    name: str, arm: Arm, standard: int, matching: MatchingConfig, routing: RoutingConfig
) -> tuple[dict[str, Any], str]:
    segments = arm.segments or matching.segments
    slots = (arm.active or matching.active_multiple) * segments
    active = (slots // 2 if arm.halve_routed else slots) - arm.shared
    routed = matching.total_multiple * segments - arm.shared
    if not 1 <= active <= routed:
        raise ConfigError(
            f"arm `{name}`: {matching.active_multiple} x {segments} active and {matching.total_multiple} x {segments} "
            f"total slots less {arm.shared} shared leave {active} of {routed} routed experts; raise "
            "matching.active_multiple or matching.total_multiple"
        )
    learned = arm.router != "hash_layer"
    router = (
        {"normalize_gates": routing.normalize_gates, "route_scale": routing.route_scale}
        if learned
        else {"table": routing.hash_table}
    )
    balance = {"expert": routing.balance if learned else 0.0} if arm.balance is None else arm.balance
    text = f"{arm.shared} + {active} of {routed}"
    return {
        "kind": "moe",
        "num_shared_experts": arm.shared,
        "num_routed_experts": routed,
        "experts_per_token": active,
        "expert_hidden_size": max(1, round(standard * arm.width / segments)),
        "router": {"kind": arm.router, **router, **arm.settings},
        "balance": balance,
        "capacity_factor": routing.capacity_factor,
    }, text


def _foreign(name: str, base: ModelRecipe) -> SizedArm:
    if name in PRESETS:
        recipe = resolve({"preset": name}, name)
    elif Path(name).suffix == ".toml":
        tables = read_toml(name)
        if set(tables) - {"name"} != {"model"}:
            others = ", ".join(sorted(set(tables) - {"name", "model"})) or "nothing"
            raise ConfigError(f"{name} as an arm must hold [model] only, and holds {others} besides")
        recipe = resolve(tables["model"], name)
    else:
        known = [*ARMS, *PRESETS]
        raise ConfigError(f"unknown arm `{name[:60]}`{did_you_mean(name, known)}")
    if recipe.vocab_size != base.vocab_size:
        raise ConfigError(
            f"arm `{name}` has vocab_size {recipe.vocab_size}, the comparison's base {base.vocab_size}: "
            "losses per token compare only under one tokenizer"
        )
    feed_forward = recipe.feed_forward
    text = "dense"
    if not isinstance(feed_forward, DenseConfig):
        shared, routed = feed_forward.num_shared_experts, feed_forward.num_routed_experts
        text = f"{shared} + {feed_forward.experts_per_token} of {routed}"
    mismatch = dict.fromkeys(("total_percent", "active_percent", "flops_percent"))
    return SizedArm(name, Path(name).stem, expand(recipe), text, mismatch, None)


def _mismatch(
    model: ModelConfig, base: ModelConfig, targets: tuple[float, float], seq_len: int
) -> dict[str, float | None]:
    size, standard = measure(model, seq_len), measure(base, seq_len)
    total, active = (target * standard.expert_parameters for target in targets)
    flops = standard.training_flops_per_token + 6 * (active - standard.expert_parameters)
    return {
        "total_percent": 100 * (size.expert_parameters / total - 1),
        "active_percent": 100 * (size.active_expert_parameters / active - 1),
        "flops_percent": 100 * (size.training_flops_per_token / flops - 1),
    }
