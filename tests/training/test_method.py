"""The slots of a method: what is frozen stays, what is grouped follows its group, what a method keeps is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from test_trainer import OPTIMIZER, SCHEDULE, SEQUENCES, batch_at, method_of, run, trainer
from torch import Tensor, nn

from finemoe.core.errors import TrainingError
from finemoe.data.batch import TokenBatch
from finemoe.model.transformer import Transformer
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import NextToken
from finemoe.training.method import Figures, Group, Method
from finemoe.training.objective import Terms, balance_sums
from finemoe.training.optimizers import AdamWConfig
from finemoe.training.trainer import Plan, Trainer
from oracles.models import build, moe_table, small_config

PLAN = Plan(5, SEQUENCES, 3, torch.device("cpu"), bf16=False)


def with_method(model: Transformer, method: Method, optimizer: AdamWConfig = OPTIMIZER) -> Trainer:
    return Trainer(model, method, optimizer, SCHEDULE, PLAN)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Surprise:
    """An objective with a name of its own, and a figure that is reported and not minimised."""

    headline = "surprise"

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        tokens = float(batch.num_tokens)
        return {"surprise": tokens, "twice": tokens, "expert": float(batch.num_sequences)}

    def weights(self, progress: float) -> Mapping[str, float]:
        return {"twice": 0.0}

    def terms(self, model: Transformer, batch: TokenBatch) -> Terms:
        output = model(batch.tokens)
        inputs = (output.hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
        loss = model.backend.cross_entropy_sum(*inputs, torch.ones(batch.num_tokens))
        return Terms({"surprise": loss, "twice": 2 * loss.detach()} | balance_sums(output.routing), output.routing)


def test_an_objective_may_call_its_loss_what_it_wants() -> None:
    [report, *_] = run(with_method(build(small_config()), method_of(Surprise())), 2)
    assert report.loss == report.terms["surprise"] > 1
    assert report.terms["twice"] == pytest.approx(2 * report.loss)
    assert "cross_entropy" not in report.terms


def test_a_term_of_weight_nought_moves_nothing() -> None:
    class Silent(Surprise):
        def weights(self, progress: float) -> Mapping[str, float]:
            return {"twice": 0.0, "surprise": 0.0, "expert": 0.0}

    made = with_method(build(small_config()), method_of(Silent()))
    assert run(made, 1)[0].gradient_norm == 0


def test_a_method_without_a_clip_reports_its_norm() -> None:
    clipped, free = (
        with_method(build(small_config(init_std=0.1)), method_of(NextToken(True), before_update=changes))
        for changes in ((Clip(0.5),), ())
    )
    first, second = run(clipped, 1)[0], run(free, 1)[0]
    assert first.gradient_norm == second.gradient_norm > 0.5  # of the gradients as they came, in both
    after = torch.cat([p.grad.flatten() for p in clipped.model.parameters() if p.grad is not None]).norm()
    assert after.item() == pytest.approx(0.5, rel=1e-4)


def test_what_is_frozen_has_no_gradient_and_stays() -> None:
    model = build(small_config())
    before = weights_of(model)
    made = with_method(model, method_of(NextToken(True), select=lambda n: Group() if "experts" in n else None))
    for _ in range(3):
        made.step(made.micro_batches())
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == ("experts" in name), name
            assert (parameter.grad is None) == ("experts" not in name), name
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "experts" in name}


def test_a_model_that_was_frozen_before_trains_where_the_method_says() -> None:
    model = build(small_config())
    model.requires_grad_(False)
    before = weights_of(model)
    run(with_method(model, method_of(NextToken(True))), 1)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_groups_scale_learning_rate_and_decay() -> None:
    """Against a loop with torch's own AdamW and the products written out."""

    def group(name: str) -> Group:
        return Group(learning_rate=0.1, weight_decay=0.0) if "embedding" in name else Group(weight_decay=2.0)

    ours, theirs = build(small_config(init_std=0.1)), build(small_config(init_std=0.1))
    made = with_method(ours, method_of(NextToken(True), select=group))
    groups = [
        {
            "params": [parameter],
            "factor": 0.1 if "embedding" in name else 1.0,
            "weight_decay": 0.0 if "embedding" in name or parameter.ndim < 2 else 0.2,
        }
        for name, parameter in theirs.named_parameters()
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(3):
        [report] = run(made, 1)
        batch = batch_at(step * SEQUENCES, SEQUENCES)
        terms = NextToken(True).terms(theirs, batch)
        adam.zero_grad()
        counts = NextToken(True).counts(batch)
        sum(value / counts[name] for name, value in terms.sums.items()).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for one in adam.param_groups:
            one["lr"] = report.learning_rate * one["factor"]
        adam.step()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=1e-3, atol=5e-4)


def test_before_update_runs_in_order_and_its_figures_are_reported() -> None:
    seen: list[str] = []

    def first(parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        seen.append("first")
        for parameter in parameters.values():
            parameter.grad.zero_()
        return {"share": 0.25}

    def second(parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        seen.append("second")
        assert norm > 0  # of the gradients as the backward pass left them
        return {}

    made = with_method(build(small_config()), method_of(NextToken(True), before_update=(first, second)))
    [report] = run(made, 1)
    assert seen == ["first", "second"]
    assert report.figures == {"share": 0.25}
    assert report.to_record()["figures"] == {"share": 0.25}
    assert "figures" not in run(trainer(build(small_config())), 1)[0].to_record()


def test_a_figure_that_is_not_finite_stops_before_the_update() -> None:
    model = build(small_config())
    before = weights_of(model)
    bad = (lambda parameters, norm: {"share": float("inf")},)
    with pytest.raises(TrainingError, match="step 1 is not finite: share"):
        run(with_method(model, method_of(NextToken(True), before_update=bad)), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_after_update_can_undo_what_decay_does_to_rows_without_gradient() -> None:
    """One expert of a stack is kept: its gradient is masked, AdamW's decay moves it even so, and it is put back."""
    model = build(small_config(feed_forward=moe_table()))
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.down_proj"))
    kept = model.get_parameter(name)[0].detach().clone()

    def mask(parameters: Mapping[str, nn.Parameter], norm: Tensor) -> dict[str, float]:
        parameters[name].grad[0] = 0
        return {}

    def put_back(model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        moved.append(not torch.equal(model.get_parameter(name)[0], kept))
        with torch.no_grad():
            model.get_parameter(name)[0] = kept

    moved: list[bool] = []
    slots = {"before_update": (mask,), "after_update": (put_back,)}
    others = model.get_parameter(name)[1].detach().clone()
    run(with_method(model, method_of(NextToken(True), **slots)), 2)
    assert moved == [True, True]
    assert torch.equal(model.get_parameter(name)[0], kept)
    assert not torch.equal(model.get_parameter(name)[1], others)


def test_after_update_is_told_the_load_and_the_progress_before_the_step() -> None:
    told: list[tuple[int, float]] = []

    def note(model: Transformer, load: Mapping[int, Tensor], progress: float) -> None:
        told.append((int(load[1].sum()), progress))

    config = small_config(feed_forward=moe_table(experts_per_token=2))
    made = with_method(build(config), method_of(NextToken(True), after_update=(note,)))
    run(made, 2)
    assert told == [(SEQUENCES * 12 * 2, 0.0), (SEQUENCES * 12 * 2, 0.2)]


def test_prepare_comes_before_anything_is_selected() -> None:
    def widen(model: Transformer, begins: bool) -> None:
        model.register_parameter("adapter", nn.Parameter(torch.ones(3)))

    model = build(small_config())
    method = method_of(NextToken(True), prepare=(widen,), select=lambda n: Group() if n == "adapter" else None)
    made = with_method(model, method)
    assert list(made.parameters) == ["adapter"]
    assert not model.embedding.weight.requires_grad


def test_a_few_figures_are_a_measurement() -> None:
    found = Figures({"accuracy": 0.75, "margin": 2.0})
    assert found.headline == 0.75
    assert found.to_record() == {"accuracy": 0.75, "margin": 2.0}
    assert found.to_summary() == {"final_accuracy": 0.75, "final_margin": 2.0}


def test_state_of_generators_is_by_device() -> None:
    made = trainer(build(small_config()))
    torch.rand(3)
    run(made, 1)
    assert torch.equal(made.state.rng["cpu"], torch.get_rng_state())
    assert replace(made.state).rng is made.state.rng


def test_a_term_without_anything_to_count_is_left_out() -> None:
    class Ahead(Surprise):
        def counts(self, batch: TokenBatch) -> dict[str, float]:
            return {**Surprise.counts(self, batch), "twice": 0.0}

    [report] = run(with_method(build(small_config()), method_of(Ahead())), 1)
    assert "twice" not in report.terms
    assert report.loss > 1


def test_a_step_without_anything_to_count_at_all_is_passed_over() -> None:
    class Nothing(Surprise):
        def counts(self, batch: TokenBatch) -> dict[str, float]:
            return {**Surprise.counts(self, batch), "surprise": 0.0}

    trainer = with_method(build(small_config()), method_of(Nothing()))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    [report] = run(trainer, 1)
    assert report.loss is None
    assert (report.step, report.skipped, trainer.state.skipped) == (1, 1, 1)
    assert report.to_record()["kind"] == "skipped"
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(not optimizer.state for optimizer in trainer.optimizers)
