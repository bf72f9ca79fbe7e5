"""Two ranks in two threads, each with half of every step, against one process: the trainer's meeting points.

The world here sums for real, over copies that meet at a barrier; only the network is missing. In float64, so that no
near-tie of a router is decided by the order of additions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_trainer import LENGTH, OPTIMIZER, SCHEDULE, SEQUENCES, batch_at, method_of
from torch import Tensor, nn

from finemoe.core.errors import ConfigError, TrainingError
from finemoe.data.batch import TokenBatch
from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout
from finemoe.parallel.passes import Execute
from finemoe.parallel.world import SOLO, World
from finemoe.training.balancing import BalancingConfig, MoveBiases, selection_biases
from finemoe.training.losses.next_token import NextToken
from finemoe.training.objective import Terms
from finemoe.training.report import StepReport
from finemoe.training.trainer import Plan, Trainer
from oracles.models import build, moe_table, small_config

STEPS = 6
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"feed_forward": {"kind": "dense", "ffn_hidden_size": 24}},
    "top-k": {"feed_forward": moe_table(balance={"expert": 0.3, "z": 0.1})},
    "biased, looking ahead": {
        "feed_forward": moe_table(router={"kind": "sigmoid_biased"}, balance={"sequence": 0.1}),
        "mtp_depth": 1,
    },
    "dropping": {"feed_forward": moe_table(capacity_factor=0.5, balance={"expert": 0.1})},
}


class Meeting:
    """Where ranks put a value and read everybody's; a rank that fails frees the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        seen = list(self._values)
        self._barrier.wait()
        return seen

    def abort(self) -> None:
        self._barrier.abort()


class Rank:
    """A `World` of the ranks at a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = self.share = rank
        self.piece, self.pieces, self.stages = 0, 1, 1
        self.layout = Layout(replicate=meeting.size)
        self.size = self.shares = meeting.size

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        everybody = self._meeting.exchange(self.rank, dict(values))
        names = dict.fromkeys(name for one in everybody for name in one)
        return {name: sum(one.get(name, 0.0) for one in everybody) for name in names}

    def sum_tensors(self, tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        everybody = self._meeting.exchange(self.rank, {key: one.clone() for key, one in tensors.items()})
        return {key: torch.stack([one[key] for one in everybody]).sum(0) for key in tensors}

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        own = list(parameters)
        everybody = self._meeting.exchange(self.rank, [p.grad.clone() for p in own if p.grad is not None])
        for at, parameter in enumerate(p for p in own if p.grad is not None):
            parameter.grad.copy_(torch.stack([one[at] for one in everybody]).sum(0))

    def spread(self, model: Transformer, products: torch.dtype | None = None) -> None:
        return None

    def settle(self, model: Transformer) -> None:
        return None

    def passes(self, model: Transformer) -> Execute:
        return SOLO.passes(model)

    def measured(self, model: Transformer) -> Transformer:
        return model

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        return SOLO.norm(parameters)

    def everyone(self, value: Any, group: Any = None) -> list[Any]:
        return self._meeting.exchange(self.rank, value)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def put(self, target: Tensor, whole: Tensor) -> None:
        target.copy_(whole)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self.rank == 0 else {}

    def first(self, make: Callable[[], Any]) -> Any:
        return self._meeting.exchange(self.rank, make() if self.rank == 0 else None)[0]

    def in_turn(self, make: Callable[[], Any]) -> Any:
        return make()

    def figures(self, arrived: Mapping[int, int]) -> dict[str, float]:
        return {}

    def any(self, flag: bool) -> bool:
        return any(self._meeting.exchange(self.rank, flag))


def made(name: str, world: World, micro: int, objective: Any = None) -> Trainer:
    model = build(small_config(init_std=0.1, **MODELS[name])).double()
    objective = objective or NextToken(True, mtp_depth=len(model.config.mtp))
    method = method_of(objective)
    if selection_biases(model):
        method = replace(method, after_update=(MoveBiases(BalancingConfig(rate=0.01)),))
    plan = Plan(STEPS, SEQUENCES, micro, torch.device("cpu"), bf16=False)
    return Trainer(model, method, OPTIMIZER, SCHEDULE, plan, world=world)


def together(work: Callable[[World], Any], size: int = 2) -> list[Any]:
    """What `work` returns on each rank; the first error of any."""
    meeting = Meeting(size)

    def one(rank: int) -> Any:
        try:
            return work(Rank(meeting, rank))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return [future.result() for future in [threads.submit(one, rank) for rank in range(size)]]


def trained(trainer: Trainer) -> tuple[Transformer, list[StepReport]]:
    trainer.model.train()
    return trainer.model, [trainer.step(trainer.micro_batches()) for _ in range(STEPS)]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropping"])
@pytest.mark.parametrize("micro", [1, 2])
def test_two_ranks_with_half_of_each_step_are_one_process(name: str, micro: int) -> None:
    alone, expected = trained(made(name, SOLO, micro))
    for model, reports in together(lambda world: trained(made(name, world, micro))):
        for ours, theirs in zip(reports, expected, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.terms == pytest.approx(dict(theirs.terms), rel=1e-6)
            assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-6)
            assert (ours.step, ours.tokens, ours.dropped) == (theirs.step, theirs.tokens, theirs.dropped)
            assert all(torch.equal(load, theirs.load[layer]) for layer, load in ours.load.items())
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[key], rtol=1e-6, atol=1e-8, msg=key)


def test_ranks_share_what_was_dropped() -> None:
    # Capacity is of a micro-batch: cut alike, a rank's single sequences drop what one process drops.
    _, expected = trained(made("dropping", SOLO, 1))
    [(_, first), (_, second)] = together(lambda world: trained(made("dropping", world, 1)))
    assert expected[0].dropped > 0
    assert [report.dropped for report in first] == [report.dropped for report in second]
    assert [report.dropped for report in first] == [report.dropped for report in expected]


def test_each_rank_has_its_own_rows_and_the_position_is_everybodys() -> None:
    def rows(world: World) -> tuple[list[Tensor], int]:
        trainer = made("dense", world, 1)
        trainer.model.train()
        trainer.step(trainer.micro_batches())
        return [batch.tokens for batch in trainer.micro_batches()], trainer.state.position

    [(first, at), (second, also_at)] = together(rows)
    assert at == also_at == SEQUENCES
    wanted = batch_at(SEQUENCES, SEQUENCES).tokens
    assert torch.equal(torch.cat([*first, *second]), wanted)


@pytest.mark.parametrize("size", [3, 5])
def test_a_step_that_cannot_be_shared_evenly_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"{SEQUENCES} sequences a step cannot be shared by {size} processes"):
        made("dense", Rank(Meeting(size), 0), 1)


def test_a_request_in_the_last_step_is_answered_alike() -> None:
    class StopAtTheEnd:
        def after_step(self, trainer: Trainer, report: StepReport) -> None:
            if report.step == STEPS and trainer.world.rank == 1:
                trainer.request_stop()

        def close(self) -> None:
            pass

    def run(world: World) -> bool:
        trainer = made("dense", world, 2)
        trainer.observers = [StopAtTheEnd()]
        return trainer.run()

    assert together(run) == [False, False]


def test_a_request_to_one_rank_stops_both_after_the_same_step() -> None:
    class StopAt:
        def after_step(self, trainer: Trainer, report: StepReport) -> None:
            if report.step == 3 and trainer.world.rank == 1:
                trainer.request_stop()

        def close(self) -> None:
            pass

    def run(world: World) -> tuple[bool, int]:
        trainer = made("dense", world, 2)
        trainer.observers = [StopAt()]
        return trainer.run(), trainer.state.step

    assert together(run) == [(False, 3), (False, 3)]


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_both() -> None:
    class Poisoned:
        """Next token, and infinity on rank 1 at step 3."""

        headline = "cross_entropy"

        def __init__(self, rank: int) -> None:
            self.inner, self.rank, self.calls = NextToken(True), rank, 0

        def counts(self, batch: TokenBatch) -> dict[str, float]:
            return self.inner.counts(batch)

        def weights(self, progress: float) -> Mapping[str, float]:
            return self.inner.weights(progress)

        def terms(self, model: Transformer, batch: TokenBatch) -> Terms:
            self.calls += 1
            found = self.inner.terms(model, batch)
            if self.rank == 1 and self.calls == 3:
                return replace(found, sums={name: value * torch.inf for name, value in found.sums.items()})
            return found

    def run(world: World) -> tuple[str, int, dict[str, Tensor]]:
        trainer = made("dense", world, 2, Poisoned(world.rank))
        with pytest.raises(TrainingError) as caught:
            trained(trainer)
        return str(caught.value), trainer.state.step, trainer.model.state_dict()

    [(first, step, weights), (second, also, others)] = together(run)
    assert step == also == 2
    assert first == second
    assert first.startswith("step 3 is not finite: cross_entropy, gradient_norm")
    assert "first bad tensors: gradient of embedding.weight on every rank" in first
    assert all(torch.equal(one, others[name]) for name, one in weights.items())


def test_a_figure_of_one_rank_alone_stops_the_others_too() -> None:
    def watch(world: World) -> Callable[..., dict[str, float]]:
        return lambda parameters, norm: {"mine": float("nan") if world.rank else 1.0}

    def run(world: World) -> str:
        trainer = made("dense", world, 2)
        trainer.method = replace(trainer.method, before_update=(watch(world),))
        with pytest.raises(TrainingError) as caught:
            trained(trainer)
        return str(caught.value)

    first, second = together(run)
    assert first == second
    assert first.startswith("step 1 is not finite: mine (sequences")


def test_a_bound_of_tokens_is_of_all_ranks_together() -> None:
    """A rank reads half of a step, and would go on twice as long by its own count."""

    def run(world: World) -> tuple[int, int, bool]:
        trainer = made("dense", world, 2)
        trainer.plan = replace(trainer.plan, max_tokens=3 * SEQUENCES * LENGTH - 1)
        finished = trainer.run()
        return trainer.state.step, trainer.state.tokens, finished and trainer.done

    assert together(run) == [(3, 3 * SEQUENCES * LENGTH, True)] * 2


def test_alone_every_answer_is_the_question() -> None:
    assert (SOLO.rank, SOLO.size) == (0, 1)
    assert SOLO.sum({"a": 0.1}) == {"a": 0.1}
    tensor = torch.tensor([1, 2])
    assert SOLO.sum_tensors({3: tensor})[3] is tensor
    assert [SOLO.any(True), SOLO.any(False)] == [True, False]


@dataclass(frozen=True)
class Weightless:
    """The next token, where no sequence of `empty` counts; sequences are told by their first token."""

    inner: NextToken
    empty: Callable[[TokenBatch], bool]

    @property
    def headline(self) -> str:
        return self.inner.headline

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        return self.inner.counts(self._weighed(batch))

    def weights(self, progress: float) -> Mapping[str, float]:
        return self.inner.weights(progress)

    def terms(self, model: Transformer, batch: TokenBatch) -> Terms:
        return self.inner.terms(model, self._weighed(batch))

    def _weighed(self, batch: TokenBatch) -> TokenBatch:
        return replace(batch, weights=torch.zeros_like(batch.weights)) if self.empty(batch) else batch


def test_a_rank_without_anything_to_count_takes_part_and_a_step_without_is_passed_over_by_all() -> None:
    """What decides is the sum over ranks and pieces: one that looked at its own would wait for the other."""

    def work(world: World) -> tuple[Transformer, list[StepReport]]:
        def empty(batch: TokenBatch) -> bool:
            step = trainer.state.step
            return step == 2 or (step == 1 and world.rank == 0)

        trainer = made("top-k", world, 1, Weightless(NextToken(True), empty))
        return trained(trainer)

    (model, reports), (other, others) = together(work)
    assert [report.loss is None for report in reports] == [False, False, True, False, False, False]
    assert [report.skipped for report in others] == [0, 0, 1, 1, 1, 1]
    assert [report.loss for report in reports] == [report.loss for report in others]
    assert reports[2].tokens - reports[1].tokens == reports[1].tokens - reports[0].tokens
    for key, tensor in model.state_dict().items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor, other.state_dict()[key], rtol=1e-12, atol=1e-12, msg=key)
