"""Muon against a loop over single matrices, against torch's own, and in a training run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finemoe.training.method import Group
from finemoe.training.muon import orthogonalize
from finemoe.training.optimizers import (
    AdamWConfig,
    MuonConfig,
    Selected,
    build_optimizers,
    load_optimizer_tensors,
    optimizer_tensors,
)
from oracles.models import build, moe_table, small_config

CONFIG = MuonConfig(learning_rate=0.02, weight_decay=0.1)


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """Steps for one matrix, as printed: X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(iterations):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


class ObviousMuon:
    """One matrix: momentum, Nesterov, orthogonal, scaled, decayed."""

    def __init__(self, matrix: Tensor, config: MuonConfig) -> None:
        self.matrix, self.momentum, self.config = matrix.clone(), torch.zeros_like(matrix), config

    def step(self, gradient: Tensor) -> None:
        config, mu = self.config, self.config.momentum
        self.momentum = mu * self.momentum + (1 - mu) * gradient
        ahead = mu * self.momentum + (1 - mu) * gradient
        size = config.update_rms * max(self.matrix.shape) ** 0.5
        tall = self.matrix.shape[0] > self.matrix.shape[1]
        update = newton_schulz(ahead.T if tall else ahead, config.iterations)
        decayed = self.matrix * (1 - config.learning_rate * config.weight_decay)
        self.matrix = decayed - config.learning_rate * size * (update.T if tall else update)


def selected(**tensors: Tensor) -> list[Selected]:
    return [Selected(name.replace("__", "."), nn.Parameter(tensor), Group()) for name, tensor in tensors.items()]


def pieces(name: str, tensor: Tensor) -> list[Tensor]:
    """The single matrices of a parameter: experts apart, gate and up apart."""
    matrices = list(tensor) if tensor.ndim == 3 else [tensor]
    return [half for m in matrices for half in (m.chunk(2) if name.endswith("gate_up_proj") else (m,))]


OTHER = CONFIG.model_copy(update={"momentum": 0.8, "iterations": 3, "update_rms": 0.3, "weight_decay": 0.5})


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["as V4", "others"])
@pytest.mark.parametrize("rows", [5, 12])
def test_every_matrix_moves_as_in_the_obvious_loop(rows: int, config: MuonConfig) -> None:
    torch.manual_seed(1)
    shapes = {"a__weight": (rows, 8), "b__down_proj": (3, rows, 8), "c__gate_up_proj": (3, 2 * rows, 8)}
    parts = selected(**{name: torch.randn(shape) for name, shape in shapes.items()})
    oracle = {one.name: [ObviousMuon(m, config) for m in pieces(one.name, one.parameter.detach())] for one in parts}
    [optimizer] = build_optimizers(config, parts)
    for _ in range(4):
        for one in parts:
            one.parameter.grad = torch.randn(one.parameter.shape)
            for matrix, gradient in zip(oracle[one.name], pieces(one.name, one.parameter.grad), strict=True):
                matrix.step(gradient)
        optimizer.step()
    for one in parts:
        for ours, theirs in zip(pieces(one.name, one.parameter.detach()), oracle[one.name], strict=True):
            torch.testing.assert_close(ours, theirs.matrix, rtol=1e-4, atol=1e-5)


def test_an_update_has_the_size_of_one_of_adamw() -> None:
    update = orthogonalize(torch.randn(4, 24, 40), 5)
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    # Exactly orthogonal it would be 0.18; five steps leave singular values between 0.7 and 1.2.
    size = (0.18 * 40**0.5 * update).square().mean().sqrt().item()
    assert size == pytest.approx(0.18 * singular.square().mean().sqrt().item(), rel=1e-4)
    assert 0.18 * 0.7 < size < 0.18 * 1.2


@pytest.mark.skipif("Muon" not in vars(torch.optim), reason="torch.optim.Muon came with torch 2.9")
def test_torchs_own_agrees_on_a_matrix() -> None:
    torch.manual_seed(2)
    start = torch.randn(24, 16)
    [ours] = build_optimizers(CONFIG.model_copy(update={"update_rms": 0.2}), selected(w__weight=start.clone()))
    theirs = nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    witness = torch.optim.Muon([theirs], **settings)
    [group] = ours.param_groups
    [mine] = group["params"]
    for _ in range(3):
        mine.grad = torch.randn(24, 16)
        theirs.grad = mine.grad.clone()
        ours.step()
        witness.step()
    moved = (theirs - start).norm()
    assert (mine - theirs).norm() < 0.02 * moved  # torch iterates in bfloat16


def test_embedding_head_and_vectors_are_adamws() -> None:
    model = build(small_config(feed_forward=moe_table()))
    parts = [Selected(name, parameter, Group()) for name, parameter in model.named_parameters()]
    muon, adamw = build_optimizers(CONFIG, parts)
    named = {id(one.parameter): one.name for one in parts}
    of_adamw = {named[id(p)] for group in adamw.param_groups for p in group["params"]}
    of_muon = {named[id(p)] for group in muon.param_groups for p in group["params"]}
    assert of_adamw == {n for n in named.values() if "norm" in n or n in ("embedding.weight", "head.weight")}
    assert of_adamw | of_muon == set(named.values())
    stacked = {named[id(p)]: group["stacked"] for group in muon.param_groups for p in group["params"]}
    assert {name for name, count in stacked.items() if count == 2} == {n for n in of_muon if "gate_up_proj" in n}


def test_state_goes_on_bit_for_bit() -> None:
    def fresh() -> list[Selected]:
        return [Selected(n, p, Group()) for n, p in build(small_config(feed_forward=moe_table())).named_parameters()]

    def steps(parts: list[Selected], optimizers: tuple[torch.optim.Optimizer, ...], seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for one in parts:
                one.parameter.grad = torch.randn(one.parameter.shape, generator=generator)
            for optimizer in optimizers:
                optimizer.step()

    through, resumed = fresh(), fresh()
    first, second = build_optimizers(CONFIG, through), build_optimizers(CONFIG, resumed)
    steps(through, first, range(2))
    saved = optimizer_tensors(first, {one.name: one.parameter for one in through})
    saved = {key: tensor.clone() for key, tensor in saved.items()}
    with torch.no_grad():
        for one, other in zip(resumed, through, strict=True):
            one.parameter.copy_(other.parameter)
    load_optimizer_tensors(second, {one.name: one.parameter for one in resumed}, saved)
    steps(through, first, range(2, 4))
    steps(resumed, second, range(2, 4))
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(through, resumed, strict=True))


def test_factors_of_a_group_hold_for_matrices_too() -> None:
    slow = Selected("w.weight", nn.Parameter(torch.ones(4, 4)), Group(learning_rate=0.5, weight_decay=0.0))
    [optimizer] = build_optimizers(CONFIG, [slow])
    [group] = optimizer.param_groups
    assert (group["learning_rate_factor"], group["weight_decay"]) == (0.5, 0.0)


def test_nothing_selected_is_nothing_to_step() -> None:
    assert build_optimizers(CONFIG, []) == ()
    assert build_optimizers(AdamWConfig(learning_rate=1.0), []) == ()


def test_the_rest_is_stepped_as_adamw_would_with_the_same_settings() -> None:
    settings = {"learning_rate": 0.02, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.4}
    start = torch.randn(6, 4)
    parts = [Selected("embedding.weight", nn.Parameter(start.clone()), Group()) for _ in range(2)]
    [ours] = build_optimizers(MuonConfig(**settings), parts[:1])
    [theirs] = build_optimizers(AdamWConfig(**settings), parts[1:])
    for _ in range(3):
        gradient = torch.randn(6, 4)
        for one, optimizer in zip(parts, (ours, theirs), strict=True):
            one.parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(parts[0].parameter, parts[1].parameter)
    assert not torch.equal(parts[0].parameter, start)


def test_without_a_gradient_nothing_moves_and_a_gradient_of_nought_only_decays() -> None:
    still, zero = selected(a__weight=torch.ones(3, 4), b__weight=torch.ones(3, 4))
    [optimizer] = build_optimizers(CONFIG, [still, zero])
    zero.parameter.grad = torch.zeros(3, 4)
    optimizer.step()
    assert torch.equal(still.parameter, torch.ones(3, 4))
    torch.testing.assert_close(zero.parameter.detach(), torch.full((3, 4), 1 - 0.02 * 0.1))
