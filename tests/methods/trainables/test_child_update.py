"""Child-Tuning against the official update written out: clip, mask, scale, AdamW, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from child_oracle import DECAY, LENGTH, NORM, RATE, SHARE, double_model, masks_of_steps, official, tuned

from oracles.models import build as build_model
from oracles.models import small_config

MODES: list[dict[str, Any]] = [
    {"mode": mode, "granularity": granularity} for mode in "FD" for granularity in ("parameter", "row", "expert")
] + [{"mode": "D", "fisher": "example"}]


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moments", "masked"), [("fp32", "published"), ("fp32", "held"), ("bf16", "published"), ("bf16", "held")]
)
@pytest.mark.parametrize("table", MODES, ids=lambda table: " ".join(table.values()))
def test_five_steps_are_the_official_update(table: dict[str, Any], masked: str, moments: str) -> None:
    ours, theirs = double_model(), double_model()
    granularity = table.get("granularity", "parameter")
    fisher = {"fisher": table["fisher"]} if "fisher" in table else {}
    masks = masks_of_steps(theirs, table["mode"], granularity, **fisher)
    made = tuned(ours, masked=masked, moments=moments, **table)
    norms = [made.step(made.micro_batches()).gradient_norm for _ in range(5)]
    assert min(norms) > NORM  # clipping has something to do in every step
    kept = torch.bfloat16 if moments == "bf16" else torch.float64
    official(theirs, masks, 5, granularity, 1 / SHARE if table["mode"] == "F" else 1.0, masked == "held", kept)
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("mode", ["F", "D"])
def test_a_step_in_four_pieces_is_the_step_in_one(mode: str) -> None:
    whole, pieces = tuned(double_model(), mode=mode), tuned(double_model(), micro=1, mode=mode)
    for _ in range(3):
        first, second = (made.step(made.micro_batches()) for made in (whole, pieces))
        assert first.figures == second.figures  # the mask is drawn once a step
        others = dict(pieces.model.named_parameters())
        for name, parameter in whole.model.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-5, atol=1e-8, msg=name)
            others[name].data.copy_(parameter.data)  # Adam divides by what is almost 0, and routers are float32


def test_a_fisher_pass_in_pieces_is_the_pass_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(double_model(), mode="D").method.state["child"].state().tensors
    monkeypatch.setattr("finemoe.methods.trainables.fisher._PIECE_TOKENS", 3 * LENGTH)
    pieces = tuned(double_model(), mode="D").method.state["child"].state().tensors
    assert all(torch.equal(mask, pieces[name]) for name, mask in whole.items())


@pytest.mark.parametrize("mode", ["F", "D"])
def test_held_weights_stay_to_the_bit_in_their_step(mode: str) -> None:
    model = build_model(small_config())
    masks = masks_of_steps(model, mode, "parameter") if mode == "F" else None
    made = tuned(model, mode=mode, masked="held")
    saved = made.method.state["child"].state().tensors
    for _ in range(3):
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        mask = next(masks) if masks is not None else saved
        made.step(made.micro_batches())
        for name, keep in mask.items():
            after = model.get_parameter(name).detach()
            assert torch.equal(after[~keep], before[name][~keep]), name
        moved = [(model.get_parameter(n).detach() != before[n])[keep].any() for n, keep in mask.items() if keep.any()]
        assert len(moved) > 10
        assert all(moved)


def test_decay_moves_masked_weights_where_the_update_is_as_published() -> None:
    model = double_model()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    made = tuned(model, mode="D")
    for _ in range(3):
        made.step(made.micro_batches())
    seen = 0
    for name, keep in made.method.state["child"].state().tensors.items():
        after, shrunk = model.get_parameter(name).detach()[~keep], before[name][~keep]
        if before[name].ndim > 1:
            shrunk = shrunk * (1 - RATE * DECAY) ** 3
        seen += after.numel()
        torch.testing.assert_close(after, shrunk, rtol=1e-12, atol=0)
    assert seen > 1000
