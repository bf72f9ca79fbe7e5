"""The claims of the papers that `finemoe paper` tests: what was printed, and which of our figures speak to it.

DeepSeekMoE (2401.06066) sections 4.2 to 4.5, DeepSeek-V3 (2412.19437) Tables 4 and 5, Loss-Free Balancing (2408.15664).
A claim sets one quantity against another, seed by seed, so that a seed's luck falls out of the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from finemoe.studies.statistics import Relation

Kind = Literal["loss", "training", "max_vio", "masked", "masked_rise", "active", "without_shared"]
"""Of an arm: its held-out loss, its loss over the last steps of training, its MaxVio on held-out text, its loss with
the best experts of every token masked (and how much that is above its own), with fewer active experts, without its
shared experts but with as many routed more."""


@dataclass(frozen=True)
class Quantity:
    """One figure of every finished run of an arm."""

    arm: str
    kind: Kind = "loss"
    setting: float = 0.0
    """`masked`, `masked_rise`: share of the routed experts masked; `active`: of the active ones kept.

    0 masked and all active are the intact model on the text of the knock-outs, which is not that of `loss`: figures are
    compared on one text only."""

    @property
    def needs_knockout(self) -> bool:
        """Whether it takes more than the run's summary."""
        return self.kind not in ("loss", "training", "max_vio")


@dataclass(frozen=True)
class Claim:
    """`a` stands to `b` in `relation`."""

    id: str
    statement: str
    source: str
    """Table, figure or section."""
    printed: str
    """The paper's own figures for the same."""
    a: Quantity
    b: Quantity
    relation: Relation = "lower"
    printed_difference: float | None = None
    """`a` - `b` where the paper gives both in the unit of ours."""

    @property
    def on_training_text(self) -> Claim | None:
        """The same of the loss over the last steps; None for claims about something else than two arms' losses.

        Text that is trained on for the first time is as unseen as held-out text until its step is over, two runs of one
        seed meet it in the same order, and there is more of it: it decides what held-out files leave open.
        """
        if not self.a.kind == self.b.kind == "loss":
            return None
        return replace(self, a=replace(self.a, kind="training"), b=replace(self.b, kind="training"))


@dataclass(frozen=True)
class Experiment:
    """One table, figure or section: what has to run for it."""

    title: str
    claims: tuple[Claim, ...]
    arms: tuple[str, ...] = ()
    """Arms that are shown beside those of the claims."""
    note: str = ""
    """What of the paper's version is missing, and why."""

    def quantities(self) -> Iterator[Quantity]:
        """Everything its claims compare."""
        for claim in self.claims:
            yield from (claim.a, claim.b)
            if (twin := claim.on_training_text) is not None:
                yield from (twin.a, twin.b)

    @property
    def all_arms(self) -> tuple[str, ...]:
        """Arms that must be trained, each once."""
        return tuple(dict.fromkeys([*self.arms, *(quantity.arm for quantity in self.quantities())]))


MARGIN = 0.01
"""Nats per token within which two losses count as equal: the paper calls 0.002 to 0.003 insignificant and prints three
decimals; a hundredth is what three seeds of a tiny model can hope to resolve."""

_OURS, _GSHARD, _LARGER = Quantity("deepseek-moe"), Quantity("gshard"), Quantity("gshard-x1.5")
_LOSS = "Pile loss"
_BENCHMARKS = "The paper's downstream scores are not repeated: models of this size answer them at chance."


def _pile(a: float, b: float) -> str:
    return f"{a:.3f} against {b:.3f}"


def _lower(id: str, statement: str, source: str, a: str, b: str, losses: tuple[float, float]) -> Claim:
    return Claim(
        id,
        statement,
        source,
        _pile(*losses),
        Quantity(a),
        Quantity(b),
        printed_difference=round(losses[0] - losses[1], 3),
    )


def _masked(fraction: int, ours: float, larger: float) -> Claim:
    share = fraction / 16
    return Claim(
        f"masked-{fraction}",
        f"Masking the top {fraction}/16 of the routed experts hurts DeepSeekMoE more than GShard x1.5",
        "Figure 4",
        f"rise of {ours - 1.808:.3f} against {larger - 1.808:.3f}",
        Quantity("deepseek-moe", "masked_rise", share),
        Quantity("gshard-x1.5", "masked_rise", share),
        "higher",
        round(ours - larger, 3),
    )


EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment(
        "Five architectures",
        (
            _lower("hash-dense", "Hash Layer is better than Dense", "Table 1", "hash", "dense", (1.932, 2.060)),
            _lower("switch-hash", "Switch is better than Hash Layer", "Table 1", "switch", "hash", (1.881, 1.932)),
            _lower("gshard-switch", "GShard is better than Switch", "Table 1", "gshard", "switch", (1.867, 1.881)),
            _lower(
                "ours-gshard", "DeepSeekMoE is better than GShard", "Table 1", "deepseek-moe", "gshard", (1.808, 1.867)
            ),
            _lower(
                "ours-dense", "DeepSeekMoE is better than Dense", "Table 1", "deepseek-moe", "dense", (1.808, 2.060)
            ),
        ),
        note=_BENCHMARKS,
    ),
    "table2": Experiment(
        "Larger GShard and dense models",
        (
            Claim(
                "ours-gshard-larger",
                "DeepSeekMoE matches GShard with 1.5 times the experts' size",
                "Table 2",
                _pile(1.808, 1.808),
                _OURS,
                _LARGER,
                "no_higher",
                0.0,
            ),
            _lower(
                "ours-dense-x4", "DeepSeekMoE is better than Dense x4", "Table 2", "deepseek-moe", "dense-x4",
                (1.808, 1.908),
            ),
            Claim(
                "ours-dense-x16",
                "DeepSeekMoE comes up to Dense x16, its upper bound",
                "Table 2",
                _pile(1.808, 1.806),
                _OURS,
                Quantity("dense-x16"),
                "no_higher",
                0.002,
            ),
            _lower(
                "dense-x4-dense", "Dense x4 is better than Dense", "Tables 1, 2", "dense-x4", "dense", (1.908, 2.060)
            ),
            _lower(
                "dense-x16-dense", "Dense x16 is better than Dense", "Tables 1, 2", "dense-x16", "dense", (1.806, 2.060)
            ),
        ),
        note=_BENCHMARKS,
    ),
    "figure3": Experiment(
        "Ablation ladder",
        (
            Claim(
                "isolation",
                "Isolating a shared expert helps: 1 + 1/15 is better than 0 + 2/16",
                "Figure 3",
                "HellaSwag 52.4 against 50.5, TriviaQA 14.1 against 10.2",
                Quantity("shared-isolation"),
                _GSHARD,
            ),
            Claim(
                "segments-2",
                "Finer segmentation helps: 1 + 3/31 is better than 1 + 1/15",
                "Figure 3",
                "HellaSwag 53.7 against 52.4, TriviaQA 15.5 against 14.1",
                Quantity("segments-2"),
                Quantity("shared-isolation"),
            ),
            Claim(
                "segments-4",
                "And again: 1 + 7/63 is better than 1 + 3/31",
                "Figure 3",
                "HellaSwag 54.8 against 53.7, TriviaQA 16.6 against 15.5",
                _OURS,
                Quantity("segments-2"),
            ),
        ),
        note="The paper gives downstream scores for this figure, no losses; ours are held-out losses.",
    ),
    "shared-ratio": Experiment(
        "Shared experts: 1, 2 or 4 of 64",
        (
            Claim(
                "two-shared",
                "2 shared experts make no difference to 1",
                "Section 4.4",
                _pile(1.806, 1.808),
                Quantity("deepseek-moe-2-shared"),
                _OURS,
                "equal",
                -0.002,
            ),
            Claim(
                "four-shared",
                "4 shared experts make no difference to 1",
                "Section 4.4",
                _pile(1.811, 1.808),
                Quantity("deepseek-moe-4-shared"),
                _OURS,
                "equal",
                0.003,
            ),
        ),
    ),
    "figure4": Experiment(
        "Masking the top routed experts, removing the shared one",
        (
            _masked(1, 7.468, 5.586),
            _masked(2, 8.196, 7.518),
            _masked(3, 8.706, 7.627),
            _masked(4, 9.071, 7.721),
            Claim(
                "without-shared",
                "Routed experts cannot replace the shared one: without it and with one routed more, loss rises",
                "Section 4.5",
                _pile(2.414, 1.808),
                Quantity("deepseek-moe", "without_shared"),
                Quantity("deepseek-moe", "masked"),
                "higher",
                0.606,
            ),
        ),
    ),
    "figure5": Experiment(
        "Fewer active routed experts",
        (
            Claim(
                "four-active",
                "With 4 of its 7 routed experts active DeepSeekMoE still matches GShard",
                "Figure 5",
                _pile(1.868, 1.867),
                Quantity("deepseek-moe", "active", 4 / 7),
                Quantity("gshard", "active", 1.0),
                "no_higher",
                0.001,
            ),
            Claim(
                "three-active",
                "With 3 it no longer does",
                "Figure 5",
                _pile(1.956, 1.867),
                Quantity("deepseek-moe", "active", 3 / 7),
                Quantity("gshard", "active", 1.0),
                "higher",
                0.089,
            ),
        ),
    ),
    "figure6": Experiment(
        "Half the activated experts, trained from scratch",
        (
            Claim(
                "half-gshard",
                "DeepSeekMoE with half the activated expert parameters, 1 + 3/63, is better than GShard",
                "Figure 6",
                "HellaSwag 51.9 against 50.5, TriviaQA 15.9 against 10.2",
                Quantity("deepseek-moe-half"),
                _GSHARD,
            ),
        ),
        note="The paper gives downstream scores for this figure, no losses; ours are held-out losses.",
    ),
    "v3-balance": Experiment(
        "DeepSeek-V3: balancing by biases or by a loss",
        (
            Claim(
                "bias-loss",
                "Balancing by selection biases costs less loss than a balance loss",
                "V3 Table 5",
                "Pile bits per byte .724 against .727",
                Quantity("sigmoid-bias"),
                Quantity("sigmoid-loss"),
            ),
        ),
        ("sigmoid-loss-strong",),
        "Sigmoid scores and normalised gates in all arms, as in V3; sequence-level loss of 0.001, and 0.01 beside it.",
    ),
    "v3-mtp": Experiment(
        "DeepSeek-V3: multi-token prediction",
        (
            Claim(
                "mtp",
                "Training one multi-token prediction module beside it costs the main model no loss",
                "V3 Table 4",
                "Pile bits per byte .729 against .729, .657 against .658",
                Quantity("deepseek-moe-mtp"),
                _OURS,
                "no_higher",
                0.0,
            ),
        ),
        note="V3's gains are in downstream scores (HumanEval 20.7 to 26.8); in loss the paper shows no difference.",
    ),
    "loss-free": Experiment(
        "Loss-Free Balancing: loss and MaxVio",
        (
            Claim(
                "bias-max-vio",
                "Biases keep experts more even than a balance loss of 0.001: lower MaxVio",
                "2408.15664 Table 2",
                "MaxVio 0.04 against 0.72 (1B), 0.04 against 0.52 (3B)",
                Quantity("sigmoid-bias", "max_vio"),
                Quantity("sigmoid-loss", "max_vio"),
                printed_difference=-0.68,
            ),
            Claim(
                "bias-max-vio-strong",
                "Also more even than one of 0.01",
                "ours, not printed",
                "not in the paper",
                Quantity("sigmoid-bias", "max_vio"),
                Quantity("sigmoid-loss-strong", "max_vio"),
            ),
            Claim(
                "bias-perplexity",
                "And at no cost: lower loss",
                "2408.15664 Table 2",
                "perplexity 9.50 against 9.56 (1B), 7.92 against 7.97 (3B)",
                Quantity("sigmoid-bias"),
                Quantity("sigmoid-loss"),
                printed_difference=-0.0063,
            ),
        ),
    ),
}  # fmt: skip
ALL_ARMS = tuple(dict.fromkeys(arm for experiment in EXPERIMENTS.values() for arm in experiment.all_arms))
