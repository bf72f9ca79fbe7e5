"""What Child-Tuning masks: its share, its Fisher pass, experts of which nothing is known; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from child_oracle import Rows, clipped, double_model, drawn_masks, found_masks, gradients, is_expert, setting_of, tuned
from torch import Tensor

from finemoe.core.errors import ConfigError
from finemoe.data import TokenBatch
from finemoe.methods.trainables.child import ChildConfig, build
from finemoe.model.transformer import Transformer
from finemoe.training.losses.next_token import NextToken
from finemoe.training.method import Figures, Group, Method
from oracles.models import build as build_model
from oracles.models import moe_table, small_config

# ---- what is masked --------------------------------------------------------------------------------------------------


def test_the_share_that_is_kept_is_reported() -> None:
    model = double_model()
    masks = found_masks(model)
    all_of_them = sum(one.numel() for one in model.parameters())
    masked = sum(int((~mask).sum()) for mask in masks.values())
    made = tuned(model, mode="D")
    [report] = [made.step(made.micro_batches())]
    assert report.figures["gradients_kept"] == pytest.approx(1 - masked / all_of_them, rel=1e-12)
    assert 0 < masked < all_of_them
    rows = tuned(double_model(), mode="F", granularity="row")
    first = next(drawn_masks({n: p.detach() for n, p in rows.model.named_parameters()}, "row"))
    kept = sum(int(mask.sum()) for mask in first.values()) / all_of_them
    assert rows.step(rows.micro_batches()).figures["gradients_kept"] == pytest.approx(kept, rel=1e-12)


def test_every_step_of_f_draws_anew_over_every_parameter() -> None:
    model = double_model()
    made = tuned(model, mode="F")
    seen = []
    for _ in range(2):
        made.step(made.micro_batches())
        seen.append({name: one.grad != 0 for name, one in model.named_parameters()})
    for name, first in seen[0].items():
        if first.numel() > 200 and ".experts." not in name:  # of experts without a token all gradients are 0
            assert not torch.equal(first, seen[1][name]), name
            assert 0.1 < first.double().mean() < 0.45, name


def test_only_what_is_under_blocks_is_masked_by_d() -> None:
    model = double_model()
    made = tuned(model, mode="D")
    made.step(made.micro_batches())
    assert set(made.method.state["child"].state().tensors) == {
        name for name, _ in model.named_parameters() if name.startswith("blocks.")
    }
    assert (model.norm.weight.grad != 0).all()
    assert (model.head_weight.grad != 0).all()


def test_by_expert_nothing_else_in_the_blocks_moves() -> None:
    model = double_model()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    made = tuned(model, mode="D", granularity="expert", masked="held")
    made.step(made.micro_batches())
    for name, parameter in model.named_parameters():
        still = torch.equal(parameter.detach(), before[name])
        assert still == (name.startswith("blocks.") and not is_expert(name)), name
        assert parameter.requires_grad != still
    saved = made.method.state["child"].state().tensors
    kept = {name: mask.flatten() for name, mask in saved.items()}
    assert len(kept) == 2
    first, second = kept.values()
    assert torch.equal(first, second)
    assert int(first.sum()) == 2  # of six, from place ceil(0.7 * 5) on
    for name, mask in kept.items():
        moved = (model.get_parameter(name).detach() != before[name]).flatten(1).any(1)
        assert torch.equal(moved, mask)


def test_the_method_s_own_choice_stands() -> None:
    model = double_model()
    made = tuned(model, mode="D", select=lambda name: None if "attention" in name else Group())
    assert made.method.state["child"].state().tensors
    assert not any("attention" in name for name in made.method.state["child"].state().tensors)
    assert not any("attention" in name for name in made.parameters)


# ---- the pass before the run -----------------------------------------------------------------------------------------


def test_the_fisher_pass_reads_what_it_is_told_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original: Callable[..., TokenBatch] = Rows.batch

    def told(self: Rows, position: int, rows: int) -> TokenBatch:
        read.append((position, rows))
        return original(self, position, rows)

    monkeypatch.setattr(Rows, "batch", told)

    def positions(**table: Any) -> list[tuple[int, int]]:
        read.clear()
        assert tuned_prepare(double_model(), **table)
        return list(read)

    assert positions() == [(0, 4), (4, 4), (8, 2)]  # an epoch has ten
    assert positions(fisher_sequences=6) == [(0, 4), (4, 2)]
    assert positions(fisher_sequences=3, fisher="example") == [(0, 1), (1, 1), (2, 1)]


def test_the_fisher_pass_leaves_no_trace() -> None:
    model = double_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    random = torch.get_rng_state()
    model.embedding.weight.requires_grad_(False)
    made = tuned_prepare(model)
    assert made
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["embedding.weight"]


def tuned_prepare(model: Transformer, begins: bool = True, **table: Any) -> Mapping[str, Tensor]:
    method: Method[Any] = Method(Rows(), NextToken(True), lambda model: Figures({"nothing": 0.0}))  # type: ignore[arg-type]
    made = build(ChildConfig(mode="D", **table), method, setting_of(model.config))
    made.prepare[-1](model, begins)
    return made.state["child"].state().tensors


def test_a_resumed_run_computes_nothing() -> None:
    assert not tuned_prepare(double_model(), begins=False)


def test_an_expert_that_saw_no_token_is_not_ranked_and_keeps_training(caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(feed_forward=moe_table(num_routed_experts=16, experts_per_token=1, num_shared_experts=0))
    model, count = double_model(config), 1
    batch = Rows().batch(0, count)
    output = model(batch.tokens, positions=batch.positions, documents=batch.documents)
    load = output.routing[1].load
    unknown = load == 0
    assert 4 < int(unknown.sum()) < 16
    stacks = [name for name, _ in model.named_parameters() if is_expert(name)]
    with caplog.at_level("INFO", logger="finemoe"):
        masks = tuned_prepare(model, fisher_sequences=count, granularity="expert")
        assert f"{int(unknown.sum())} routed experts saw no token" in caplog.text
    grads = gradients(model, batch)
    grads = {name: clipped({name: grads[name]})[name].float() ** 2 for name in stacks}
    means = torch.stack([torch.cat([grads[name][e].flatten() for name in stacks]).mean() for e in range(16)])
    threshold = np.percentile(means[~unknown].numpy().astype(np.float64), 70)
    for name in stacks:
        assert torch.equal(masks[name].flatten(), unknown | (means.double() >= threshold))
    finer = tuned_prepare(model, fisher_sequences=count)
    everything = [
        (clipped({name: one})[name].float() ** 2)[~unknown if name in stacks else slice(None)].flatten()
        for name, one in gradients(model, batch).items()
        if name.startswith("blocks.")
    ]
    threshold = np.percentile(torch.cat(everything).numpy().astype(np.float64), 70)
    for name in stacks:
        assert finer[name][unknown].all()
        assert torch.equal(finer[name][~unknown], grads[name][~unknown].double() >= threshold)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"mode": "F", "share": 0.0}, "share"),
        ({"mode": "D", "share": 1.2}, "share"),
        ({"mode": "G"}, "mode"),
        ({"mode": "D", "granularity": "head"}, "granularity"),
        ({"mode": "D", "fisher_sequences": 0}, "fisher_sequences"),
        ({"mode": "F", "fisher": "batch"}, "fisher = 'batch' is for mode = \"D\""),
        ({"mode": "F", "fisher_sequences": 8}, 'fisher_sequences = 8 is for mode = "D"'),
    ],
)
def test_impossible_values_are_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ChildConfig.model_validate(table)


def test_a_dense_model_has_no_experts_to_keep() -> None:
    config = small_config(feed_forward={"kind": "dense", "ffn_hidden_size": 24}, leading=None)
    with pytest.raises(ConfigError, match="the model is dense"):
        tuned(build_model(config), mode="F", granularity="expert")


def test_d_needs_something_to_rank() -> None:
    with pytest.raises(ConfigError, match="none of it is trained"):
        tuned(double_model(), mode="D", select=lambda name: Group() if "embedding" in name else None)


def test_data_that_hold_nothing_to_learn_from_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., TokenBatch] = Rows.batch

    def empty(self: Rows, position: int, rows: int) -> TokenBatch:
        batch = original(self, position, rows)
        return TokenBatch(batch.tokens, batch.targets, 0 * batch.weights, batch.positions, batch.documents)

    monkeypatch.setattr(Rows, "batch", empty)
    with pytest.raises(ConfigError, match=r"fisher_sequences 256: the first 10 positions.*raise it"):
        tuned(double_model(), mode="D")


def test_routers_stand_still_by_expert_alone() -> None:
    assert [ChildConfig(mode="F", granularity=g).moves_routers for g in ("parameter", "row", "expert")] == [
        True,
        True,
        False,
    ]
