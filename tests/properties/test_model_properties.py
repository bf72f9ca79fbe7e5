"""What holds for every batch, whatever is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finemoe.model.attention.latent import LatentAttention
from finemoe.model.moe.decision import RoutingConstraint, RoutingDecision
from finemoe.model.moe.dispatch import LocalDispatch
from finemoe.model.moe.routers import ROUTERS
from finemoe.model.moe.routers.hash_layer import HashLayerConfig, HashLayerRouter
from finemoe.model.moe.routers.select import GroupsConfig, select
from finemoe.model.moe.routers.sigmoid_biased import SigmoidBiasedRouter
from finemoe.model.transformer import Transformer
from oracles.models import LATENT, VOCAB, build, moe_layer, moe_table, small_config, v3_config

SEEDS = st.integers(0, 2**32 - 1)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # float32, the same sums in another order
MODELS = {
    **{kind: build(small_config(num_layers=3, feed_forward=moe_table(kind))).eval() for kind in ROUTERS},
    "V3": build(v3_config(num_layers=3)).eval(),
    "V2-Lite": build(
        small_config(num_layers=3, attention={**LATENT, "q_lora_rank": None}, feed_forward=moe_table("group_limited"))
    ).eval(),
}
FORMS = ["auto", "expanded", "absorbed"]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distinct(expert_ids: Tensor) -> bool:
    return all(len(set(row)) == len(row) for row in expert_ids.tolist())


def merit(router: Any, decision: RoutingDecision) -> Tensor:
    """What a router ranks experts by."""
    biased = isinstance(router, SigmoidBiasedRouter)
    if not biased and decision.logits is None:
        return torch.zeros_like(decision.scores)  # a table ranks nothing
    return decision.scores + router.selection_bias if biased else decision.scores


def reach(router: Any, experts: int) -> int:
    """How many experts a token may choose among."""
    config = router.config
    return experts // config.num_groups * config.groups_per_token if isinstance(config, GroupsConfig) else experts


def expected_gates(router: Any, decision: RoutingDecision) -> Tensor:
    """Unbiased scores of the chosen, over their sum where normalised."""
    gates = decision.scores.gather(1, decision.expert_ids)
    # 1e-20: where every score underflows the gates fade to 0, in DeepSeek's code too
    return gates / (gates.sum(1, keepdim=True) + 1e-20) if isinstance(router, SigmoidBiasedRouter) else gates


@st.composite
def routed(draw: st.DrawFn) -> tuple[Any, Tensor, Tensor, int, int]:
    """A drawn router of any kind, hidden states and token ids, the number of experts and of choices."""
    kind = draw(st.sampled_from(sorted(ROUTERS)))
    experts = draw(st.integers(1, 9))
    router: dict[str, Any] = {"kind": kind}
    reach = experts
    if issubclass(ROUTERS[kind][0], GroupsConfig):
        num_groups = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
        per_token = draw(st.integers(1, num_groups))
        router |= {"num_groups": num_groups, "groups_per_token": per_token}
        reach = experts // num_groups * per_token
    if kind == "sigmoid_biased":
        router["score_function"] = draw(st.sampled_from(["sigmoid", "sqrtsoftplus"]))
    k = draw(st.integers(1, reach))
    seed = draw(SEEDS)
    layer = moe_layer(moe_table(router=router, num_routed_experts=experts, experts_per_token=k), seed)
    if kind == "sigmoid_biased":
        offset = draw(st.sampled_from([-100.0, 0.0, 100.0]))  # negative throughout, mixed, positive throughout
        layer.router.selection_bias.normal_(offset, 1.0, generator=random(seed))
    count = draw(st.integers(1, 12))
    hidden = torch.randn(count, 16, generator=random(seed)) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    return layer.router, hidden, torch.randint(VOCAB, (count,), generator=random(seed)), experts, k


@given(routed())
def test_every_router_picks_k_distinct_experts(drawn: tuple[Any, Tensor, Tensor, int, int]) -> None:
    router, hidden, tokens, experts, k = drawn
    decision = router(hidden, tokens, None)
    assert decision.expert_ids.shape == decision.gate_weights.shape == (len(hidden), k)
    assert decision.scores.shape == (len(hidden), experts)
    assert distinct(decision.expert_ids)
    assert 0 <= decision.expert_ids.min() <= decision.expert_ids.max() < experts
    assert (decision.gate_weights >= 0).all()


@given(routed(), st.data())
def test_every_router_honours_allowed_experts(drawn: tuple[Any, Tensor, Tensor, int, int], data: st.DataObject) -> None:
    router, hidden, tokens, experts, k = drawn
    rows = 1 if data.draw(st.booleans(), "one set for all tokens") else len(hidden)
    allowed = torch.zeros(rows, experts, dtype=torch.bool)
    for row in range(rows):
        allowed[row, data.draw(st.lists(st.integers(0, experts - 1), min_size=k, unique=True))] = True
    decision = router(hidden, tokens, RoutingConstraint(allowed=allowed[0] if rows == 1 else allowed))
    assert decision.expert_ids.shape == (len(hidden), k)
    assert allowed.expand(len(hidden), -1).gather(1, decision.expert_ids).all()
    assert distinct(decision.expert_ids)


@given(routed(), st.data())
def test_every_router_honours_the_number_of_active_experts(
    drawn: tuple[Any, Tensor, Tensor, int, int], data: st.DataObject
) -> None:
    router, hidden, tokens, experts, k = drawn
    num_active = data.draw(st.integers(1, experts), "num_active")
    decision = router(hidden, tokens, RoutingConstraint(num_active=num_active))
    assert decision.expert_ids.shape == decision.gate_weights.shape == (len(hidden), num_active)
    assert distinct(decision.expert_ids)
    if num_active > reach(router, experts):
        return  # more than the best groups hold: the choice begins anew, among all experts
    shared = min(k, num_active)
    unconstrained = router(hidden, tokens, None)
    # Of equal merit, not the same: scores saturate, and among equals any will do.
    merits = [merit(router, d).gather(1, d.expert_ids)[:, :shared] for d in (decision, unconstrained)]
    assert torch.equal(*merits)


@given(routed())
def test_no_router_goes_beyond_its_groups(drawn: tuple[Any, Tensor, Tensor, int, int]) -> None:
    router, hidden, tokens, experts, _ = drawn
    if not isinstance(router.config, GroupsConfig):
        return
    groups = router(hidden, tokens, None).expert_ids // (experts // router.config.num_groups)
    assert max(len(set(row)) for row in groups.tolist()) <= router.config.groups_per_token


@given(routed())
def test_choices_come_best_first(drawn: tuple[Any, Tensor, Tensor, int, int]) -> None:
    router, hidden, tokens, _, _ = drawn
    decision = router(hidden, tokens, None)
    assert (merit(router, decision).gather(1, decision.expert_ids).diff(dim=1) <= 0).all()


@given(routed(), SEEDS)
def test_gates_follow_from_scores_and_never_from_the_bias(
    drawn: tuple[Any, Tensor, Tensor, int, int], seed: int
) -> None:
    router, hidden, tokens, _, _ = drawn
    decision = router(hidden, tokens, None)
    torch.testing.assert_close(decision.gate_weights, expected_gates(router, decision))
    if not isinstance(router, SigmoidBiasedRouter):
        return
    held = RoutingConstraint(replay=decision.expert_ids)
    router.selection_bias.normal_(0, 10, generator=random(seed))
    again = router(hidden, tokens, held)
    assert torch.equal(again.gate_weights, decision.gate_weights)
    assert torch.equal(again.scores, decision.scores)


@given(routed(), st.sampled_from([-1000.0, 1000.0]))
def test_a_large_bias_empties_or_fills_an_expert(drawn: tuple[Any, Tensor, Tensor, int, int], push: float) -> None:
    router, hidden, tokens, experts, k = drawn
    if not isinstance(router, SigmoidBiasedRouter) or k == reach(router, experts):
        return
    router.selection_bias.zero_()
    router.selection_bias[0] = push
    chosen = (router(hidden, tokens, None).expert_ids == 0).any(1)
    assert chosen.all() if push > 0 else not chosen.any()


@given(routed(), st.data())
def test_every_router_honours_both_at_once(drawn: tuple[Any, Tensor, Tensor, int, int], data: st.DataObject) -> None:
    router, hidden, tokens, experts, _ = drawn
    num_active = data.draw(st.integers(1, experts), "num_active")
    some = st.lists(st.integers(0, experts - 1), min_size=num_active, unique=True)
    allowed = torch.zeros(experts, dtype=torch.bool)
    allowed[data.draw(some, "allowed")] = True
    ids = router(hidden, tokens, RoutingConstraint(allowed=allowed, num_active=num_active)).expert_ids
    assert ids.shape == (len(hidden), num_active)
    assert allowed[ids].all()
    assert distinct(ids)


@given(routed(), SEEDS)
def test_every_router_replays_with_gates_of_the_current_scores(
    drawn: tuple[Any, Tensor, Tensor, int, int], seed: int
) -> None:
    router, hidden, tokens, experts, k = drawn
    replay = torch.rand(len(hidden), experts, generator=random(seed)).topk(k).indices
    decision = router(hidden, tokens, RoutingConstraint(replay=replay))
    assert torch.equal(decision.expert_ids, replay)
    torch.testing.assert_close(decision.gate_weights, expected_gates(router, decision))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 10), SEEDS, st.data())
def test_select_never_picks_a_disallowed_expert(
    k: int, spare: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    experts = k + spare
    scores = -torch.rand(tokens, experts, generator=random(seed)) * 1e30 - 1
    allowed = torch.rand(tokens, experts, generator=random(seed + 1)).topk(k).indices
    mask = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, allowed, True)
    ids = select(scores, k, RoutingConstraint(allowed=mask))
    assert torch.equal(ids.sort().values, allowed.sort().values)
    assert (scores.gather(1, ids).diff(dim=1) <= 0).all()  # best first


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 4), SEEDS)
def test_combine_after_dispatch_is_the_identity(tokens: int, k: int, spare: int, seed: int) -> None:
    hidden = torch.randn(tokens, 5, generator=random(seed), dtype=torch.float64)
    ids = torch.rand(tokens, k + spare, generator=random(seed)).topk(k).indices
    gates = torch.full((tokens, k), 1 / k, dtype=torch.float64)
    local = LocalDispatch()
    rows, counts, ticket = local.dispatch(
        hidden, RoutingDecision(ids, gates, torch.zeros(tokens, k + spare), None), None
    )
    assert counts.sum() == len(rows) == tokens * k
    torch.testing.assert_close(local.combine(rows, ticket, gates), hidden, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=SEEDS, data=st.data())
def test_cached_forward_of_ragged_rows_is_the_uncached_one(
    kind: str, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    # Each call feeds a rectangle. A row may use any leading part of it; the rest is padding that later calls
    # overwrite. So rows drift apart: chunked prefill and decoding in one batch.
    model = MODELS[kind]
    for block in model.blocks:
        if isinstance(block.attention, LatentAttention):
            block.attention.form = data.draw(st.sampled_from(FORMS), "form")
    rows = [torch.randint(VOCAB, (length,), generator=random(seed + i)) for i, length in enumerate(lengths)]
    done, found = [0] * len(rows), [[] for _ in rows]
    with torch.no_grad():
        cache = model.new_cache(len(rows), max(lengths) + 4)
        while any(d < len(row) for d, row in zip(done, rows, strict=True)):
            width = data.draw(st.integers(1, 4), "width")
            padded = [
                torch.cat((row[d : d + width], row.new_zeros(width)))[:width] for d, row in zip(done, rows, strict=True)
            ]
            starts = torch.tensor(done)[:, None]
            hidden = model(torch.stack(padded), positions=starts + torch.arange(width), cache=cache).hidden
            for i, row in enumerate(rows):
                left = min(width, len(row) - done[i])
                used = data.draw(st.integers(min(1, left), left), f"used of row {i}")
                found[i].append(hidden[i, :used])
                done[i] += used
        for row, parts in zip(rows, found, strict=True):
            torch.testing.assert_close(torch.cat(parts), model(row[None]).hidden[0], **CLOSE)


@pytest.mark.parametrize("kind", MODELS)
@given(lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), seed=SEEDS)
def test_packed_documents_are_as_if_alone(kind: str, lengths: list[list[int]], seed: int) -> None:
    model, seq = MODELS[kind], max(sum(row) for row in lengths)
    rows = [[*row, seq - sum(row)] if sum(row) < seq else row for row in lengths]
    tokens = torch.randint(VOCAB, (len(rows), seq), generator=random(seed))
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    with torch.no_grad():
        packed = model(tokens, positions=positions, documents=documents).hidden
        for i, row in enumerate(rows):
            alone = [model(part[None]).hidden[0] for part in tokens[i].split(row)]
            torch.testing.assert_close(packed[i], torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("kind", MODELS)
@given(batch=st.integers(1, 4), seq=st.integers(1, 8), seed=SEEDS)
def test_load_sums_to_tokens_times_k(kind: str, batch: int, seq: int, seed: int) -> None:
    tokens = torch.randint(VOCAB, (batch, seq), generator=random(seed))
    routing = MODELS[kind](tokens, record=True).routing
    assert set(routing) == {1, 2}
    for record in routing.values():
        assert record.load.sum() == batch * seq * 2
        assert torch.equal(record.load, record.decision.expert_ids.flatten().bincount(minlength=6))


@pytest.mark.parametrize("kind", MODELS)
@given(order=st.permutations(range(4)), seq=st.integers(1, 6), seed=SEEDS)
def test_permuting_sequences_permutes_outputs(kind: str, order: list[int], seq: int, seed: int) -> None:
    model, tokens = MODELS[kind], torch.randint(VOCAB, (4, seq), generator=random(seed))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[order]).hidden, model(tokens).hidden[order], **CLOSE)


@given(seq=st.integers(1, 6), seed=SEEDS, kind=st.sampled_from(sorted(ROUTERS)))
def test_recomputation_changes_no_bit(seq: int, seed: int, kind: str) -> None:
    config = small_config(feed_forward=moe_table(kind), attention=LATENT)
    tokens = torch.randint(VOCAB, (2, seq), generator=random(seed))

    def run(model: Transformer) -> tuple[Tensor, list[Tensor | None]]:
        hidden = model(tokens).hidden
        hidden.sin().sum().backward()
        return hidden, [p.grad for p in model.parameters()]

    plain, gradients = run(build(config, seed))
    recomputed, others = run(build(config, seed, recompute=True))
    assert torch.equal(plain, recomputed)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@given(SEEDS, SEEDS)
def test_hash_routing_depends_on_token_ids_only(seed: int, other: int) -> None:
    router = moe_layer(moe_table("hash_layer")).router
    tokens = torch.randint(VOCAB, (9,), generator=random(seed))
    first, second = (router(torch.randn(9, 16, generator=random(s)), tokens, None) for s in (seed, other))
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.gate_weights, second.gate_weights)
    for token, ids in zip(tokens.tolist(), first.expert_ids.tolist(), strict=True):
        alone = router(torch.zeros(1, 16), torch.tensor([token]), None)
        assert alone.expert_ids[0].tolist() == ids


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 8), SEEDS, st.data())
def test_balanced_table_is_as_even_as_the_greedy_rule_promises(
    frequencies: list[int], experts: int, seed: int, data: st.DataObject
) -> None:
    # Most frequent token first, each to the k least loaded experts: no two loads ever differ by more than one
    # frequency.
    k = data.draw(st.integers(1, experts), "k")
    router = HashLayerRouter(HashLayerConfig(table="balanced"), 4, experts, k, len(frequencies))
    counts = torch.tensor(frequencies)
    router.fill_table(random(seed), counts)
    load = torch.zeros(experts, dtype=torch.int64)
    for token in counts.argsort(descending=True, stable=True).tolist():
        chosen = router.expert_of_token[token]
        assert load[chosen].max() <= load.sort().values[k - 1]
        load[chosen] += counts[token]
    assert distinct(router.expert_of_token)
    assert load.sum() == k * sum(frequencies)
    assert load.max() - load.min() <= max(frequencies)


@given(st.integers(1, 200), st.integers(1, 8), SEEDS)
def test_random_table_gives_distinct_experts_and_depends_on_the_seed(vocab: int, experts: int, seed: int) -> None:
    router = HashLayerRouter(HashLayerConfig(), 4, experts, max(1, experts // 2), vocab)
    router.fill_table(random(seed), None)
    first = router.expert_of_token.clone()
    router.fill_table(random(seed), None)
    assert torch.equal(router.expert_of_token, first)
    assert distinct(first)
