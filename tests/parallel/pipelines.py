"""What each rank of a small pipeline does in tests, and the same in one process; in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from finemoe.core.errors import ConfigError
from finemoe.data.batch import TokenBatch
from finemoe.model.config import ModelConfig
from finemoe.model.transformer import Transformer
from finemoe.parallel.passes import Execute, OneAfterAnother, Passes
from finemoe.parallel.pipeline import Pipeline
from finemoe.parallel.relay import Relay
from finemoe.parallel.stages import Cut, Elsewhere, keep_only
from finemoe.parallel.world import SOLO
from finemoe.training.balancing import BalancingConfig, MoveBiases
from finemoe.training.losses.next_token import NextToken
from finemoe.training.objective import Terms, balance_sums
from finemoe.training.validation import validate
from oracles.models import VOCAB, build, moe_table, small_config

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "ahead": {"mtp_depth": 1},
    "tied ahead": {"tie_embeddings": True, "mtp_depth": 1},
    "biased": {
        "feed_forward": moe_table(router={"kind": "sigmoid_biased"}, balance={"sequence": 0.1}),
        "tie_embeddings": True,
        "num_layers": 4,
    },
    "dropping": {"feed_forward": moe_table(capacity_factor=0.5, balance={"expert": 0.1})},
}
ROWS = (2, 2, 2, 2, 2, 1)
"""Rows of each micro-batch: the last is shorter, so that states are padded on their way."""
LENGTH = 9


def config_of(name: str) -> ModelConfig:
    """One dense block and five mixtures, with two balance losses unless the model says otherwise."""
    mixture = moe_table(balance={"expert": 0.3, "sequence": 0.2})
    return small_config(**{"num_layers": 6, "init_std": 0.15, "feed_forward": mixture, **MODELS[name]})


def batches_of(step: int) -> list[TokenBatch]:
    """Documents, positions that begin again, weights some of which are 0."""
    return [batch_of(1000 * step + number, rows, LENGTH) for number, rows in enumerate(ROWS)]


def batch_of(seed: int, rows: int, length: int) -> TokenBatch:
    """Documents of five tokens."""
    tokens = torch.randint(VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(length).expand(rows, length)
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], (place % 3 > 0).float() * (1 + place % 2), place % 5, place // 5)


@dataclass(frozen=True)
class ByDocument:
    """Next token of single rows of documents that have nothing to do with each other; rows differ in length."""

    calls: int = 1

    def counts(self, batch: TokenBatch) -> dict[str, float]:
        return {"cross_entropy": batch.weights.sum().item(), "expert": int(batch.documents[0, -1]) + 1.0}

    def weights(self, progress: float) -> Mapping[str, float]:
        return {"expert": 0.5}

    def terms(self, model: Any, batch: TokenBatch) -> Terms:
        for _ in range(self.calls):
            output = model(batch.tokens, positions=batch.positions, documents=batch.documents, by_document=True)
        hidden, targets, weights = output.hidden.flatten(0, 1), batch.targets.flatten(), batch.weights.flatten()
        loss = model.backend.cross_entropy_sum(hidden, model.head_weight, targets, weights)
        expert = balance_sums(output.routing).get("expert")  # "sequence" is no term of this objective
        return Terms({"cross_entropy": loss} | ({} if expert is None else {"expert": expert}), output.routing)


def begin(
    name: str, schedule: str | None, dtype: torch.dtype = torch.float64, **kernels: Any
) -> tuple[Transformer, Execute]:
    """The model, or this rank's part of it, and what runs its passes."""
    config = config_of(name)
    model = build(config, **kernels).to(dtype).train()
    if schedule is None:
        return model, OneAfterAnother(model)
    cut = Cut.of(config, schedule, distributed.get_world_size())  # type: ignore[arg-type]
    keep_only(model, cut, distributed.get_rank())
    return model, Pipeline(model, cut, distributed.group.WORLD)


def pass_through(
    execute: Execute,
    objective: Any,
    batches: list[TokenBatch],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Passes:
    """Gradients of a step."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    return execute(objective, batches, counts, objective.weights(0.0), autocast)


def norm_of(model: Transformer, execute: Execute) -> Tensor:
    """Of all gradients of the whole model."""
    parameters = dict(model.named_parameters())
    if isinstance(execute, Pipeline):
        return execute.norm(SOLO.norm(execute.counted(parameters)))
    return SOLO.norm(parameters)


def found(model: Transformer, execute: Execute, done: Passes) -> dict[str, Any]:
    """What a step left behind."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "norm": norm_of(model, execute).item(), "passes": done}


def gradients(name: str, schedule: str | None, **kernels: Any) -> dict[str, Any]:
    """One step."""
    model, execute = begin(name, schedule, **kernels)
    objective = NextToken(True, mtp_depth=len(model.config.mtp))
    return found(model, execute, pass_through(execute, objective, batches_of(0)))


def frozen(schedule: str | None) -> dict[str, Any]:
    """One step in which the last block learns, the head, and nothing before them."""
    model, execute = begin("untied", schedule)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.5", "head")))
    return found(model, execute, pass_through(execute, NextToken(True), batches_of(0)))


def packed(schedule: str | None) -> dict[str, Any]:
    """Two steps with rows of other lengths in each; gradients add up."""
    model, execute = begin("untied", schedule)
    for lengths in ([7, 12, 9, 16], [21, 12, 9, 16]):
        batches = [batch_of(length, 1, length) for length in lengths]
        done = pass_through(execute, ByDocument(), batches)
    return found(model, execute, done)


def few(schedule: str | None, micro_batches: int) -> dict[str, Any]:
    """One step of fewer micro-batches than stages."""
    model, execute = begin("untied", schedule)
    return found(model, execute, pass_through(execute, NextToken(True), batches_of(0)[:micro_batches]))


def twice(schedule: str) -> None:
    """An objective that runs the model again."""
    _, execute = begin("untied", schedule)
    pass_through(execute, ByDocument(calls=2), [batch_of(number, 1, 9) for number in range(4)])


def in_bfloat16(schedule: str | None) -> dict[str, Any]:
    """One step of float32 weights, products in bfloat16."""
    model, execute = begin("untied", schedule, dtype=torch.float32)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    return found(model, execute, pass_through(execute, NextToken(True), batches_of(0), autocast))


def hooked(schedule: str) -> str:
    """What is said of weights that a stand-in trains."""
    model, execute = begin("ahead", schedule)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    try:
        pass_through(execute, NextToken(True, mtp_depth=1), batches_of(0))
    except ConfigError as error:
        return str(error)
    return "nothing"


def sharded(schedule: str) -> dict[str, Any]:
    """One step on two pipelines of two ranks each, weights spread over the pipelines: half of the rows each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "shard"))
    config = config_of("tied ahead")
    model = build(config).double().train()
    cut = Cut.of(config, schedule, 2)  # type: ignore[arg-type]
    keep_only(model, cut, mesh.get_local_rank("pipeline"))
    blocks = [block for block in model.blocks if not isinstance(block, Elsewhere)]
    for part in (*blocks, *(module.block for module in model.mtp), model):
        fully_shard(part, mesh=mesh["shard"])
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    execute = Pipeline(model, cut, mesh.get_group("pipeline"))
    objective = NextToken(True, mtp_depth=1)
    counts: dict[str, float] = {}
    for batch in [*batches_of(0), *batches_of(1)]:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    execute(objective, batches_of(mesh.get_local_rank("shard")), counts, objective.weights(0.0), nullcontext)
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def both_halves() -> dict[str, Tensor]:
    """The same in one process."""
    model, execute = begin("tied ahead", None)
    pass_through(execute, NextToken(True, mtp_depth=1), [*batches_of(0), *batches_of(1)])
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def trained(name: str, schedule: str | None, steps: int) -> dict[str, Any]:
    """Weights after some steps of AdamW, clipped, with moving biases; what each step came to."""
    model, execute = begin(name, schedule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    move = MoveBiases(BalancingConfig(rate=0.01))
    passes, norms = [], []
    for step in range(steps):
        model.zero_grad()
        done = pass_through(execute, NextToken(True), batches_of(step)[:4])
        norm = norm_of(model, execute)
        nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        move(model, done.load, 0.0)
        passes.append(done)
        norms.append(norm.item())
    return {"weights": model.state_dict(), "passes": passes, "norms": norms}


def measured(name: str, schedule: str | None) -> dict[str, Any]:
    """Validation as every rank sees it, the objective's sums in eval mode, logits."""
    model, execute = begin(name, schedule)
    seen: Any = Relay(model, execute.cut, execute.group) if isinstance(execute, Pipeline) else model
    validation = validate(seen, batches_of(0)[-2:], isolate_documents=True, bytes_per_token=1.0)
    assert model.training
    seen.eval()
    batch = batches_of(1)[0]
    with torch.no_grad():
        objective = NextToken(True, mtp_depth=len(model.config.mtp))
        sums = {name: value.item() for name, value in objective.terms(seen, batch).sums.items()}
        logits = seen.logits(seen(batch.tokens).hidden)
    return {"loss": validation.loss, "load": dict(validation.load), "sums": sums, "logits": logits}
