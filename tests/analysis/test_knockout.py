"""Knock-outs against whole passes written out plainly: losses, prefixes, skipped windows, intervals, refusals."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from finemoe.analysis import knockout as laboratory
from finemoe.analysis import knockout_time
from finemoe.analysis.knockout import active_losses, masked_losses, run_experiments, without_shared
from finemoe.analysis.knockout_time import announce, passes
from finemoe.analysis.passages import Passages
from finemoe.analysis.sweep import Variation, estimate, sweep
from finemoe.checkpoint.language_model import LanguageModel
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingConstraint
from oracles.models import GROUPS, VOCAB, build, moe_table, small_config, v3_config

LENGTH = 6
MODELS: dict[str, ModelConfig] = {
    "DeepSeekMoE": small_config(num_layers=3),
    "V3": v3_config(num_layers=3),  # limited groups, and prediction modules that are no layers of ours
    "groups": small_config(num_layers=3, feed_forward=moe_table(router={"kind": "group_limited", **GROUPS})),
    "hash": small_config(num_layers=3, feed_forward=moe_table("hash_layer")),
}


def opened(config: ModelConfig, *, isolated: bool = False, seed: int = 0) -> LanguageModel:
    tokenizer: Any = SimpleNamespace(end_of_text_id=0, bos_id=None)
    return LanguageModel(build(config, seed).eval(), tokenizer, Path("somewhere"), True, LENGTH, isolated)


def passages(domains: int = 2, windows: int = 4, filled: int = 3) -> list[Passages]:
    """Windows of drawn ids; the last one of each domain has only `filled` targets."""
    drawn = np.random.default_rng(3)
    return [
        Passages(
            f"domain {d}",
            drawn.integers(0, VOCAB, (windows, LENGTH + 1), dtype=np.int32),
            (windows - 1) * LENGTH + filled,
        )
        for d in range(domains)
    ]


@torch.no_grad()
def plain_loss(model: LanguageModel, text: list[Passages], constraint: dict[int, RoutingConstraint] | None) -> float:
    """Mean loss by whole passes, a window at a time."""
    total, count = 0.0, 0
    for passage in text:
        left = passage.num_targets
        for window in torch.tensor(passage.windows.astype(np.int64)):
            ids, targets = window[:-1], window[1:][: min(left, LENGTH)]
            placed = {}
            if model.isolated:
                number = torch.cat((torch.zeros(1), (ids[:-1] == 0).cumsum(0))).long()
                starts = [next(i for i in range(LENGTH) if number[i] == n) for n in number.tolist()]
                placed = {"documents": number[None], "positions": (torch.arange(LENGTH) - torch.tensor(starts))[None]}
            output = model.model(ids[None], constraint=constraint, **placed)
            logits = model.model.logits(output.hidden[0])[: len(targets)]
            losses = F.cross_entropy(logits, targets, reduction="none")
            # Nobody can tell, from the end of a document, how one that it must not see begins.
            counted = (ids[: len(targets)] != 0) if model.isolated else torch.ones(len(targets), dtype=torch.bool)
            total, count, left = total + float(losses[counted].sum()), count + int(counted.sum()), left - len(targets)
    return total / count


def without(experts: int, *left_out: int) -> RoutingConstraint:
    return RoutingConstraint(allowed=torch.tensor([e not in left_out for e in range(experts)]))


@pytest.mark.parametrize(
    ("name", "isolated"),
    [("DeepSeekMoE", True), ("V3", False), ("groups", False), ("hash", False)],
)
def test_every_experiment_equals_whole_passes(name: str, isolated: bool) -> None:
    model, text = opened(MODELS[name], isolated=isolated), passages()
    found = run_experiments(model, text, rows=4, pairs=3, progress=False)
    assert found["complete"]
    assert found["intact"]["loss"]["mean"] == pytest.approx(plain_loss(model, text, None), abs=1e-5)
    for made in found["experiments"].values():
        for one in made["records"] + made.get("singles", []):
            constraint = rebuilt(one["constraint"])
            assert one["loss"]["mean"] == pytest.approx(plain_loss(model, text, constraint), abs=1e-5), one["label"]
            rise = one["loss"]["mean"] - found["intact"]["loss"]["mean"]
            assert one["difference"]["mean"] == pytest.approx(rise, abs=1e-9)
    numbers = {"experts": 12, "pairs": 3, "layers": 6, "shared": 2, "active": 4 if name != "hash" else 2}
    for experiment, count in numbers.items():
        assert len(found["experiments"][experiment]["records"]) == count, experiment


def rebuilt(said: dict[str, Any]) -> dict[int, RoutingConstraint]:
    """The constraint from what a record says of it."""
    made = {}
    for place, layer in enumerate(said["layers"]):
        fields = {key: value for key, value in said.items() if key not in ("layers", "left_out")}
        fields = {k: v[place] if isinstance(v, list) else v for k, v in fields.items()}
        allowed = without(6, *said["left_out"]).allowed if "left_out" in said else None
        made[layer] = RoutingConstraint(allowed=allowed, **fields)
    return made


def test_only_the_blocks_from_the_change_on_and_the_windows_that_chose_the_expert_are_run() -> None:
    model, text = opened(small_config(num_layers=4, feed_forward=moe_table(num_routed_experts=40))), passages()
    found = run_experiments(model, text, ["experts"], rows=3, progress=False)["experiments"]["experts"]
    chosen = {}
    with torch.no_grad():
        for passage in text:
            for window in passage.windows.astype(np.int64):
                output = model.model(torch.tensor(window[None, :-1]), record=True)
                for layer, record in output.routing.items():
                    for expert in set(record.decision.expert_ids.flatten().tolist()):
                        chosen[layer, expert] = chosen.get((layer, expert), 0) + 1
    run = 4 * 8 + sum(count * (4 - layer) for (layer, _), count in chosen.items())
    assert found["work"] == {"blocks_run": run, "blocks_plain": 4 * 8 * (1 + 3 * 40)}
    assert run < found["work"]["blocks_plain"] / 3
    for one in found["records"]:
        assert one["windows_run"] == chosen.get((one["layer"], one["expert"]), 0)
        if not one["windows_run"]:
            assert one["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
            assert one["share"] == 0


def test_groups_that_lose_an_unchosen_expert_are_run_all_the_same() -> None:
    model, text = opened(MODELS["V3"]), passages()
    found = run_experiments(model, text, ["experts"], progress=False)["experiments"]["experts"]
    assert {one["windows_run"] for one in found["records"]} == {8}


def test_shares_are_of_the_text_alone() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages(domains=1, windows=2, filled=1)
    found = run_experiments(model, text, ["experts"], progress=False)["experiments"]["experts"]["records"]
    counts: dict[tuple[int, int], int] = {}
    with torch.no_grad():
        for window, real in zip(text[0].windows.astype(np.int64), (LENGTH, 1), strict=True):
            for layer, record in model.model(torch.tensor(window[None, :-1]), record=True).routing.items():
                for expert in record.decision.expert_ids[:real].flatten().tolist():
                    counts[layer, expert] = counts.get((layer, expert), 0) + 1
    for one in found:
        assert one["share"] == pytest.approx(counts.get((one["layer"], one["expert"]), 0) / (2 * (LENGTH + 1)))


def test_interaction_is_what_two_cost_together_beyond_each_alone() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    found = run_experiments(model, text, ["pairs"], layers=[2], experts=[0, 3, 5], progress=False)["experiments"][
        "pairs"
    ]
    assert [one["experts"] for one in found["records"]] == [[0, 3], [0, 5], [3, 5]]
    assert found["experts"] == {"2": [0, 3, 5]}
    base = plain_loss(model, text, None)
    for one in found["records"]:
        i, j = one["experts"]
        joint, first, second = (plain_loss(model, text, {2: without(6, *out)}) for out in ((i, j), (i,), (j,)))
        assert one["interaction"]["mean"] == pytest.approx(joint - first - second + base, abs=1e-5)
        assert one["interaction"]["low"] < one["interaction"]["mean"] < one["interaction"]["high"]


def test_pairs_are_of_the_most_used_experts_of_the_middle_layer() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    usage = sweep(model, text, []).load[2]
    found = run_experiments(model, text, ["pairs"], pairs=3, progress=False)["experiments"]["pairs"]
    assert found["experts"] == {"2": sorted(usage.argsort(kind="stable")[::-1][:3].tolist())}


# ---- the three of the paper ----


def test_masked_losses_are_figure_4() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    found = masked_losses(model, text, [0, 1 / 16, 0.5])
    assert [one["fraction"] for one in found] == [0, 1 / 16, 0.5]
    assert [one["constraint"].get("num_masked", 0) for one in found] == [0, 1, 3]
    assert "3 of 6" in found[2]["label"]
    for one, masked in zip(found, (0, 1, 3), strict=True):
        constraint = {layer: RoutingConstraint(num_masked=masked) for layer in (1, 2)}
        assert one["loss"]["mean"] == pytest.approx(plain_loss(model, text, constraint), abs=1e-5)
        assert one["intact"]["mean"] == pytest.approx(plain_loss(model, text, None), abs=1e-5)


def test_masked_experts_are_rounded_to_the_nearest() -> None:
    table = moe_table(num_routed_experts=24)
    found = masked_losses(opened(small_config(feed_forward=table)), passages(), [1 / 16, 2 / 16, 3 / 16, 4 / 16])
    assert [one["constraint"]["num_masked"] for one in found] == [2, 3, 5, 6]  # 1.5, 3, 4.5, 6


def test_active_losses_are_figure_5() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    found = active_losses(model, text, [1, 2, 4])
    for one, count in zip(found, (1, 2, 4), strict=True):
        constraint = {layer: RoutingConstraint(num_active=count) for layer in (1, 2)}
        assert one["count"] == count
        assert one["loss"]["mean"] == pytest.approx(plain_loss(model, text, constraint), abs=1e-5)
    assert found[1]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}  # as trained
    assert "as trained" in found[1]["label"]


@pytest.mark.parametrize("shared", [1, 2])
def test_without_shared_keeps_the_compute(shared: int) -> None:
    model = opened(small_config(num_layers=3, feed_forward=moe_table(num_shared_experts=shared)))
    text = passages()
    for replaced, active in ((True, 2 + shared), (False, None)):
        one = without_shared(model, text, replaced=replaced)
        constraint = {layer: RoutingConstraint(shared=False, num_active=active) for layer in (1, 2)}
        assert one["loss"]["mean"] == pytest.approx(plain_loss(model, text, constraint), abs=1e-5)
        assert one["constraint"] == {"layers": [1, 2], "shared": False} | ({"num_active": active} if active else {})
        assert set(one["by_domain"]) == {"domain 0", "domain 1"}


def test_what_cannot_be_constrained_is_refused() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    with pytest.raises(ConfigError, match=r"without 5 of its 6 routed experts there are fewer left than the 2"):
        masked_losses(model, text, [0.9])
    with pytest.raises(ConfigError, match="fraction 1"):
        masked_losses(model, text, [1.0])
    with pytest.raises(ConfigError, match="7 active routed experts, and it can have 1 to 6"):
        active_losses(model, text, [7])
    alone = opened(small_config(feed_forward=moe_table(num_shared_experts=0)))
    with pytest.raises(ConfigError, match="has no shared experts"):
        without_shared(alone, text)
    with pytest.raises(ConfigError, match="fixed table"):
        masked_losses(opened(MODELS["hash"]), text, [0.1])
    with pytest.raises(ConfigError, match="too few to activate 7"):
        without_shared(opened(small_config(feed_forward=moe_table(experts_per_token=6))), text)


def test_dense_models_and_unknown_names_are_refused() -> None:
    dense = opened(small_config(feed_forward={"kind": "dense", "ffn_hidden_size": 8}, leading=None))
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    with pytest.raises(ConfigError, match="dense"):
        run_experiments(dense, text, progress=False)
    with pytest.raises(ConfigError, match="`expert`, did you mean `experts`"):
        run_experiments(model, text, ["expert"], progress=False)
    with pytest.raises(ConfigError, match="layer 0 has no routed experts; the MoE layers of this model are 1, 2"):
        run_experiments(model, text, ["experts"], layers=[0], progress=False)
    with pytest.raises(ConfigError, match="expert 6 does not exist: they are numbered 0 to 5"):
        run_experiments(model, text, ["experts"], experts=[6], progress=False)
    with pytest.raises(ConfigError, match="pairs 1"):
        run_experiments(model, text, ["pairs"], pairs=1, progress=False)


def test_what_a_model_has_not_is_skipped_with_a_reason() -> None:
    text = passages()
    found = run_experiments(opened(MODELS["hash"]), text, ["masked", "active", "shared"], progress=False)
    assert set(found["experiments"]) == {"active", "shared"}
    assert "fixed table" in found["skipped"]["masked"]
    alone = opened(small_config(feed_forward=moe_table(num_shared_experts=0)))
    found = run_experiments(alone, text, ["shared", "layers"], progress=False)
    assert set(found["skipped"]) == {"shared"}
    assert {one["part"] for one in found["experiments"]["layers"]["records"]} == {"routed"}
    with pytest.raises(ConfigError, match="nothing to knock out: shared"):
        run_experiments(alone, text, ["shared"], progress=False)
    narrow = opened(small_config(feed_forward=moe_table(experts_per_token=5)))
    found = run_experiments(narrow, text, ["masked"], fractions=(1 / 16, 0.5), progress=False)["experiments"]["masked"]
    assert len(found["records"]) == 1
    assert "fewer left than the 5" in found["notes"][0]


def test_layers_where_every_expert_is_chosen_go_on_with_one_less() -> None:
    model, text = opened(small_config(feed_forward=moe_table(experts_per_token=6))), passages()
    found = run_experiments(model, text, ["experts"], experts=[2], progress=False)["experiments"]["experts"]["records"]
    allowed = without(6, 2).allowed
    constraint = {1: RoutingConstraint(allowed=allowed, num_active=5)}
    assert found[0]["loss"]["mean"] == pytest.approx(plain_loss(model, text, constraint), abs=1e-5)


def test_an_interrupted_sweep_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(asked: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(laboratory.EXPERIMENTS, "experts", interrupted)
    found = run_experiments(opened(MODELS["DeepSeekMoE"]), passages(), ["active", "experts", "layers"], progress=False)
    assert not found["complete"]
    assert set(found["experiments"]) == {"active"}
    assert found["intact"] is not None


# ---- intervals ----


def test_interval_of_equal_windows_of_one_domain_is_students() -> None:
    values, weights = np.random.default_rng(1).normal(size=9), np.full(9, 4.0)
    made = estimate(values * 4, weights, np.array(["a"] * 9))
    low, high = stats.t.interval(0.95, 8, values.mean(), stats.sem(values))
    assert (made["mean"], made["low"], made["high"]) == pytest.approx((values.mean(), low, high))


def test_interval_of_two_domains_is_welchs() -> None:
    drawn = np.random.default_rng(2)
    a, b = drawn.normal(5, 1, 6), drawn.normal(-5, 3, 9)
    made = estimate(np.concatenate((a, b)), np.ones(15), np.array(["a"] * 6 + ["b"] * 9))
    # the mean of all is a weighted sum of two means, so that Welch's interval applies with those weights
    parts = [(6 / 15) ** 2 * a.var(ddof=1) / 6, (9 / 15) ** 2 * b.var(ddof=1) / 9]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 5 + parts[1] ** 2 / 8)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    assert made["mean"] == pytest.approx((a.sum() + b.sum()) / 15)
    assert made["high"] == pytest.approx(made["mean"] + half)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    drawn, covered = np.random.default_rng(0), 0
    for _ in range(400):
        weights = np.append(np.full(11, 8.0), 3.0)
        losses = [drawn.normal(1.0, 0.5, int(w)).sum() for w in weights]
        made = estimate(np.array(losses), weights, np.array(["a"] * 12))
        covered += made["low"] <= 1.0 <= made["high"]
    assert 0.92 < covered / 400 < 0.98


def test_single_windows_have_no_interval() -> None:
    made = estimate(np.array([6.0]), np.array([3.0]), np.array(["a"]))
    assert made == {"mean": 2.0, "low": None, "high": None}
    mixed = estimate(np.array([6.0, 3.0, 5.0]), np.full(3, 3.0), np.array(["a", "b", "b"]))
    assert mixed["low"] is not None  # all windows are one stratum


def test_batch_size_changes_nothing() -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    variation = Variation("x", {1: RoutingConstraint(num_masked=1), 2: RoutingConstraint(num_active=1)})
    one, many = (sweep(model, text, [variation], rows=rows) for rows in (1, 8))
    np.testing.assert_allclose(one.losses, many.losses, rtol=1e-5)
    assert one.work == many.work == {"blocks_run": 8 * 3 + 8 * 2, "blocks_plain": 2 * 8 * 3}


def test_progress_counts_every_window_of_every_variation(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    seen: list[int] = []

    @contextmanager
    def watched(description: str, total: int, unit: str) -> Any:
        seen.append(-total)
        yield seen.append

    monkeypatch.setattr("finemoe.analysis.sweep.progress", watched)
    variations = [Variation("a", {}), Variation("b", {2: RoutingConstraint(num_active=1)})]
    sweep(opened(MODELS["DeepSeekMoE"]), passages(), variations, rows=3, description="x")
    assert sum(seen) == 0
    assert seen[0] == -3 * 8


@pytest.mark.parametrize("layer", [None, 1])
def test_passes_are_counted_before_they_are_run(layer: int | None, caplog: pytest.LogCaptureFixture) -> None:
    model = opened(MODELS["DeepSeekMoE"])
    layers = None if layer is None else [layer]
    found = run_experiments(model, passages(), layers=layers, pairs=3, progress=False)["experiments"]
    configs = {n: c for n, c in laboratory.moe_configs(model).items() if layer in (None, n)}
    planned = passes(list(found), configs, layers=1, experts=None, pairs=3)
    run = {name: 1 + len(made["records"]) + len(made.get("singles", ())) for name, made in found.items()}
    run["pairs"] += 1  # which experts are used most is counted first
    assert {name: planned[name] for name in ("shared", "active", "experts", "pairs", "layers")} == {
        name: run[name] for name in ("shared", "active", "experts", "pairs", "layers")
    }
    assert planned["masked"] >= run["masked"]


def test_what_takes_long_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, text = opened(MODELS["DeepSeekMoE"]), passages()
    with caplog.at_level(logging.INFO, "finemoe"):
        announce(model, text, {"masked": 2, "experts": 8}, rows=2)
        assert not caplog.text  # a tiny model is done before anybody has read how long it takes
        monkeypatch.setattr(knockout_time, "_WORTH_SAYING", 0.0)
        announce(model, text, {"masked": 2, "experts": 8}, rows=2)
    assert "8 windows, read up to 10 times" in caplog.text
    assert "most of it for `experts`" in caplog.text
