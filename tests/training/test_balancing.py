"""Loss-free balancing against a loop over experts, and what it does to a router in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_trainer import SEQUENCES, run, trainer

from finemoe.core.config import parse
from finemoe.core.errors import ConfigError
from finemoe.model.transformer import Transformer
from finemoe.runs.config import RunConfig
from finemoe.training import balancing
from finemoe.training.balancing import BalancingConfig, MoveBiases
from finemoe.training.losses.next_token import NextToken
from finemoe.training.trainer import Trainer
from oracles.models import build, moe_table, small_config

BIASED = {"router": {"kind": "sigmoid_biased", "num_groups": 3, "groups_per_token": 2, "route_scale": 1.5}}


def biased_model(**changes: object) -> Transformer:
    return build(small_config(feed_forward=moe_table(**BIASED), init_std=0.1, **changes))


def balanced_trainer(model: Transformer, config: BalancingConfig, micro: int = SEQUENCES, steps: int = 5) -> Trainer:
    made = trainer(model, micro, steps)
    made.method = replace(
        made.method,
        objective=NextToken(True, mtp_depth=len(model.config.mtp)),
        after_update=(MoveBiases(config.resolved(1000, opened=False)),),
    )
    return made


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_moves_against_the_load(rule: str) -> None:
    model = biased_model()
    load = torch.tensor([5, 0, 2, 2, 1, 2])
    MoveBiases(BalancingConfig(rule=rule, rate=0.01))(model, {1: load}, progress=0.0)
    mean, moved = 2.0, balancing.selection_biases(model)[1]
    for expert, count in enumerate(load.tolist()):
        error = mean - count
        expected = 0.01 * ((error > 0) - (error < 0)) if rule == "sign" else 0.01 * error / mean
        assert moved[expert].item() == pytest.approx(expected)


def test_bias_rests_at_the_end_of_a_run() -> None:
    model = biased_model()
    load = torch.tensor([5, 0, 2, 2, 1, 2])
    MoveBiases(BalancingConfig(rate=0.01, until=0.9))(model, {1: load}, progress=0.9)
    assert not balancing.selection_biases(model)[1].any()


@pytest.mark.parametrize("micro", [1, 2, SEQUENCES])
def test_the_load_is_that_of_the_whole_step(micro: int) -> None:
    model = biased_model()
    made = balanced_trainer(model, BalancingConfig(rate=0.25), micro)
    before = balancing.selection_biases(model)[1].clone()
    for report in run(made, 3):
        load = report.load[1].float()
        expected = before + 0.25 * (load.mean() - load).sign()
        before = expected
        assert report.selection_bias[1] == pytest.approx(expected.abs().max().item())
    torch.testing.assert_close(balancing.selection_biases(model)[1], before)


def test_layers_of_prediction_modules_are_balanced_too() -> None:
    model = biased_model(mtp_depth=1)
    run(balanced_trainer(model, BalancingConfig()), 1)
    assert {layer: bool(bias.any()) for layer, bias in balancing.selection_biases(model).items()} == {1: True, 2: True}


def test_balancing_evens_out_a_router_that_prefers_one_expert() -> None:
    """A router that puts one expert in front, whose weights rest: only a moving bias spreads the load."""
    violation = {}
    for rate in (0.0, 0.005):
        model = biased_model()
        with torch.no_grad():
            balancing.selection_biases(model)[1][0] += 0.3
        made = balanced_trainer(model, BalancingConfig(rate=rate), steps=100)
        made.peak_learning_rate = 1e-9
        violation[rate] = sum(report.max_vio()[1] for report in run(made, 95)[-10:]) / 10
    assert violation[0.005] < 0.5 * violation[0.0]


def test_a_short_run_moves_further_a_step_than_v3() -> None:
    assert BalancingConfig().resolved(100, opened=False).rate == pytest.approx(0.015)
    assert BalancingConfig().resolved(1_000_000, opened=False).rate == 0.001
    assert BalancingConfig(rate=0.0).resolved(100, opened=False).rate == 0.0


def test_biases_that_were_opened_move_at_the_published_rate() -> None:
    assert BalancingConfig().resolved(100, opened=True).rate == 0.001
    assert BalancingConfig(rate=0.1).resolved(100, opened=True).rate == 0.1


def test_no_gradient_reaches_the_bias() -> None:
    model = biased_model()
    assert "blocks.1.feed_forward.router.selection_bias" not in dict(model.named_parameters())
    assert "blocks.1.feed_forward.router.selection_bias" in model.state_dict()


RECIPE = {"training": {"steps": 1, "tokens_per_step": 16}, "data": {"sequence_length": 16, "vocab_size": 300}}


@pytest.mark.parametrize(
    ("table", "words"), [({"balancing": {}}, "no router of the model has a selection bias"), ({"mtp": {}}, "no module")]
)
def test_a_table_without_its_part_of_the_model_is_refused(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(RunConfig, {**RECIPE, "model": small_config(vocab_size=300).model_dump(), **table}, "recipe")


def test_more_depths_than_tokens_are_refused() -> None:
    deep = small_config(vocab_size=300, mtp_depth=16).model_dump()
    with pytest.raises(ConfigError, match="leaves nothing to predict"):
        parse(RunConfig, {**RECIPE, "model": deep}, "recipe")
