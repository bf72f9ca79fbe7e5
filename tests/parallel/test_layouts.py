"""Every layout of processes against one process: losses, loads, gradients, weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.parallel.config import Layout
from finemoe.training.report import StepReport
from parallel.processes import run
from parallel.tiny_layouts import LAYOUTS, Case, gradients, trained


@cache
def alone(case: Case) -> tuple[list[StepReport], dict[str, Tensor]]:
    return trained(case, None)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative, in the second norm, of all together."""
    assert ours.keys() == theirs.keys()
    apart = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    return float((apart / sum(one.double().square().sum() for one in theirs.values())).sqrt())


LONG = ("context 2", "shard 2, context 2, experts 2", "pipeline 2, shard 2, experts 2")
"""Whose gradients alone are compared where time is short."""


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) if one in LONG else one for one in LAYOUTS])
def test_twenty_steps_are_those_of_one_process(name: str) -> None:
    """In float64: in float32 one near-tie flips a token, and the sign rule makes a whole step of a bias of it.

    Complaints 10 and 11 of distribution: balance that grows with stages, a norm without the gradients of others.
    """
    case = Case(mtp=1 if LAYOUTS[name].context == 1 else 0)
    expected, weights = alone(case)
    results: list[Any] = run(LAYOUTS[name].processes, trained, case, LAYOUTS[name])
    for reports, _ in results:
        for ours, theirs in zip(reports, expected, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
            assert ours.terms == pytest.approx(dict(theirs.terms), rel=1e-6)
            assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-5)
            assert ours.load.keys() == theirs.load.keys()
            assert all(torch.equal(load, theirs.load[layer]) for layer, load in ours.load.items())
    assert distance(results[0][1], weights) < 1e-5


def test_averaged_gradients_would_be_noticed() -> None:
    """Clip and Adam hide a constant factor, so that the loss looks fine: the norm and the gradients tell."""
    case = Case(steps=4, average=True)
    expected, _ = alone(replace(case, average=False))
    reports, _ = run(2, trained, case, LAYOUTS["shard 2"])[0]
    assert [one.loss for one in reports] == pytest.approx([one.loss for one in expected], abs=0.05)
    assert reports[0].gradient_norm == pytest.approx(expected[0].gradient_norm / 2, rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(steps=6, micro=2, recompute=True), id="two at once, computed again"),
        pytest.param(Case(steps=6, mtp=0, tied=True), id="tied"),
        pytest.param(Case(steps=6, num_experts=6, micro=4), id="six experts on four"),
    ],
)
def test_other_cuts_of_a_step_are_the_same_step(case: Case) -> None:
    """Complaint 7 of distribution: loads counted twice by recomputation, biases moved once a micro-batch."""
    layout = Layout(shard=4, expert=2) if case.num_experts == 8 else Layout(shard=4)
    case = replace(case, micro=min(case.micro, 2))
    expected, weights = alone(case)
    reports, found = run(4, trained, case, layout)[0]
    for ours, theirs in zip(reports, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=5e-6)
        assert all(torch.equal(load, theirs.load[layer]) for layer, load in ours.load.items())
        assert ours.selection_bias == pytest.approx(dict(theirs.selection_bias), abs=1e-9)
    assert distance(found, weights) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kernels", [pytest.param("sorted_slices", marks=pytest.mark.slow), "native"])
def test_gradients_before_the_clip_are_those_of_one_process(name: str, kernels: str) -> None:
    """Complaint 1 of distribution: expert gradients twice too large, or too small by the number of processes."""
    case = Case(torch.float32, kernels=kernels, mtp=1 if LAYOUTS[name].context == 1 else 0)
    theirs = gradients(case, None)
    ours = run(LAYOUTS[name].processes, gradients, case, LAYOUTS[name])[0]
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        apart = (ours[key] - gradient).norm() / gradient.norm()
        assert apart < 1e-6, key
