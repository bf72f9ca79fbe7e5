"""A model in stages against the same model in one process: gradients, losses, loads, norms, weights after many steps.

1F1B on three ranks, so that a stage stands in the middle, the others on two with two stages each. In float64 gradients
are equal to the bit but for sums that come in another order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from parallel.pipelines import (
    both_halves,
    few,
    frozen,
    gradients,
    hooked,
    in_bfloat16,
    measured,
    packed,
    sharded,
    trained,
    twice,
)
from parallel.processes import run, several

SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")
NAMES = {
    schedule: ("untied", "tied", "ahead", "dropping", *(["tied ahead"] if schedule in ("1f1b", "interleaved") else []))
    for schedule in SCHEDULES
}
FEW = {"interleaved": (1, 3), "zbv": (1, 3)}
"""Micro-batches that are fewer than the four stages; the other schedules refuse them."""
RECOMPUTED = ("1f1b", "zbv")
STEPS = 20


@cache
def work_of(schedule: str) -> tuple[list[str], list[Any] | AssertionError]:
    """Everything that is asked of a schedule, in processes that are started once, whether it goes well or not."""
    work: dict[str, tuple[Any, ...]] = {name: (gradients, name, schedule) for name in NAMES[schedule]}
    work |= {
        "trained": (trained, "biased", schedule, STEPS),
        "frozen": (frozen, schedule),
        "packed": (packed, schedule),
        "in bfloat16": (in_bfloat16, schedule),
        "measured": (measured, NAMES[schedule][-1], schedule),
        "hooked": (hooked, schedule),
    }
    if schedule in RECOMPUTED:
        work["recomputed"] = (recomputed, schedule)
    if schedule in FEW:
        work |= {str(number): (few, schedule, number) for number in FEW[schedule]}
    try:
        return list(work), run(3 if schedule == "1f1b" else 2, several, list(work.values()))
    except AssertionError as error:
        return list(work), error


def by_rank(schedule: str, name: str) -> list[Any]:
    """What each rank found."""
    names, ranks = work_of(schedule)
    if isinstance(ranks, AssertionError):
        raise ranks
    return [results[names.index(name)] for results in ranks]


@cache
def alone(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


def assert_same_step(ranks: list[dict[str, Any]], wanted: dict[str, Any], bound: float = 1e-12) -> None:
    """Gradients of every parameter, terms, loads and norms, on every rank."""
    seen = set()
    for found in ranks:
        for name, gradient in found["gradients"].items():
            seen.add(name)
            other = wanted["gradients"][name]
            assert (gradient is None) == (other is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, other, rtol=bound, atol=bound * other.abs().max(), msg=name)
        assert found["norm"] == pytest.approx(wanted["norm"], rel=max(1e-9, bound))
        assert_same_passes(found["passes"], wanted["passes"])
    assert seen == wanted["gradients"].keys()


def assert_same_passes(found: Any, wanted: Any) -> None:
    assert list(found.terms) == list(wanted.terms)
    assert found.terms == pytest.approx(wanted.terms, rel=1e-6)
    assert list(found.load) == list(wanted.load)
    assert all(torch.equal(load, wanted.load[layer]) for layer, load in found.load.items())
    assert found.dropped == wanted.dropped


@pytest.mark.parametrize(("schedule", "name"), [(schedule, name) for schedule in SCHEDULES for name in NAMES[schedule]])
def test_a_step_is_that_of_one_process(schedule: str, name: str) -> None:
    """Complaint 11 of distribution: norms without what lies on other stages, or with tied weights counted twice."""
    wanted = alone(gradients, name, None)
    assert {"cross_entropy", "expert"} <= wanted["passes"].terms.keys()
    assert (wanted["passes"].dropped > 0) == (name == "dropping")
    assert_same_step(by_rank(schedule, name), wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_steps_are_those_of_one_process(schedule: str) -> None:
    """Tied, so that 1F1B and Interleaved keep two copies of the embedding equal; biases move by everybody's load."""
    wanted = alone(trained, "biased", None, STEPS)
    begun = alone(trained, "biased", None, 0)["weights"]
    seen = set()
    for found in by_rank(schedule, "trained"):
        for ours, theirs in zip(found["passes"], wanted["passes"], strict=True):
            assert_same_passes(ours, theirs)
            assert ours.terms["cross_entropy"] == pytest.approx(theirs.terms["cross_entropy"], abs=5e-6)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        for name, tensor in found["weights"].items():
            seen.add(name)
            assert not torch.equal(wanted["weights"][name], begun[name])
            assert (tensor - wanted["weights"][name]).norm() <= 1e-5 * wanted["weights"][name].norm()
    assert seen == wanted["weights"].keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_lies_before_the_first_weight_that_learns_gets_no_gradient(schedule: str) -> None:
    assert_same_step(by_rank(schedule, "frozen"), alone(frozen, None))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_of_any_length_of_documents_apart(schedule: str) -> None:
    wanted = alone(packed, None)
    assert "sequence" not in wanted["passes"].terms
    assert_same_step(by_rank(schedule, "packed"), wanted)


@pytest.mark.parametrize(("schedule", "number"), [(schedule, number) for schedule in FEW for number in FEW[schedule]])
def test_fewer_micro_batches_than_stages(schedule: str, number: int) -> None:
    assert_same_step(by_rank(schedule, str(number)), alone(few, None, number))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_precision_is_that_of_the_trainer(schedule: str) -> None:
    wanted = alone(in_bfloat16, None)
    assert_same_step(by_rank(schedule, "in bfloat16"), wanted, bound=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rank_measures_the_whole_model(schedule: str) -> None:
    wanted = alone(measured, NAMES[schedule][-1], None)
    for found in by_rank(schedule, "measured"):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-12)
        assert found["sums"] == pytest.approx(wanted["sums"], rel=1e-12)
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-12, atol=1e-12)
        assert found["load"].keys() == wanted["load"].keys()
        assert all(torch.equal(load, wanted["load"][layer]) for layer, load in found["load"].items())


def test_shards_of_stages_have_the_gradients_of_one_process() -> None:
    wanted = alone(both_halves)
    for found in run(4, several, [(sharded, "1f1b"), (sharded, "interleaved")]):
        for one in found:
            for name, gradient in one.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_stand_ins_are_refused_where_their_hooks_would_not_be_called() -> None:
    for schedule in ("zbv", "dualpipev"):
        assert all("computes gradients of weights past their hooks" in said for said in by_rank(schedule, "hooked"))
    for said in by_rank("1f1b", "hooked"):
        assert said.startswith("embedding.weight is trained through a stand-in")


def test_an_objective_that_runs_the_model_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"ConfigError: the objective runs the model more than once"):
        run(2, twice, "1f1b")


@pytest.mark.parametrize("schedule", RECOMPUTED)
def test_recomputed_blocks_give_the_same_gradients(schedule: str) -> None:
    assert_same_step(by_rank(schedule, "recomputed"), alone(gradients, "untied", None))


def recomputed(schedule: str) -> Any:
    return gradients("untied", schedule, recompute=True)
