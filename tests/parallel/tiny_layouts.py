"""A few steps of a tiny DeepSeek-V3 by any layout: what each rank reports, and the whole weights at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finemoe.data.batch import TokenBatch
from finemoe.parallel.config import Layout
from finemoe.parallel.processes import Processes
from finemoe.parallel.shard import pieces
from finemoe.parallel.world import SOLO
from finemoe.training.balancing import BalancingConfig, MoveBiases
from finemoe.training.gradients import Clip
from finemoe.training.losses.next_token import NextToken
from finemoe.training.method import Figures, Method
from finemoe.training.optimizers import AdamWConfig
from finemoe.training.report import StepReport
from finemoe.training.schedule import MultiStepConfig
from finemoe.training.trainer import Plan, Trainer
from oracles.models import LATENT, VOCAB, build, moe_table, small_config

LENGTH, SEQUENCES = 12, 8
OPTIMIZER = AdamWConfig(learning_rate=4e-3, max_gradient_norm=1.0)

LAYOUTS = {
    "replicate 2": Layout(replicate=2),
    "shard 2": Layout(shard=2),
    "shard 2, experts 2": Layout(shard=2, expert=2),
    "replicate 2, shard 2": Layout(replicate=2, shard=2),
    "shard 4, experts 2": Layout(shard=4, expert=2),
    "context 2": Layout(context=2),
    "shard 2, context 2, experts 2": Layout(shard=2, context=2, expert=2),
    "pipeline 2": Layout(pipeline=2),
    "pipeline 2, V": Layout(pipeline=2, schedule="dualpipev"),
    "pipeline 2, shard 2, experts 2": Layout(pipeline=2, shard=2, expert=2),
}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    dtype: torch.dtype = torch.float64
    steps: int = 20
    layers: int = 3
    micro: int = 2
    """Sequences at once on a rank: two processes take two passes a step, four take one."""
    kernels: str = "sorted_slices"
    mtp: int = 1
    tied: bool = False
    recompute: bool = False
    num_experts: int = 8
    moments: str = "fp32"
    bf16: bool = False
    average: bool = False
    """Gradients as FSDP leaves them unless it is told: the mean over processes."""


def batch_at(position: int, rows: int) -> TokenBatch:
    """Row `i` depends on `i` alone; two documents a row, and a third of the weights are 0."""
    made = [
        torch.randint(VOCAB, (LENGTH + 1,), generator=torch.Generator().manual_seed(position + i)) for i in range(rows)
    ]
    tokens, place = torch.stack(made), torch.arange(LENGTH).expand(rows, LENGTH)
    weights = (place % 3 > 0).float() * (1 + place % 2)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], weights, positions=place % 7, documents=place // 7)


class Rows:
    """Data without a text behind it."""

    batch = staticmethod(batch_at)


def trainer(case: Case, world: Any) -> Trainer:
    """Drawn alike on every rank, then cut."""
    table = moe_table(
        num_routed_experts=case.num_experts,
        router={"kind": "sigmoid_biased", "num_groups": 2, "groups_per_token": 2},
        balance={"sequence": 0.1},
    )
    config = small_config(
        num_layers=case.layers,
        attention=LATENT,
        feed_forward=table,
        mtp_depth=case.mtp,
        tie_embeddings=case.tied,
        init_std=0.1,
    )
    model = build(config, experts=case.kernels, recompute=case.recompute).to(case.dtype)
    method = Method(
        Rows(),  # type: ignore[arg-type]
        NextToken(True, mtp_depth=case.mtp),
        lambda model: Figures({"nothing": 0.0}),
        before_update=(Clip(OPTIMIZER.max_gradient_norm),),
        after_update=(MoveBiases(BalancingConfig(rate=0.01)),),
    )
    plan = Plan(case.steps, SEQUENCES, case.micro, torch.device("cpu"), bf16=case.bf16)
    optimizer = OPTIMIZER.model_copy(update={"moments": case.moments})
    made = Trainer(model, method, optimizer, MultiStepConfig(warmup_share=0.1), plan, world=world)
    if case.average:
        for module in pieces(model):
            module.set_gradient_divide_factor(float(world.size))
    made.model.train()
    return made


@cache
def world_of(layout: Layout | None) -> Any:
    """One for all that a process does by a layout: groups of gloo have threads that never sleep for long."""
    return SOLO if layout is None else Processes(layout, torch.device("cpu"))


def trained(case: Case, layout: Layout | None) -> tuple[list[StepReport], dict[str, Tensor]]:
    """Reports of all steps, and whole weights (on rank 0)."""
    world = world_of(layout)
    one = trainer(case, world)
    reports = [replace(one.step(one.micro_batches()), seconds=0.0) for _ in range(case.steps)]
    return reports, world.gathered(one.model.state_dict())


def gradients(case: Case, layout: Layout | None) -> dict[str, Tensor]:
    """Whole gradients after one backward pass over a step, before the clip (on rank 0)."""
    world = world_of(layout)
    one = trainer(case, world)
    batches = one.micro_batches()
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in one.method.objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    one._accumulate(batches, world.sum(counts))
    world.sum_gradients(one.parameters.values())
    return world.gathered({name: p.grad for name, p in one.parameters.items() if p.grad is not None})
