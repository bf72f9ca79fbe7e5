"""Trainer.step against a loop anyone would write: whole logits, F.cross_entropy, torch's own AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finemoe.data.batch import TokenBatch
from finemoe.model.moe.balance import BALANCE_TERMS
from finemoe.model.transformer import Transformer
from finemoe.parallel.passes import OneAfterAnother, Passes
from finemoe.parallel.world import SOLO
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import NextToken
from finemoe.training.method import Figures, Group, Method
from finemoe.training.optimizers import AdamWConfig
from finemoe.training.report import StepReport
from finemoe.training.schedule import MultiStepConfig
from finemoe.training.trainer import Plan, Trainer
from oracles import balance as balance_oracle
from oracles.models import VOCAB, build, moe_table, small_config

SEQUENCES, LENGTH = 4, 12
OPTIMIZER = AdamWConfig(learning_rate=0.02, weight_decay=0.1, max_gradient_norm=0.5)
SCHEDULE = MultiStepConfig(warmup_share=0.4, milestones=(0.8,))
FEED_FORWARDS = {
    "dense": {"kind": "dense", "ffn_hidden_size": 24},
    "hash": moe_table("hash_layer", num_shared_experts=0),
    "top-k": moe_table(balance={"expert": 0.3, "z": 0.1}),
    "devices": moe_table(balance={"expert": 0.1, "device": 0.3, "num_devices": 2}),
}


def batch_at(position: int, rows: int) -> TokenBatch:
    """Row `i` depends on `i` alone; two documents a row, and a third of the weights are 0."""
    made = [
        torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(position + i)) for i in range(rows)
    ]
    tokens = torch.stack(made)
    place = torch.arange(LENGTH).expand(rows, LENGTH)
    return TokenBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(place % 3 > 0).float() * (1 + place % 2),
        positions=place % 7,
        documents=place // 7,
    )


class Rows:
    """Data without a text behind it; nothing here asks for tokenizer, report or frequencies."""

    batch = staticmethod(batch_at)


def method_of(objective: Any, **slots: Any) -> Method[TokenBatch]:
    """Everything trained, clipped at the norm of OPTIMIZER, never measured; `slots` are laid on top."""
    clip = (Clip(OPTIMIZER.max_gradient_norm),)
    return Method(Rows(), objective, lambda model: Figures({"nothing": 0.0}), **{"before_update": clip, **slots})


def trainer(model: Transformer, micro: int = SEQUENCES, steps: int = 5, isolate: bool = True) -> Trainer:
    method = method_of(NextToken(isolate))
    plan = Plan(steps, SEQUENCES, micro, torch.device("cpu"), bf16=False)
    return Trainer(model, method, OPTIMIZER, SCHEDULE, plan)


def run(trained: Trainer, steps: int) -> list[StepReport]:
    trained.model.train()
    return [trained.step(trained.micro_batches()) for _ in range(steps)]


def obvious_loop(model: Transformer, steps: int, rate_at: Callable[[int], float]) -> list[tuple[float, float, float]]:
    """(cross-entropy, balance, gradient norm) of each step."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    figures = []
    for step in range(steps):
        batch = batch_at(step * SEQUENCES, SEQUENCES)
        output = model(batch.tokens, positions=batch.positions, documents=batch.documents, record=True)
        losses = F.cross_entropy(model.logits(output.hidden).flatten(0, 1), batch.targets.flatten(), reduction="none")
        loss = (losses * batch.weights.flatten()).sum() / batch.weights.sum()
        balance = sum(
            (balance_of(model, layer, routing.decision) for layer, routing in output.routing.items()), torch.zeros(())
        )
        adam.zero_grad()
        (loss + balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = rate_at(step)
        adam.step()
        figures.append((loss.item(), balance.item(), norm.item()))
    return figures


def balance_of(model: Transformer, layer: int, decision: object) -> torch.Tensor:
    """Mean over sequences of the balance losses of one layer, each sequence by the oracle."""
    config = model.config.blocks[layer].feed_forward.balance
    total = torch.zeros(())
    for row in range(SEQUENCES):
        part = slice(row * LENGTH, (row + 1) * LENGTH)
        ids, scores = decision.expert_ids[part], decision.scores[part]
        if config.expert:
            total = total + config.expert * balance_oracle.expert_loss(ids, scores)
        if config.device:
            total = total + config.device * balance_oracle.device_loss(ids, scores, config.num_devices)
        if config.z:
            total = total + config.z * balance_oracle.z_loss(decision.logits[part])
    return total / SEQUENCES


@pytest.mark.parametrize("arm", FEED_FORWARDS)
@pytest.mark.parametrize("micro", [1, 3, SEQUENCES])
def test_five_steps_are_those_of_the_obvious_loop(arm: str, micro: int) -> None:
    config = small_config(feed_forward=FEED_FORWARDS[arm], init_std=0.1)
    ours, theirs = build(config), build(config)
    # warm-up over 2 of 5 steps, and the milestone at 0.8 is step 4
    expected = obvious_loop(theirs, 5, lambda step: 0.02 * (0.5, 1, 1, 1, 0.316)[step])
    reports = run(trainer(ours, micro), 5)
    for report, (loss, balance, norm) in zip(reports, expected, strict=True):
        assert report.loss == pytest.approx(loss, rel=1e-5)
        assert sum(report.terms.values()) - report.loss == pytest.approx(balance, rel=1e-4, abs=1e-6)
        assert report.gradient_norm == pytest.approx(norm, rel=1e-4)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, dict(theirs.named_parameters())[name], rtol=1e-3, atol=5e-4)


def test_counts_come_from_the_batch_alone() -> None:
    counts = NextToken(isolate_documents=True).counts(batch_at(0, 3))
    assert counts == {"cross_entropy": 3 * (4 * 2 + 4 * 1), **dict.fromkeys(BALANCE_TERMS, 3.0)}


def test_isolation_decides_whether_documents_are_given_to_the_model() -> None:
    model = build(small_config())
    losses = [NextToken(isolate).terms(model, batch_at(0, 2)).sums["cross_entropy"] for isolate in (True, False)]
    assert losses[0] != losses[1]


def test_terms_are_sums_so_that_parts_add_up() -> None:
    model = build(small_config(feed_forward=FEED_FORWARDS["top-k"]))
    whole = NextToken(True).terms(model, batch_at(0, 4))
    parts = [NextToken(True).terms(model, batch_at(start, 2)) for start in (0, 2)]
    for name, total in whole.sums.items():
        torch.testing.assert_close(total, parts[0].sums[name] + parts[1].sums[name])
    for layer, record in whole.routing.items():
        assert torch.equal(record.load, parts[0].routing[layer].load + parts[1].routing[layer].load)


def test_balance_terms_of_all_layers_add_up() -> None:
    model = build(small_config(num_layers=4, feed_forward=FEED_FORWARDS["top-k"]))
    terms = NextToken(True).terms(model, batch_at(0, 4))
    assert len(terms.routing) == 3
    for name in ("expert", "z"):
        each = [record.balance[name].item() for record in terms.routing.values()]
        assert terms.sums[name].item() == pytest.approx(sum(each))


def test_state_counts_steps_tokens_and_sequences() -> None:
    trained = trainer(build(small_config()), micro=3)
    reports = run(trained, 2)
    assert [report.step for report in reports] == [1, 2]
    assert [report.tokens for report in reports] == [SEQUENCES * LENGTH, 2 * SEQUENCES * LENGTH]
    assert trained.state.position == 2 * SEQUENCES
    assert 0 < reports[0].seconds < reports[1].seconds == trained.state.seconds
    assert reports[1].tokens_per_second > 0


def test_waiting_is_time_and_no_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer(build(small_config()))
    run(trained, 1)  # the first step of a process also loads what the others find
    before = trained.state.seconds

    def slow(world: Any, parameters: Any) -> Tensor:
        time.sleep(0.5)
        return torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])

    monkeypatch.setattr(type(SOLO), "norm", slow)
    [report] = run(trained, 1)
    assert report.seconds - before > 0.5
    assert 0 < report.to_record()["processor_seconds"] < report.seconds - before


def test_load_adds_up_over_micro_batches() -> None:
    config = small_config(feed_forward=moe_table(experts_per_token=2))
    [report] = run(trainer(build(config), micro=1), 1)
    assert report.load.keys() == {1}  # layer 0 is dense
    assert report.load[1].sum() == SEQUENCES * LENGTH * 2
    assert report.dropped == 0


def test_run_until_stops_there_and_goes_on() -> None:
    trained = trainer(build(small_config()))
    assert trained.run(until=2)
    assert trained.state.step == 2
    assert trained.run()
    assert trained.state.step == 5


@pytest.mark.parametrize(("most", "steps"), [(1, 1), (48, 1), (49, 2), (96, 2), (10_000, 5)])
def test_the_step_by_which_the_tokens_are_read_is_the_last(most: int, steps: int) -> None:
    trained = trainer(build(small_config()), micro=3)
    trained.plan = replace(trained.plan, max_tokens=most)
    assert not trained.done
    assert trained.run()
    assert (trained.state.step, trained.state.tokens) == (steps, steps * SEQUENCES * LENGTH)
    assert trained.done
    assert trained.run(until=5)
    assert trained.state.step == steps


def test_a_request_to_stop_ends_after_the_step() -> None:
    class StopAtTwo:
        closed = False

        def after_step(self, trainer: Trainer, report: StepReport) -> None:
            if report.step == 2:
                trainer.request_stop()

        def close(self) -> None:
            self.closed = True

    trained, observer = trainer(build(small_config())), StopAtTwo()
    trained.observers = [observer]
    assert trained.run() is False
    assert trained.state.step == 2
    assert observer.closed


def test_only_trainable_parameters_move() -> None:
    model = build(small_config())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method = method_of(NextToken(True), select=lambda name: Group() if "experts" in name else None)
    plan = Plan(2, SEQUENCES, SEQUENCES, torch.device("cpu"), bf16=False)
    Trainer(model, method, OPTIMIZER, SCHEDULE, plan).run()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "experts" in name}


def test_bf16_follows_float32() -> None:
    config = small_config(feed_forward=FEED_FORWARDS["dense"], init_std=0.1)
    exact, rough = trainer(build(config)), trainer(build(config))
    rough.plan = Plan(5, SEQUENCES, SEQUENCES, torch.device("cpu"), bf16=True)
    for expected, report in zip(run(exact, 4), run(rough, 4), strict=True):
        assert report.loss == pytest.approx(expected.loss, rel=0.01)
    assert all(parameter.dtype == torch.float32 for parameter in rough.model.parameters())


def test_passes_are_run_by_what_is_given() -> None:
    config = small_config(feed_forward=FEED_FORWARDS["top-k"], init_std=0.1)
    ours, theirs = build(config), build(config)
    known = OneAfterAnother(ours)
    asked: list[int] = []

    def execute(objective: Any, batches: Any, *rest: Any) -> Passes:
        asked.append(len(batches))
        return known(objective, batches, *rest)

    given, plain = trainer(ours, micro=2), trainer(theirs, micro=2)
    given = Trainer(ours, given.method, OPTIMIZER, SCHEDULE, given.plan, execute=execute)
    assert [report.terms for report in run(given, 3)] == [report.terms for report in run(plain, 3)]
    assert asked == [2, 2, 2]
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))
