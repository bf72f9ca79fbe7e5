"""Alerts: figures against plain arithmetic, when they speak, and that a run records them."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.model.moe.layer import MoEConfig
from finemoe.runs import run as run_module
from finemoe.runs.config import read_config, resolve_run
from finemoe.runs.run import resume, train
from finemoe.training.alerts import (
    Alert,
    Knobs,
    Watch,
    advice,
    alert_for,
    effective_experts,
    imbalance,
    routed_layers,
)
from runs.tiny_runs import recipe, records

EVEN = [1000] * 16
COLLAPSED = [16000, *[0] * 15]
HALF = [2000] * 8 + [0] * 8
KNOBS = Knobs(0.004, 0.01)


def layer(kind: str = "softmax_topk", k: int = 1, experts: int = 16, **tables: object) -> MoEConfig:
    return MoEConfig.model_validate(
        {"num_routed_experts": experts, "experts_per_token": k, "expert_hidden_size": 8, "router": {"kind": kind}}
        | tables
    )


def watched(loads: list[list[int]], total: int = 400, **kind: object) -> list[Alert]:
    """What a watch says of one layer with `loads`, one a window of 20 steps, after the 40 in which it is silent."""
    watch = Watch({3: layer(**kind)}, total, KNOBS)  # type: ignore[arg-type]
    assert (watch.window, watch.settled) == (20, 40)
    said = []
    for step in range(1, 41):
        said += watch.after(step, {3: COLLAPSED})
    for window, load in enumerate(loads):
        for step in range(20):
            said += watch.after(41 + 20 * window + step, {3: load})
    return said


def test_figures_are_those_of_plain_arithmetic():
    load = [900, 60, 30, 10]
    found = imbalance(load, 2)
    assert found is not None
    entropy = -sum(c / 1000 * math.log(c / 1000) for c in load)
    assert found.effective == pytest.approx(math.exp(entropy))
    assert found.idle == pytest.approx((4 - math.exp(entropy)) / 2)
    assert found.hottest == pytest.approx(3.6)
    assert (found.experts, found.starved, found.dead) == (4, 1, 0)  # a tenth of the mean of 250 is 25


@given(st.integers(2, 40), st.data())
def test_idle_is_0_when_even_and_1_when_all_choose_the_same(experts: int, data: st.DataObject):
    k = data.draw(st.integers(1, experts - 1))
    even, same = imbalance([100] * experts, k), imbalance([100 * experts] * k + [0] * (experts - k), k)
    assert even is not None
    assert same is not None
    assert even.idle == pytest.approx(0, abs=1e-9)
    assert same.idle == pytest.approx(1)
    assert (even.level, same.level) == (0, 3)
    assert effective_experts(np.zeros(experts)) == 0


def test_too_little_text_and_a_layer_without_choice_say_nothing():
    assert imbalance([0, 0, 0, 40], 1) is None
    assert imbalance([1000, 1000], 2) is None


def test_an_even_load_and_the_start_of_a_run_are_silent():
    assert watched([EVEN] * 6) == []  # `watched` begins with forty collapsed steps


def test_one_bad_window_is_not_enough():
    assert watched([EVEN, COLLAPSED, EVEN, COLLAPSED, EVEN]) == []


def test_an_alert_is_said_once_escalates_and_ends():
    said = watched([HALF] * 4 + [COLLAPSED] * 4 + [HALF] * 2 + [EVEN] * 3 + [HALF] * 3)
    assert [alert.level for alert in said] == ["uneven", "collapsed", "recovered", "uneven"]
    assert [alert.step for alert in said] == [80, 160, 260, 340]


def test_hysteresis_between_recovered_and_raised():
    between = [1600] * 10 + [0] + [10] * 5  # idle 0.37: below the level that raises, above the one that ends
    found = imbalance(between, 1)
    assert found is not None
    assert 0.35 < found.idle < 0.5
    said = watched([HALF, HALF, between, HALF, between, HALF])
    assert [alert.level for alert in said] == ["uneven"]


def test_a_load_on_its_way_back_is_left_alone():
    steps = [[16000 - 15 * r, *[r] * 15] for r in (0, 60, 200, 400, 700)]
    assert watched([[int(c) for c in load] for load in steps[1:]]) == []


def test_a_tenth_of_dead_experts_is_enough():
    dead = [1000] * 13 + [0] * 3
    assert [alert.level for alert in watched([dead] * 3)] == ["uneven"]
    other = [0] * 3 + [1000] * 13
    assert watched([dead, other] * 3) == []  # never the same for two windows


def test_the_words_name_figures_knob_value_and_document():
    (alert,) = watched([[15000, 700, 300, *[0] * 12, 50]] * 2, balance={"expert": 0.01})
    for words in (
        "layer 3, collapsed: 13 of 16 experts get less than a tenth of the even share (12 of them nothing)",
        "one 15 times the share",
        "Raise model.feed_forward.balance.expert (now 0.01) or lower optimizer.learning_rate (now 0.004)",
        "docs/howto/keep-experts-balanced.md",
    ):
        assert words in alert.message
    record = alert.to_record()
    assert (record["kind"], record["step"], record["layer"], record["starved"]) == ("alert", 80, 3, 13)


def test_the_knob_is_one_that_the_router_has():
    assert advice(layer(), KNOBS)[1].startswith("Set model.feed_forward.balance.expert (now 0, 0.01 is usual)")
    assert advice(layer("sigmoid_biased"), KNOBS)[1].startswith("Raise balancing.rate (now 0.01) or ")
    assert '"balanced"' in advice(layer("hash_layer"), KNOBS)[1]
    assert "optimizer" not in advice(layer(), None)[1]
    opened = replace(KNOBS, opened=True)
    assert advice(layer(), opened)[0] == "balance.expert"
    assert " or balance.sequence (now 0)" in advice(layer("sigmoid_biased"), opened)[1]


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_biased"])
def test_no_balance_is_advised_where_routers_stay(kind: str):
    knob, said = advice(layer(kind), replace(KNOBS, opened=True, routers_move=False))
    assert knob == "optimizer.learning_rate"
    assert "[trainable] leaves its router as it is" in said
    assert not any(word in said for word in ("Raise", "Set", "balancing.rate", "balance.expert"))


@pytest.mark.parametrize(
    ("tables", "knob"),
    [({}, "balance.expert"), ({"trainable": {"kind": "everything", "freeze": ["routers"]}}, "optimizer.learning_rate")],
)
def test_a_run_tells_what_its_own_recipe_has(corpus: Path, tmp_path: Path, tables: dict[str, Any], knob: str):
    """The advice of a run that begins with a model."""
    base = train(recipe(corpus, "deepseek-moe", training={"steps": 1}), out=tmp_path / "base", quiet=True).directory
    raw = {key: value for key, value in recipe(corpus, training={"steps": 1}).items() if key != "model"}
    raw["data"] = {key: value for key, value in raw["data"].items() if key != "vocab_size"}
    config = resolve_run({**raw, "start_from": str(base), **tables}, "it")
    watch = run_module._watch(config, base / "metrics.jsonl")
    (number, one), *_ = routed_layers(config.model).items()
    found = imbalance([1000, *[0] * (one.num_routed_experts - 1)], 1)
    assert found is not None
    assert alert_for(1, number, one, found, 1, watch._knobs).knob == knob


def test_a_hash_router_is_never_scolded():
    assert watched([COLLAPSED] * 5, kind="hash_layer") == []


def test_replaying_records_is_having_seen_them():
    rng = random.Random(0)
    loads = [rng.choice([EVEN, HALF, HALF, COLLAPSED, COLLAPSED, COLLAPSED]) for _ in range(20)]
    steps = [{"kind": "step", "step": s, "load": {"3": loads[(s - 1) // 20]}} for s in range(1, 401)]
    straight = Watch({3: layer()}, 400)
    said = [alert for record in steps for alert in straight.after(record["step"], {3: record["load"]["3"]})]
    assert said
    for cut in (1, 79, 80, 143, 399):
        again = Watch({3: layer()}, 400)
        alerts = [alert.to_record() for alert in said if alert.step <= cut]
        again.replay([*steps[:cut], *alerts, {"kind": "validation", "step": cut, "load": {"3": COLLAPSED}}])
        rest = [a for record in steps[cut:] for a in again.after(record["step"], {3: record["load"]["3"]})]
        assert rest == [alert for alert in said if alert.step > cut]


def test_a_step_that_was_passed_over_ends_a_window_when_it_is_replayed_too():
    straight, again = Watch({3: layer()}, 400), Watch({3: layer()}, 400)
    records: list[dict[str, Any]] = [
        {"kind": "step", "step": step, "load": {"3": EVEN if step <= 60 else HALF}} for step in range(1, 101)
    ]
    records[79] = {"kind": "skipped", "step": 80}  # the end of a window
    loads = [{int(number): load for number, load in one.get("load", {}).items()} for one in records]
    said = [alert for step, load in enumerate(loads, start=1) for alert in straight.after(step, load)]
    assert [alert.step for alert in said] == [100]
    again.replay(records[:85])
    assert [alert for step in range(86, 101) for alert in again.after(step, loads[step - 1])] == said


@pytest.mark.parametrize(
    ("levels", "said"), [(["uneven"], []), ([], ["uneven"]), (["uneven", "recovered"], ["uneven"])]
)
def test_a_run_of_another_length_says_what_has_not_been_said_and_nothing_twice(levels: list[str], said: list[str]):
    """Its windows are longer now, so that what they would have said is not what was."""
    steps = [{"kind": "step", "step": step, "load": {"3": HALF}} for step in range(1, 201)]
    alerts = [{"kind": "alert", "step": 60 + n, "layer": 3, "level": level} for n, level in enumerate(levels)]
    longer = Watch({3: layer()}, 800)
    longer.replay([*steps, *alerts])
    found = [alert for step in range(201, 321) for alert in longer.after(step, {3: HALF})]
    assert [alert.level for alert in found] == said


def collapsing(corpus: Path) -> dict[str, object]:
    """A recipe whose routers all choose the same experts: no balance loss, and far too large a learning rate."""
    feed_forward = {"balance": {"expert": 0.0}}
    training = {"steps": 60, "tokens_per_step": 16 * 16, "checkpoint_every": 30}
    return recipe(
        corpus, "deepseek-moe", model={"feed_forward": feed_forward}, training=training,
        optimizer={"learning_rate": 0.5},
    )  # fmt: skip


def test_a_collapsing_run_says_so_and_resumes_with_the_same_records(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING, "finemoe"):
        straight = train(collapsing(corpus), out=tmp_path / "straight", quiet=True).directory
    alerts = [record for record in records(straight) if record["kind"] == "alert"]
    assert alerts
    assert any(alerts[0]["message"] in line for line in caplog.messages)
    places = [(record["kind"], record["step"]) for record in records(straight)]
    assert places.index(("alert", alerts[0]["step"])) == places.index(("step", alerts[0]["step"])) + 1

    run = run_module.Trainer.run
    monkeypatch.setattr(run_module.Trainer, "run", lambda self, until=None: run(self, 30))
    assert train(collapsing(corpus), out=tmp_path / "cut", quiet=True).interrupted
    monkeypatch.undo()
    resume(tmp_path / "cut", quiet=True)
    assert records(tmp_path / "cut") == records(straight)


def test_a_dense_run_has_nothing_to_watch(corpus: Path, tmp_path: Path):
    run = train(recipe(corpus, "dense", training={"steps": 2}), out=tmp_path / "run", quiet=True)
    assert routed_layers(read_config(run.directory / "config.json").model) == {}
    assert all(record["kind"] != "alert" for record in records(run.directory))
