"""Bytes of steps of whole models, counted while two processes run them, against the planner's: rows, latents."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from functools import cache
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
from finemoe.parallel.config import Layout
from finemoe.parallel.planner.setup import Setup, pieces_of_ranks
from finemoe.parallel.planner.traffic import collectives, rows_leaving
from parallel.processes import run, several
from parallel.tiny_layouts import LENGTH as TOKENS
from parallel.tiny_layouts import SEQUENCES as A_STEP
from parallel.tiny_layouts import Case, gradients, trainer, world_of

context: Any = pytest.importorskip("finemoe.parallel.context")
expert: Any = pytest.importorskip("finemoe.parallel.expert")
shard: Any = pytest.importorskip("finemoe.parallel.shard")

SEQUENCES, LENGTH = 2, 32


def model() -> ModelConfig:
    table = {"preset": "tiny-moe", "vocab_size": 300, "feed_forward": {"num_routed_experts": 64}}
    return expand(resolve(table, "test"))


def latent_model() -> ModelConfig:
    """Latents and rotary keys as wide as DeepSeek-V3's, in a model that is small otherwise."""
    widths = {"q_lora_rank": 8, "kv_lora_rank": 512, "qk_nope_head_dim": 6, "qk_rope_head_dim": 64, "v_head_dim": 6}
    attention = {"kind": "latent", "num_heads": 2, **widths}
    return expand(resolve({"preset": "tiny-moe", "vocab_size": 300, "attention": attention}, "test"))


def step(rank: int, store: str, queue: Any) -> None:
    """Forward and back with experts elsewhere, then with pieces of sequences, and every byte from elsewhere counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    queue.put((rank, *rows_of_a_step(mesh, rank), latents_of_a_step(mesh, rank)))
    dist.destroy_process_group()


def latents_of_a_step(mesh: Any, rank: int) -> dict[str, int]:
    """By direction, of numbers that are no integers: those are places and documents."""
    moved = {"gather": 0, "scatter": 0}
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def gathering(pieces: Any, own: Any, group: Any = None) -> Any:
        if own.is_floating_point():
            moved["gather"] += sum(one.nbytes for other, one in enumerate(pieces) if other != rank)
        return gather(pieces, own, group=group)

    def scattering(own: Any, pieces: Any, group: Any = None) -> Any:
        moved["scatter"] += sum(one.nbytes for other, one in enumerate(pieces) if other != rank)
        return scatter(own, pieces, group=group)

    dist.all_gather, dist.reduce_scatter = gathering, scattering
    built = Transformer(latent_model(), Kernels(products="torch", experts="sorted_slices"))
    initialize(built, 0)
    built.context = context.Pieces(mesh.get_group(), rank, 2)
    tokens = torch.randint(300, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    built.train()(tokens.chunk(2, dim=1)[rank]).hidden.sum().backward()
    return moved


def rows_of_a_step(mesh: Any, rank: int) -> tuple[dict[str, int], list[list[int]]]:
    """And the loads of every layer."""
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
    built = Transformer(model(), Kernels(products="torch", experts="sorted_slices"))
    initialize(built, 0)
    for layer in built.moe_layers.values():
        layer.experts = expert.DistributedExperts(layer.experts, mesh)
        layer.dispatch = expert.AllToAll(mesh.get_group(), 2)
    tokens = torch.randint(300, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(rank))
    output = built(tokens)
    output.hidden.sum().backward()
    return moved, [record.load.long().tolist() for record in output.routing.values()]


@cache
def counted() -> dict[int, tuple[dict[str, int], list[list[int]], dict[str, int]]]:
    """What each rank counted."""
    forked = multiprocessing.get_context("fork")
    queue = forked.Queue()
    with tempfile.TemporaryDirectory() as folder:
        places = [(rank, str(Path(folder) / "store"), queue) for rank in range(2)]
        started = [forked.Process(target=step, args=place, daemon=True) for place in places]
        for process in started:
            process.start()
        found = {rank: one for rank, *one in (queue.get(timeout=90) for _ in started)}
        for process in started:
            process.join(30)
    return found


def test_pieces_of_sequences_exchange_latents_and_nothing_else() -> None:
    """576 numbers a token and layer, as the planner has it."""
    config = latent_model()
    setup = Setup(sequences=SEQUENCES, micro_batch=SEQUENCES, seq_len=LENGTH, context=2, precision="fp32")
    planned = {one.name: one.total for one in collectives(config, setup, pieces_of_ranks(config, setup)[0])}
    here = SEQUENCES * LENGTH // 2
    for _, _, moved in counted().values():
        assert moved["gather"] == len(config.blocks) * here * 576 * 4 == planned["gather keys of the sequence"]
        assert moved["scatter"] == moved["gather"] == planned["sum gradients of keys"]


def test_a_step_moves_what_its_loads_say_and_the_plan_tells_the_counts() -> None:
    found = counted()
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


# ---- in bfloat16 ----

CASE = Case(torch.float32, layers=4, mtp=0, kernels="sorted_slices", bf16=True)
MIXED = {"experts": Layout(shard=2, expert=2), "FSDP2": Layout(shard=2), "stages": Layout(pipeline=2)}
_FSDP = {"all_gather_single": "gather", "all_gather_into_tensor": "gather"}
_FSDP |= {"reduce_scatter_single": "sum", "reduce_scatter_tensor": "sum"}


def mixed_step(layout: Layout) -> dict[tuple[str, torch.dtype], int]:
    """A step of a trainer in bfloat16: bytes that reached this rank, by kind of exchange and type."""
    one = trainer(CASE, world_of(layout))
    moved: Counter[tuple[str, torch.dtype]] = Counter()
    names = (*_FSDP, "all_to_all_single", "P2POp")
    real = {name: getattr(dist, name) for name in names if name in vars(dist)}

    def fsdp(name: str) -> Any:
        def counting(*given: Any, **named: Any) -> Any:
            tensors = [one for one in (*given, *named.values()) if isinstance(one, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)
            moved[_FSDP[name], whole.dtype] += whole.nbytes // 2
            return real[name](*given, **named)

        return counting

    def rows(output: Any, given: Any, received: Any = None, sent: Any = None, group: Any = None) -> Any:
        if received is not None:
            moved["rows", output.dtype] += received[1 - dist.get_rank()] * output[:1].nbytes
            moved["numbers of rows", output.dtype] += received[1 - dist.get_rank()] * output.shape[1]
        return real["all_to_all_single"](output, given, received, sent, group=group)

    def stages(operation: Any, tensor: torch.Tensor, *rest: Any) -> Any:
        if operation is dist.irecv and tensor.dim() > 1:  # not the one number by which neighbours find each other
            moved["states", tensor.dtype] += tensor.nbytes
        return real["P2POp"](operation, tensor, *rest)

    counting = {name: fsdp(name) for name in _FSDP} | {"all_to_all_single": rows, "P2POp": stages}
    try:
        for name in real:
            setattr(dist, name, counting[name])
        one.step(one.micro_batches())
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return dict(moved)


def without_mixed_precision(layout: Layout) -> dict[str, torch.Tensor]:
    """Gradients as they are where weights of experts and rows travel in float32."""
    policy, rows = shard.MixedPrecisionPolicy, expert.as_multiplied
    try:
        shard.MixedPrecisionPolicy, expert.as_multiplied = lambda **_: policy(), lambda tensor: tensor
        return gradients(CASE, layout)
    finally:
        shard.MixedPrecisionPolicy, expert.as_multiplied = policy, rows


@cache
def in_bfloat16() -> list[dict[str, list[Any]]]:
    """Of each rank: what was moved and, of what travels in 16 bits, gradients with it and without."""
    work: list[tuple[Any, ...]] = []
    for layout in MIXED.values():
        work += [(mixed_step, layout), (gradients, CASE, layout), (without_mixed_precision, layout)]
    ranks = run(2, several, work, deadline=300)
    return [{name: found[3 * at : 3 * at + 3] for at, name in enumerate(MIXED)} for found in ranks]


def planned_of(name: str) -> list[dict[str, float]]:
    """By rank."""
    config = trainer(CASE, world_of(None)).model.config
    layout = MIXED[name]
    setup = Setup.of(layout, sequences=A_STEP, seq_len=TOKENS, micro_batch=CASE.micro)
    held = pieces_of_ranks(config, setup)
    held = held if layout.pipeline > 1 else held * 2
    return [{one.name: one.total for one in collectives(config, setup, pieces)} for pieces in held]


@pytest.mark.parametrize("name", MIXED)
def test_a_step_in_bfloat16_moves_what_is_planned(name: str) -> None:
    """Experts' weights and rows in 16 bits, other weights, gradients and the states between stages in 32.

    Within 2 %: this model has tensors that two processes cannot halve, of which each gets as much as the longer half.
    """
    for planned, found in zip(planned_of(name), in_bfloat16(), strict=True):
        moved = found[name][0]
        experts, rows = planned.get("gather weights of experts", 0), "dispatch" in planned
        others = sum(planned.get(f"gather {one}", 0) for one in ("weights of blocks", "embedding and head"))
        summed = sum(bytes for one, bytes in planned.items() if one.startswith("sum gradients"))
        states = sum(bytes for one, bytes in planned.items() if "stage" in one)
        expected = {("gather", torch.bfloat16): experts, ("gather", torch.float32): others}
        expected |= {("sum", torch.float32): summed, ("states", torch.float32): states}
        travelled = {key: bytes for key, bytes in moved.items() if "rows" not in key[0] and bytes}
        assert travelled == {key: pytest.approx(bytes, rel=0.02) for key, bytes in expected.items() if bytes}
        assert {key[1] for key in moved if "rows" in key[0]} == ({torch.bfloat16} if rows else set())
        if rows:
            four = sum(planned[one] for one in ("dispatch", "combine", "combine, backward", "dispatch, backward"))
            assert moved["rows", torch.bfloat16] == 2 * moved["numbers of rows", torch.bfloat16]
            assert moved["rows", torch.bfloat16] == pytest.approx(four, rel=0.2), "an untrained router is nearly even"


@pytest.mark.parametrize("name", MIXED)
def test_what_travels_in_16_bits_changes_no_bit(name: str) -> None:
    _, *both = in_bfloat16()[0][name]
    ours, wide = (one.gradients for one in both)
    assert ours.keys() == wide.keys()
    assert all(torch.equal(ours[key], wide[key]) for key in wide)
