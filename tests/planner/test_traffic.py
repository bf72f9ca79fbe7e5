"""Bytes of every collective: against counts by hand, and against two processes that exchange rows."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import resolve
from finemoe.model.size import measure
from finemoe.parallel.planner.memory import copied_bytes, kept_bytes, memory_of_ranks, peak_memory
from finemoe.parallel.planner.published import model_of
from finemoe.parallel.planner.setup import Piece, Setup, parameters_of, pieces_of_ranks
from finemoe.parallel.planner.traffic import collectives, over_network, rows_leaving, rows_received

TINY: dict[str, Any] = {"preset": "tiny-moe", "vocab_size": 300}


def tiny() -> ModelConfig:
    return expand(resolve(TINY, "test"))


def whole(config: ModelConfig) -> tuple[Piece, ...]:
    return (Piece(tuple(range(len(config.blocks))), True, True),)


def by_name(config: ModelConfig, setup: Setup) -> dict[str, float]:
    return {one.name: one.total for one in collectives(config, setup, pieces_of_ranks(config, setup)[0])}


def test_one_process_moves_nothing() -> None:
    assert by_name(tiny(), Setup(sequences=4, seq_len=64)) == {}


def test_sharded_weights_come_twice_and_gradients_go_once() -> None:
    config = tiny()
    parts = parameters_of(config, whole(config))
    setup = Setup(sequences=16, seq_len=64, micro_batch=2, shard=4, precision="fp32")
    assert by_name(config, setup) == {
        "gather weights of blocks": pytest.approx(2 * 2 * 4 * parts.blocks * 3 / 4),
        "gather embedding and head": pytest.approx(2 * 4 * parts.root * 3 / 4),
        "gather weights of experts": pytest.approx(2 * 2 * 4 * parts.experts * 3 / 4),
        "sum gradients": pytest.approx(2 * 4 * (parts.blocks + parts.root) * 3 / 4),
        "sum gradients of experts": pytest.approx(2 * 4 * parts.experts * 3 / 4),
    }


def test_once_a_step_is_once() -> None:
    config = tiny()
    often = Setup(sequences=32, seq_len=64, micro_batch=2, shard=4)
    once = Setup(sequences=32, seq_len=64, micro_batch=2, shard=4, gather="step", reduce="step")
    assert often.micro_batches == 4
    assert by_name(config, often)["gather weights of blocks"] == 8 * by_name(config, once)["gather weights of blocks"]
    assert by_name(config, often)["sum gradients"] == 4 * by_name(config, once)["sum gradients"]


def test_copies_are_summed_over_what_is_sharded() -> None:
    config = tiny()
    parts = parameters_of(config, whole(config))
    setup = Setup(sequences=8, seq_len=64, replicate=2, shard=4)
    beyond = 2 * 4 * (parts.blocks + parts.root + parts.experts) / 4 / 2
    assert by_name(config, setup)["sum gradients over copies"] == pytest.approx(beyond)


def test_v3s_rows_are_those_of_its_report() -> None:
    """Per token and layer: dispatch 7,168 bytes a copy in FP8, combine 14,336 in 16 bits, and the backward's again."""
    config = model_of("deepseek-v3")
    setup = Setup(sequences=1, seq_len=4096, context=64, expert=64, precision="fp8")
    found = {one.name: one.size for one in collectives(config, setup, whole(config))}
    layers, copies = 58 + 1, 8 * 63 / 64
    assert found["dispatch"] / setup.tokens == pytest.approx(layers * copies * 7168)
    assert found["combine"] / setup.tokens == pytest.approx(layers * copies * 14336)
    assert found["dispatch, backward"] == found["combine, backward"] == found["combine"]


def test_a_row_crosses_once_a_node_and_no_further_than_its_groups() -> None:
    layer = model_of("deepseek-v3").blocks[-1].feed_forward
    apart = Setup(sequences=1, seq_len=4096, context=64, expert=64)
    together = Setup(sequences=1, seq_len=4096, context=64, expert=64, once_a_node=True)
    assert over_network(layer, apart, 64) == 0  # type: ignore[arg-type]
    assert over_network(layer, apart, 8) == pytest.approx(7 / 8 / (63 / 64))  # type: ignore[arg-type]
    assert over_network(layer, together, 8) == pytest.approx(4 * 7 / 8 / (8 * 63 / 64))  # type: ignore[arg-type]


def test_stages_pass_states_on_and_a_v_turns_for_nothing() -> None:
    config = model_of("deepseek-v2")
    setup = Setup(sequences=16, seq_len=128, pipeline=4)
    size = 128 * config.hidden_size * 4
    ranks = pieces_of_ranks(config, setup)
    sent = [{one.name: one.total for one in collectives(config, setup, held)} for held in ranks]
    before, after = "states from the stage before", "gradients from the stage after"
    assert [one.get(before, 0) for one in sent] == [0, *[16 * size] * 3]
    assert [one.get(after, 0) for one in sent] == [*[16 * size] * 3, 0]
    turned = Setup(sequences=16, seq_len=128, pipeline=4, schedule="zbv")
    last = pieces_of_ranks(config, turned)[-1]
    assert {one.name: one.total for one in collectives(config, turned, last)}[before] == 16 * size


def test_in_16_bits_travels_what_is_kept_so() -> None:
    """finemoe keeps norms, routers and its residual stream in float32, whatever products are in; others do not."""
    config = model_of("deepseek-v2")
    table = {"sequences": 64, "seq_len": 128, "pipeline": 2, "shard": 4, "expert": 2}
    ours, theirs, plain = (
        by_name(config, Setup(**table, **more)) for more in ({}, {"narrow": True}, {"precision": "fp32"})
    )
    halved = {name for name in ours if ours[name] == plain[name] / 2}
    assert halved == {
        "gather weights of experts", "dispatch", "combine", "combine, backward", "dispatch, backward",
    }  # fmt: skip
    assert all(ours[name] == plain[name] for name in ours.keys() - halved)
    also = {"gather weights of blocks", "gather embedding and head", "gradients from the stage after"}
    assert {name for name in theirs if theirs[name] == plain[name] / 2} == halved | also


def test_what_is_gathered_lies_there_as_it_travels_and_what_is_cast_beside_it() -> None:
    config = model_of("qwen3-30b-a3b")
    parts = parameters_of(config, whole(config))
    root, blocks = parts.root, parts.blocks
    table = {"sequences": 64, "seq_len": 128, "shard": 8, "expert": 4}
    two, experts = 2 * parts.largest_block + root, 2 * parts.largest_experts // 4

    def gathered(**more: Any) -> int:
        return peak_memory(config, Setup(**{**table, **more})).gathered

    assert gathered(precision="fp32") == 4 * (two + experts)
    assert gathered() == 4 * two + 2 * experts + 2 * (blocks + root)
    assert gathered(narrow=True) == 2 * (two + experts)
    assert gathered(shard=1, expert=1) == 2 * (blocks + root + parts.experts)
    assert gathered(narrow=True, gather="step") == 2 * (blocks + root + parts.experts // 4)


def test_a_sequence_in_pieces_gathers_latents() -> None:
    config = model_of("deepseek-v2")
    setup = Setup(sequences=2, seq_len=256, context=4)
    found = {one.name: one.total for one in collectives(config, setup, whole(config))}
    assert found["gather keys of the sequence"] == 2 * 60 * 576 * 64 * 2 * 3
    assert found["sum gradients of keys"] == 2 * 60 * 576 * 64 * 4 * 3, "sums are in float32"


def test_parameters_of_pieces_are_those_of_the_model() -> None:
    for name in ("deepseek-v3", "qwen3-30b-a3b", "llama3-8b"):
        config = model_of(name)
        size = measure(config, 128)
        for schedule, ranks, virtual in (("1f1b", 1, 1), ("1f1b", 8, 1), ("interleaved", 4, 3), ("dualpipev", 8, 1)):
            setup = Setup(sequences=96, seq_len=128, pipeline=ranks, schedule=schedule, virtual=virtual)
            held = [parameters_of(config, pieces) for pieces in pieces_of_ranks(config, setup)]
            total = sum(part.blocks + part.experts + part.root for part in held)
            apart = schedule != "dualpipev" and ranks > 1  # then prediction modules have an embedding of their own
            copy = config.vocab_size * config.hidden_size if config.mtp and apart else 0
            assert total == size.total_parameters + size.mtp_parameters + copy


def test_uneven_experts_lengthen_rows_and_what_they_keep() -> None:
    """Complaint 14 of distribution: what fits with even experts runs out of memory with uneven ones."""
    config = model_of("qwen3-30b-a3b")
    setup = Setup(sequences=8, seq_len=4096, shard=8, expert=8)
    even, uneven = peak_memory(config, setup), peak_memory(config, setup, 1.0)
    assert uneven.exchange == pytest.approx(1.5 * even.exchange)
    copied = copied_bytes(config.blocks[0], config.hidden_size, 2)
    assert uneven.activations - even.activations == pytest.approx(4096 * (48 + 1) * copied, abs=2)
    assert uneven.state == even.state
    dense = model_of("llama3-8b")
    assert peak_memory(dense, setup, 1.0) == peak_memory(dense, setup)


def test_recompute_keeps_an_input_a_block() -> None:
    config = model_of("qwen3-30b-a3b")
    kept = [kept_bytes(block, config.hidden_size, 2) for block in config.blocks]
    plain = memory_of_ranks(config, Setup(sequences=1, seq_len=4096))[0]
    again = memory_of_ranks(config, Setup(sequences=1, seq_len=4096, recompute=True))[0]
    assert plain.activations == 4096 * (sum(kept) + max(kept))
    assert again.activations == 4096 * (4 * 48 * 2048 + 2 * max(kept))


# ---- two processes ----

TOKENS, LAYERS, HIDDEN, EXPERTS, TOP = 24, 2, 16, 8, 2


class Exchange(torch.autograd.Function):
    """All-to-all of rows, and of their gradients the other way; counts what comes from elsewhere."""

    moved = 0

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.splits = sent, received
        return Exchange.all_to_all(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        sent, received = ctx.splits
        return Exchange.all_to_all(grad, received, sent), None, None

    @staticmethod
    def all_to_all(rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        output = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(output, rows.contiguous(), received, sent)
        elsewhere = sum(count for rank, count in enumerate(received) if rank != dist.get_rank())
        Exchange.moved += elsewhere * rows[:1].numel() * rows.element_size()
        return output


def exchange(rank: int, store: str, choices: list[list[list[int]]], queue: Any) -> None:
    """LAYERS layers of experts that double their rows, forward and back."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    states = hidden
    for layer in choices:
        chosen = torch.tensor(layer).flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=EXPERTS).view(2, -1)
        coming = Exchange.all_to_all(counts.view(-1), [EXPERTS // 2] * 2, [EXPERTS // 2] * 2).view(2, -1)
        sent, received = counts.sum(1).tolist(), coming.sum(1).tolist()
        rows = Exchange.apply(states[order // TOP], sent, received)
        back = Exchange.apply(2 * rows, received, sent)
        states = states + torch.zeros_like(states).index_add(0, order // TOP, back)
    states.sum().backward()
    queue.put((rank, Exchange.moved))
    dist.destroy_process_group()


def moved_by(choices: list[list[list[list[int]]]]) -> list[int]:
    """Bytes that reached each of two processes; `choices` by process, layer, token."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started = [context.Process(target=exchange, args=(r, store, choices[r], queue), daemon=True) for r in range(2)]
        for process in started:
            process.start()
        found = dict(queue.get(timeout=60) for _ in started)
        for process in started:
            process.join(30)
    return [found[0], found[1]]


def small() -> ModelConfig:
    feed_forward = {
        "kind": "moe", "num_routed_experts": EXPERTS, "experts_per_token": TOP, "expert_hidden_size": 8,
        "router": {"kind": "softmax_topk"},
    }  # fmt: skip
    attention = {"kind": "grouped_query", "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    table = {"vocab_size": 64, "hidden_size": HIDDEN, "num_layers": LAYERS, "attention": attention}
    return expand(resolve({**table, "feed_forward": feed_forward}, "test"))


def test_planned_bytes_are_those_that_two_processes_move() -> None:
    """Evenly routed, the plan's four exchanges and the counts are the bytes that were counted, exactly."""
    even = [[[(t * TOP + i + layer) % EXPERTS for i in range(TOP)] for t in range(TOKENS)] for layer in range(LAYERS)]
    setup = Setup(sequences=2, seq_len=TOKENS, shard=2, expert=2, precision="fp32")
    found = by_name(small(), setup)
    names = ("counts of rows", "dispatch", "combine", "combine, backward", "dispatch, backward")
    assert moved_by([even, even]) == [sum(found[name] for name in names)] * 2


def test_counted_loads_give_the_bytes_of_uneven_routing() -> None:
    """Where routing is uneven, the rows that leave and that come follow from the loads."""
    generator = torch.Generator().manual_seed(0)
    skewed = torch.tensor([8.0, 4, 2, 1, 1, 1, 1, 1])
    choices = [
        [torch.multinomial(skewed.expand(TOKENS, -1), TOP, generator=generator).tolist() for _ in range(LAYERS)]
        for _ in range(2)
    ]
    expected = [0.0, 0.0]
    for layer in range(LAYERS):
        counts = [torch.bincount(torch.tensor(choices[r][layer]).flatten(), minlength=EXPERTS).tolist() for r in (0, 1)]
        leaving, received = rows_leaving(counts, 2), rows_received(counts, 2)
        assert sum(received) == 2 * TOKENS * TOP
        for rank in (0, 1):
            # Rows of others come for my experts, and mine come back from theirs: each once forward and once back.
            expected[rank] += 2 * 4 * HIDDEN * (leaving[1 - rank] + leaving[rank]) + 8 * EXPERTS / 2
    assert moved_by(choices) == expected
