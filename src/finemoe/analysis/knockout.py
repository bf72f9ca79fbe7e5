"""What the model loses without some of its experts: the experiments of DeepSeekMoE section 4.5, and finer ones.

Every experiment is a table of `Variation`s of the routing; `sweep` runs them. Losses are in nats per token. Nothing is
trained again: the model meets each constraint for the first time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from finemoe.analysis.knockout_time import announce, passes
from finemoe.analysis.passages import Passages, require_experts
from finemoe.analysis.sweep import Sweep, Variation, estimate, intact, record, sweep, without_experts
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.config import did_you_mean
from finemoe.core.errors import ConfigError
from finemoe.core.logs import logger
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.layer import MoEConfig

FRACTIONS = (1 / 16, 2 / 16, 3 / 16, 4 / 16)
DEFAULT_PAIRS = 8
_MOST_EXPERTS = 4096
PAPER: Mapping[str, Any] = {
    "source": "DeepSeekMoE, arXiv 2401.06066, section 4.5: the 2B model of Table 1 (7 of 63 routed experts and 1 "
    "shared, 100B tokens), loss on the Pile; masked and active are read off Figures 4 and 5",
    "masked": {
        "DeepSeekMoE": {"0": 1.808, "1": 7.468, "2": 8.196, "3": 8.706, "4": 9.071},
        "GShard×1.5": {"0": 1.808, "1": 5.586, "2": 7.518, "3": 7.627, "4": 7.721},
    },
    "active": {"3": 1.956, "4": 1.868, "5": 1.831, "6": 1.814, "7": 1.808},
    "active_gshard": 1.867,
    "shared": {"intact": 1.808, "replaced": 2.414},
}
"""What the paper prints. `masked` by sixteenths left out, `active` by routed experts a token."""


@dataclass(frozen=True)
class _Asked:
    """What every experiment is given."""

    opened: LanguageModel
    passages: Sequence[Passages]
    rows: int
    progress: bool
    layers: tuple[int, ...] | None
    experts: tuple[int, ...] | None
    fractions: tuple[float, ...]
    counts: tuple[int, ...] | None
    pairs: int

    def run(self, variations: Sequence[Variation], description: str) -> Sweep:
        """`sweep`, with the progress that was asked for."""
        said = description if self.progress else None
        return sweep(self.opened, self.passages, variations, rows=self.rows, description=said)


def moe_configs(opened: LanguageModel) -> dict[int, MoEConfig]:
    """The MoE layers of the main model, without those of multi-token prediction.

    Raises:
        ConfigError: there are none.
    """
    require_experts(opened)
    blocks = len(opened.model.blocks)
    return {number: layer.config for number, layer in opened.model.moe_layers.items() if number < blocks}


# ---- the paper's three, for whoever has a model and passages ----


def masked_losses(
    opened: LanguageModel, passages: Sequence[Passages], fractions: Sequence[float] = FRACTIONS, *, rows: int = 4
) -> list[dict[str, Any]]:
    """Figure 4: for every token, leave out the given fractions of the experts it would choose first, in all layers.

    A fraction of 0 is the intact model, any other leaves out at least one expert. Each record has `fraction`, label,
    constraint, loss, difference, by_domain and intact (the loss without constraint).

    Raises:
        ConfigError: a dense model, routers that do not choose by score, or a fraction that leaves too few experts.
    """
    return _records(opened, passages, [_masked(opened, fraction) for fraction in fractions], rows)


def active_losses(
    opened: LanguageModel, passages: Sequence[Passages], counts: Sequence[int], *, rows: int = 4
) -> list[dict[str, Any]]:
    """Figure 5: the given numbers of routed experts a token, in all layers. Each record has `count` and the losses.

    Raises:
        ConfigError: a dense model, or a number that some layer cannot activate.
    """
    return _records(opened, passages, [_active(opened, count) for count in counts], rows)


def without_shared(
    opened: LanguageModel, passages: Sequence[Passages], *, replaced: bool = True, rows: int = 4
) -> dict[str, Any]:
    """The loss without the shared experts; `replaced`: as many more routed experts are active, for the same FLOPs.

    Raises:
        ConfigError: no layer has shared experts, or there are too few routed ones to take their place.
    """
    return _records(opened, passages, [_without_shared(opened, replaced=replaced)], rows)[0]


def _records(
    opened: LanguageModel, passages: Sequence[Passages], variations: Sequence[Variation], rows: int
) -> list[dict[str, Any]]:
    found = sweep(opened, passages, variations, rows=rows)
    whole = intact(found)["loss"]
    return [record(found, number) | {"intact": whole} for number in range(len(variations))]


def _masked(opened: LanguageModel, fraction: float) -> Variation:
    if not 0 <= fraction < 1:
        raise ConfigError(f"fraction {fraction}: must be at least 0 and below 1")
    constraint, used = {}, set()
    for layer, config in moe_configs(opened).items():
        if not config.router.learned or not fraction:
            continue
        experts, masked = config.num_routed_experts, max(1, int(config.num_routed_experts * fraction + 0.5))
        if experts - masked < config.experts_per_token:
            raise ConfigError(
                f"layer {layer}: without {masked} of its {experts} routed experts there are fewer left than the "
                f"{config.experts_per_token} that each token takes"
            )
        constraint[layer] = RoutingConstraint(num_masked=masked)
        used.add(f"{masked} of {experts}")
    if not constraint and fraction:
        raise ConfigError(
            "these routers choose by a fixed table and score nothing: there are no experts a token would choose next"
        )
    label = f"top {fraction * 16:g}/16 left out ({', '.join(sorted(used))})" if constraint else "intact"
    return Variation(label, constraint, {"fraction": fraction})


def _active(opened: LanguageModel, count: int) -> Variation:
    constraint = {}
    configs = moe_configs(opened)
    for layer, config in configs.items():
        most = config.num_routed_experts if config.router.learned else config.experts_per_token
        if not 1 <= count <= most:
            raise ConfigError(f"layer {layer}: {count} active routed experts, and it can have 1 to {most}")
        if count != config.experts_per_token:
            constraint[layer] = RoutingConstraint(num_active=count)
    label = f"{count} active" + ("" if constraint else " (as trained)")
    return Variation(label, constraint, {"count": count})


def _without_shared(opened: LanguageModel, *, replaced: bool) -> Variation:
    constraint = {}
    for layer, config in moe_configs(opened).items():
        if not config.num_shared_experts:
            continue
        active = config.experts_per_token + config.num_shared_experts if replaced else None
        if active is not None and active > config.num_routed_experts:
            raise ConfigError(
                f"layer {layer}: {config.num_routed_experts} routed experts, too few to activate {active}"
            )
        constraint[layer] = RoutingConstraint(shared=False, num_active=active)
    if not constraint:
        raise ConfigError("this model has no shared experts")
    label = "shared experts out, as many more routed ones active" if replaced else "shared experts out"
    return Variation(label, constraint, {"replaced": replaced})


# ---- the experiments ----


def run_experiments(
    opened: LanguageModel,
    passages: Sequence[Passages],
    experiments: Sequence[str] | None = None,
    *,
    rows: int = 4,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    counts: Sequence[int] | None = None,
    pairs: int = DEFAULT_PAIRS,
    progress: bool = True,
) -> dict[str, Any]:
    """Run experiments and gather their records; Ctrl-C keeps those that are finished.

    Args:
        opened: the model.
        passages: the text, from `read_passages`.
        experiments: names of EXPERIMENTS; all when None.
        rows: windows in one forward pass.
        layers: for `experts`, `pairs` and `layers`: only these. Default: all, but one for `pairs`, the middle one.
        experts: for `experts` and `pairs`: only these.
        fractions: for `masked`.
        counts: for `active`; half to two more than trained when None.
        pairs: how many of a layer's most used experts are paired.
        progress: show it on stderr.

    Returns:
        `experiments` (by name: records, notes, work), `intact`, `skipped` (name -> reason), `complete`, and `paper`.

    Raises:
        ConfigError: a dense model, an unknown name, layer or expert, or nothing that can be run.
    """
    names = list(dict.fromkeys(EXPERIMENTS if experiments is None else experiments))
    chosen = None if layers is None else tuple(dict.fromkeys(layers))
    picked = None if experts is None else tuple(dict.fromkeys(experts))
    wanted = None if counts is None else tuple(counts)
    asked = _Asked(opened, passages, rows, progress, chosen, picked, tuple(fractions), wanted, pairs)
    _check(asked, names)
    if progress:
        _announce(asked, names)
    results: dict[str, Any] = {"experiments": {}, "skipped": {}, "intact": None, "complete": True, "paper": PAPER}
    try:
        for name in names:
            try:
                made, found = EXPERIMENTS[name](asked)
            except ConfigError as reason:
                results["skipped"][name] = str(reason)
                logger.info("%s is left out: %s", name, reason)
                continue
            results["intact"] = results["intact"] or intact(found)
            results["experiments"][name] = made
    except KeyboardInterrupt:
        results["complete"] = False
    if results["complete"] and not results["experiments"]:
        raise ConfigError("nothing to knock out: " + "; ".join(f"{n}: {why}" for n, why in results["skipped"].items()))
    return results


def check_names(names: Sequence[str] | None) -> None:
    """Whether these are names of experiments.

    Raises:
        ConfigError: one is not, or there are none.
    """
    for name in names or ():
        if name not in EXPERIMENTS:
            raise ConfigError(f"unknown experiment `{name}`{did_you_mean(name, list(EXPERIMENTS))}")
    if names is not None and not names:
        raise ConfigError(f"no experiment is named; known: {', '.join(EXPERIMENTS)}")


def _check(asked: _Asked, names: Sequence[str]) -> None:
    configs = moe_configs(asked.opened)
    check_names(names)
    for layer in asked.layers or ():
        if layer not in configs:
            known = ", ".join(map(str, configs))
            raise ConfigError(f"layer {layer} has no routed experts; the MoE layers of this model are {known}")
    most = min(configs[layer].num_routed_experts for layer in asked.layers or configs)
    for expert in asked.experts or ():
        if not 0 <= expert < most:
            raise ConfigError(f"expert {expert} does not exist: they are numbered 0 to {most - 1}")
    if asked.rows < 1:
        raise ConfigError(f"a batch of {asked.rows} windows cannot be read: it takes at least 1")
    if asked.pairs < 2:
        raise ConfigError(f"pairs {asked.pairs}: at least 2 experts make a pair")


def _announce(asked: _Asked, names: Sequence[str]) -> None:
    configs = moe_configs(asked.opened)
    chosen = {layer: configs[layer] for layer in asked.layers or configs}
    picked = None if asked.experts is None else len(asked.experts)
    planned = passes(names, chosen, layers=len(asked.layers or (0,)), experts=picked, pairs=asked.pairs)
    announce(asked.opened, asked.passages, planned, asked.rows)


def _experiment_masked(asked: _Asked) -> tuple[dict[str, Any], Sweep]:
    variations, notes = _possible([partial(_masked, asked.opened, fraction) for fraction in asked.fractions])
    unscored = [layer for layer, config in moe_configs(asked.opened).items() if not config.router.learned]
    if unscored:
        notes.append(f"layers {', '.join(map(str, unscored))} choose by a fixed table and were left as they are")
    found = asked.run(variations, "masking the best experts")
    return _gathered(found, notes), found


def _experiment_shared(asked: _Asked) -> tuple[dict[str, Any], Sweep]:
    makers = [partial(_without_shared, asked.opened, replaced=replaced) for replaced in (True, False)]
    variations, notes = _possible(makers)
    found = asked.run(variations, "without shared experts")
    return _gathered(found, notes), found


def _experiment_active(asked: _Asked) -> tuple[dict[str, Any], Sweep]:
    configs = moe_configs(asked.opened).values()
    trained = max(config.experts_per_token for config in configs)
    counts = asked.counts
    if counts is None:
        most = min(c.num_routed_experts if c.router.learned else c.experts_per_token for c in configs)
        counts = tuple(range(max(1, trained // 2), min(most, trained + 2) + 1))
    variations, notes = _possible([partial(_active, asked.opened, count) for count in counts])
    found = asked.run(variations, "other numbers of experts")
    return _gathered(found, notes) | {"trained": trained}, found


def _experiment_experts(asked: _Asked) -> tuple[dict[str, Any], Sweep]:
    configs = moe_configs(asked.opened)
    variations: list[Variation] = []
    notes: list[str] = []
    for layer in asked.layers or configs:
        if (number := configs[layer].num_routed_experts) < 2:
            notes.append(f"layer {layer} has a single routed expert: see the experiment `layers`")
            continue
        variations += [_left_out(asked.opened, layer, (e,)) for e in asked.experts or range(number)]
    if not variations:
        raise ConfigError("no layer has more than one routed expert")
    if len(variations) > _MOST_EXPERTS:
        raise ConfigError(f"{len(variations)} experts, one pass each: pick fewer than {_MOST_EXPERTS} with --layer")
    found = asked.run(variations, "leaving out each expert")
    made = _gathered(found, notes)
    for one in made["records"]:
        load = found.load[one["layer"]]
        one["share"] = float(load[one["expert"]] / load.sum())
    return made, found


def _experiment_pairs(asked: _Asked) -> tuple[dict[str, Any], Sweep]:
    configs = moe_configs(asked.opened)
    layers = asked.layers or (list(configs)[len(configs) // 2],)
    usage = asked.run([], "counting").load
    plan: dict[int, list[int]] = {}
    variations = []
    for layer in layers:
        used = usage[layer].argsort(kind="stable")[::-1].tolist()
        experts = sorted(asked.experts or used[: asked.pairs])
        if len(experts) < 2 or configs[layer].num_routed_experts < 3:
            raise ConfigError(f"layer {layer}: pairs need two experts and a third that stays")
        plan[layer] = experts
        groups = [(e,) for e in experts] + list(itertools.combinations(experts, 2))
        variations += [_left_out(asked.opened, layer, group) for group in groups]
    found = asked.run(variations, "leaving out pairs")
    sums = {(v.about["layer"], v.left_out[1]): s for v, s in zip(variations, found.losses, strict=True) if v.left_out}
    made = _gathered(found, [])
    singles = [one for one in made["records"] if "expert" in one]
    records = [one for one in made["records"] if "experts" in one]
    for one in records:
        layer, (i, j) = one["layer"], one["experts"]
        joint = sums[layer, (i, j)] - sums[layer, (i,)] - sums[layer, (j,)] + found.intact
        one["interaction"] = estimate(joint, found.weights, found.domains)
    return {**made, "records": records, "singles": singles, "experts": {str(k): v for k, v in plan.items()}}, found


def _experiment_layers(asked: _Asked) -> tuple[dict[str, Any], Sweep]:
    configs = moe_configs(asked.opened)
    variations = []
    for layer in asked.layers or configs:
        parts = {"routed": RoutingConstraint(routed=False)}
        if configs[layer].num_shared_experts:
            parts["shared"] = RoutingConstraint(shared=False)
            parts["both"] = RoutingConstraint(routed=False, shared=False)
        for part, constraint in parts.items():
            about = {"layer": layer, "part": part}
            variations.append(Variation(f"layer {layer}, {_PARTS[part]} out", {layer: constraint}, about))
    found = asked.run(variations, "leaving out layers")
    return _gathered(found, []), found


_PARTS = {"routed": "routed experts", "shared": "shared experts", "both": "routed and shared experts"}
EXPERIMENTS: dict[str, Callable[[_Asked], tuple[dict[str, Any], Sweep]]] = {
    "masked": _experiment_masked,
    "shared": _experiment_shared,
    "active": _experiment_active,
    "experts": _experiment_experts,
    "pairs": _experiment_pairs,
    "layers": _experiment_layers,
}


def _left_out(opened: LanguageModel, layer: int, experts: tuple[int, ...]) -> Variation:
    names = " and ".join(map(str, experts))
    about = {"expert": experts[0]} if len(experts) == 1 else {"experts": list(experts)}
    constraint = {layer: without_experts(opened, layer, experts)}
    return Variation(f"layer {layer}, expert {names} out", constraint, {"layer": layer, **about}, (layer, experts))


def _possible(makers: Sequence[Callable[[], Variation]]) -> tuple[list[Variation], list[str]]:
    """The variations that can be made, and why the others cannot.

    Raises:
        ConfigError: none can.
    """
    made, reasons = [], []
    for make in makers:
        try:
            made.append(make())
        except ConfigError as error:
            reasons.append(str(error))
    notes = list(dict.fromkeys(reasons))
    if not made:
        raise ConfigError("; ".join(notes))
    return made, notes


def _gathered(found: Sweep, notes: list[str]) -> dict[str, Any]:
    return {"records": [record(found, n) for n in range(len(found.variations))], "notes": notes, "work": found.work}
