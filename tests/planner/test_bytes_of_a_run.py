"""Bytes of an expert-parallel step of a whole model, counted while two processes run it, against the planner's."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from finemoe.model.config import Kernels, ModelConfig, expand
from finemoe.model.initialize import initialize
from finemoe.model.presets import resolve
from finemoe.model.transformer import Transformer
from finemoe.parallel.planner.setup import Setup, pieces_of_ranks
from finemoe.parallel.planner.traffic import collectives, rows_leaving

expert: Any = pytest.importorskip("finemoe.parallel.expert")

SEQUENCES, LENGTH = 2, 32


def model() -> ModelConfig:
    table = {"preset": "tiny-moe", "vocab_size": 300, "feed_forward": {"num_routed_experts": 64}}
    return expand(resolve(table, "test"))


def step(rank: int, store: str, queue: Any) -> None:
    """Forward and back, with every byte from elsewhere counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    moved = {"rows": 0, "counts": 0}
    real = dist.all_to_all_single

    def counting(output: Any, given: Any, received: Any = None, sent: Any = None, group: Any = None) -> Any:
        if received is None:
            moved["counts"] += output.numel() * output.element_size() // 2
        else:
            elsewhere = sum(rows for other, rows in enumerate(received) if other != rank)
            moved["rows"] += elsewhere * output.shape[1] * output.element_size()
        return real(output, given, received, sent, group=group)

    dist.all_to_all_single = counting
    mesh = init_device_mesh("cpu", (2,))
    built = Transformer(model(), Kernels(products="torch", experts="sorted_slices"))
    initialize(built, 0)
    for layer in built.moe_layers.values():
        layer.experts = expert.DistributedExperts(layer.experts, mesh)
        layer.dispatch = expert.AllToAll(mesh.get_group(), 2)
    tokens = torch.randint(300, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(rank))
    output = built(tokens)
    output.hidden.sum().backward()
    queue.put((rank, moved, [record.load.long().tolist() for record in output.routing.values()]))
    dist.destroy_process_group()


def test_a_step_moves_what_its_loads_say_and_the_plan_tells_the_counts() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        places = [(rank, str(Path(folder) / "store"), queue) for rank in range(2)]
        started = [context.Process(target=step, args=place, daemon=True) for place in places]
        for process in started:
            process.start()
        found = {rank: (moved, loads) for rank, moved, loads in (queue.get(timeout=90) for _ in started)}
        for process in started:
            process.join(30)
    config = model()
    layers = range(len(found[0][1]))
    leaving = [sum(rows_leaving([found[0][1][layer], found[1][1][layer]], 2)) for layer in layers]
    setup = Setup(
        sequences=2 * SEQUENCES, micro_batch=SEQUENCES, seq_len=LENGTH, shard=2, expert=2, precision="fp32"
    )  # fmt: skip
    planned = {one.name: one.total for one in collectives(config, setup, pieces_of_ranks(config, setup)[0])}
    for rank in range(2):
        moved = found[rank][0]
        assert moved["rows"] == 2 * 4 * config.hidden_size * sum(leaving), "each row once there and back, twice"
        assert moved["counts"] == planned["counts of rows"]
    even = sum(planned[name] for name in ("dispatch", "combine", "combine, backward", "dispatch, backward"))
    assert moved["rows"] == pytest.approx(even, rel=0.2), "an untrained router is nearly even"
