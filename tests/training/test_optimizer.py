"""AdamW's groups and state, and the clip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finemoe.parallel.world import SOLO
from finemoe.training.gradients import Clip
from finemoe.training.method import Group
from finemoe.training.optimizers import (
    AdamWConfig,
    Selected,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
)
from oracles.models import build, small_config

CONFIG = AdamWConfig(learning_rate=0.01, weight_decay=0.3)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    return dict(build(small_config(), seed).named_parameters())


def adamw(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """What steps them all alike."""
    [made] = build_optimizers(CONFIG, [Selected(name, parameter, Group()) for name, parameter in named.items()])
    return made


def give_gradients(named: dict[str, nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_norms_do_not_decay_and_all_else_does() -> None:
    named = parameters()
    groups = adamw(named).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in named.items()} == {name: 0.0 if "norm" in name else 0.3 for name in named}


def test_decay_moves_a_weight_without_gradient_and_leaves_a_norm() -> None:
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    adamw(named).step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 if "norm" in name else 1 - 0.01 * 0.3))


def test_one_step_is_adamw_as_printed() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    before, gradient = weight.detach().clone(), torch.randn(3, 4)
    weight.grad = gradient.clone()
    adamw({"weight": weight}).step()
    # bias-corrected first step: m / (1 - beta1) = g, v / (1 - beta2) = g^2
    expected = before * (1 - 0.01 * 0.3) - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected)


def test_state_round_trip_continues_bit_for_bit() -> None:
    through, resumed = parameters(), parameters()
    first = adamw(through)
    for seed in (1, 2):
        give_gradients(through, seed)
        first.step()
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(through[name])
    second = adamw(resumed)
    saved = optimizer_tensors([first], through)
    load_optimizer_tensors([second], resumed, saved)
    for named, optimizer in ((through, first), (resumed, second)):
        give_gradients(named, 3)
        optimizer.step()
    assert all(torch.equal(parameter, resumed[name]) for name, parameter in through.items())


def test_loading_copies() -> None:
    named = parameters()
    optimizer = adamw(named)
    give_gradients(named)
    optimizer.step()
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors([optimizer], named).items()}
    kept = {key: tensor.clone() for key, tensor in saved.items()}
    load_optimizer_tensors([optimizer], named, saved)
    give_gradients(named)
    optimizer.step()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in saved.items())


def test_state_of_an_unknown_parameter_is_refused() -> None:
    named = parameters()
    with pytest.raises(ValueError, match=r"unknown parameters: \['nowhere/exp_avg'\]"):
        load_optimizer_tensors([adamw(named)], named, {"nowhere/exp_avg": torch.zeros(1)})


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_is_torch_s_over_all_parameters(max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    give_gradients(ours)
    give_gradients(theirs)
    joint = torch.cat([parameter.grad.flatten() for parameter in theirs.values()]).norm()
    norm = SOLO.norm(ours)
    assert Clip(max_norm)(ours, norm) == {}
    nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    assert norm.item() == pytest.approx(joint.item())
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in ours)
    after = torch.cat([parameter.grad.flatten() for parameter in ours.values()]).norm()
    assert after.item() == pytest.approx(min(max_norm, joint.item()), rel=1e-4)


@pytest.mark.parametrize("share", [0.55, 0.9, 0.999])
def test_clip_acts_as_soon_as_the_norm_is_above_its_bound(share: float) -> None:
    named = parameters()
    give_gradients(named)
    norm = SOLO.norm(named)
    bound = share * norm.item()
    Clip(bound)(named, norm)
    assert SOLO.norm(named).item() == pytest.approx(bound, rel=1e-4)
