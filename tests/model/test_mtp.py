"""Multi-token prediction against V3's Eq. 21 to 23, position by position."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from finemoe.model.attention.places import Places
from finemoe.model.config import ModelConfig
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.transformer import MTPModule, Transformer
from oracles.attention import norm
from oracles.models import VOCAB, build, moe_table, small_config, v3_config

BATCH, SEQ = 2, 7
CONFIGS = {
    "V3": v3_config(),
    "depth 1": v3_config(mtp_depth=1),
    "depth 3, softmax": small_config(mtp_depth=3, norm_eps=1e-2),
    "dense": small_config(mtp_depth=2, feed_forward={"kind": "dense", "ffn_hidden_size": 12}),
    "hash": small_config(mtp_depth=2, feed_forward=moe_table("hash_layer")),
    "tied": small_config(mtp_depth=2, tie_embeddings=True),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tokens(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    return torch.randint(VOCAB, (batch, seq))


def drawn(config: ModelConfig, seed: int = 0, **kernels: bool) -> Transformer:
    """A model whose norms are not 1, so that each shows where it is applied."""
    model = build(config, seed, **kernels)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def transformed(module: MTPModule, states: Sequence[Tensor], following: Sequence[Tensor]) -> Tensor:
    """TRM_k at the last of `states`, which sees those before it."""
    rows, ids = torch.stack(list(states))[None], torch.stack(list(following))[None]
    positions = torch.arange(len(states))[None]
    return module.block(rows, ids, Places(positions), None, None, False)[0][0, -1]


def expected_states(model: Transformer, ids: Tensor) -> list[Tensor]:
    """`[batch, seq - k, hidden]` of every depth k, one position after the other."""
    eps = model.config.norm_eps
    before = list(model(ids).hidden)  # h^0: the main model's output, before the head
    depths = []
    for k, module in enumerate(model.mtp, 1):
        rows = []
        for b, sequence in enumerate(ids):
            joined, states = [], []
            for i in range(len(sequence) - k):
                embedded = norm(model.embedding.weight[sequence[i + k]], module.embedding_norm.weight, eps)
                state = norm(before[b][i], module.hidden_norm.weight, eps)
                joined.append(module.projection.weight @ torch.cat((embedded, state)))  # Eq. 21, released order
                states.append(transformed(module, joined, sequence[k : k + i + 1]))  # Eq. 22
            rows.append(torch.stack(states))
        before = rows
        depths.append(torch.stack([norm(row, module.norm.weight, eps) for row in rows]))  # Eq. 23, up to the head
    return depths


@EVERY
def test_states_and_gradients_are_those_of_the_equations(config: ModelConfig) -> None:
    model, ids = drawn(config), tokens()
    found, expected = model(ids, mtp=True).mtp_hidden, expected_states(model, ids)
    assert [state.shape for state in found] == [(BATCH, SEQ - k, 16) for k in range(1, len(config.mtp) + 1)]
    for state, want in zip(found, expected, strict=True):
        torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-4)
    directions = [torch.randn_like(state) for state in found]
    losses = [
        sum((model.logits(s) * model.logits(d).detach()).sum() for s, d in zip(states, directions, strict=True))
        for states in (found, expected)
    ]
    leaves = dict(model.named_parameters())
    gradients, wanted = (torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) for loss in losses)
    for name, gradient, want in zip(leaves, gradients, wanted, strict=True):
        assert (gradient is None) == (want is None), name
        if want is not None:
            assert (gradient - want).norm() <= 1e-4 * want.norm(), name


@EVERY
def test_every_module_and_the_main_model_learn_from_the_deepest_state(config: ModelConfig) -> None:
    model = drawn(config)
    output = model(torch.arange(3 * VOCAB).view(3, -1) % VOCAB, mtp=True)
    model.logits(output.mtp_hidden[-1]).logsumexp(-1).square().sum().backward()
    last = model.mtp[-1]
    silent = {f"mtp.{k}.norm.weight" for k in range(len(model.mtp) - 1)}  # read by their own loss only
    for name, parameter in model.named_parameters():
        if name in silent:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.any(), name
    assert last.projection.weight.grad.isfinite().all()


@EVERY
def test_a_token_reaches_depth_k_k_positions_earlier(config: ModelConfig) -> None:
    model, ids = drawn(config), tokens()
    before = model(ids, mtp=True).mtp_hidden
    for j in range(SEQ):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCAB
        for k, (one, other) in enumerate(zip(before, model(changed, mtp=True).mtp_hidden, strict=True), 1):
            first = max(0, j - k)
            torch.testing.assert_close(other[:, :first], one[:, :first], msg=f"token {j}, depth {k}")
            assert (other[:, first:] != one[:, first:]).any(-1).all(), (j, k)


@EVERY
def test_the_main_model_is_the_same_with_and_without(config: ModelConfig) -> None:
    model, ids = drawn(config), tokens()
    plain, ahead = model(ids, record=True), model(ids, record=True, mtp=True)
    assert plain.mtp_hidden == ()
    assert torch.equal(plain.hidden, ahead.hidden)
    layers, depth = len(config.blocks), len(config.mtp)
    routed = depth if config.moe_layers else 0
    assert set(ahead.routing) - set(plain.routing) == set(range(layers, layers + routed))
    for layer, record in plain.routing.items():
        assert torch.equal(record.load, ahead.routing[layer].load)


def test_main_weights_start_alike_with_and_without_modules() -> None:
    without, with_modules = build(v3_config(mtp_depth=0)).state_dict(), build(v3_config()).state_dict()
    assert all(torch.equal(with_modules[name], value) for name, value in without.items())
    assert all(name.startswith("mtp.") for name in with_modules.keys() - without.keys())


def test_embedding_and_head_are_shared() -> None:
    names = [name for name, _ in drawn(v3_config(mtp_depth=1)).named_parameters() if name.startswith("mtp.0.")]
    block = [name for name in names if name.startswith("mtp.0.block.")]
    assert sorted(set(names) - set(block)) == [
        "mtp.0.embedding_norm.weight",
        "mtp.0.hidden_norm.weight",
        "mtp.0.norm.weight",
        "mtp.0.projection.weight",
    ]


def test_routing_of_depth_k_is_that_of_layer_num_layers_plus_k_minus_1() -> None:
    config = v3_config(num_layers=3)
    model, ids = drawn(config), tokens()
    output = model(ids, record=True, mtp=True)
    assert set(output.routing) == {1, 2, 3, 4}
    for depth, layer in ((1, 3), (2, 4)):
        record = output.routing[layer]
        assert record.load.sum() == BATCH * (SEQ - depth) * 2
        assert record.decision.expert_ids.shape == (BATCH * (SEQ - depth), 2)
        assert set(record.balance) == {"sequence"}
        assert record.balance["sequence"].requires_grad


def test_constraints_reach_the_modules_by_layer() -> None:
    model, ids = drawn(v3_config(num_layers=3)), tokens()
    only_four = RoutingConstraint(allowed=torch.arange(6) == 4, num_active=1)
    routing = model(ids, constraint={4: only_four}, mtp=True).routing
    assert routing[4].load.tolist() == [0, 0, 0, 0, BATCH * (SEQ - 2), 0]
    assert routing[3].load.sum() == BATCH * (SEQ - 1) * 2
    first = model(ids, record=True, mtp=True)
    replay = {layer: RoutingConstraint(replay=r.decision.expert_ids) for layer, r in first.routing.items()}
    again = model(ids, constraint=replay, mtp=True)
    assert all(torch.equal(a, b) for a, b in zip(first.mtp_hidden, again.mtp_hidden, strict=True))


@EVERY
def test_recomputation_changes_no_bit(config: ModelConfig) -> None:
    ids, runs = tokens(), []
    for recompute in (False, True):
        model = drawn(config, recompute=recompute).train()
        output = model(ids, mtp=True)
        balance = sum(sum(record.balance.values()) for record in output.routing.values())
        loss = sum(model.logits(h).logsumexp(-1).square().sum() for h in (output.hidden, *output.mtp_hidden))
        (loss + balance).backward()
        runs.append((loss, output.mtp_hidden, {name: p.grad for name, p in model.named_parameters()}))
    (loss, hidden, gradients), (other_loss, other_hidden, others) = runs
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(a, b) for a, b in zip(hidden, other_hidden, strict=True))
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@EVERY
def test_packed_documents_are_as_if_alone_as_far_as_their_own_tokens_reach(config: ModelConfig) -> None:
    model, lengths, depth = drawn(config), [4, 6, 5], len(config.mtp)
    ids = tokens(1, sum(lengths))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, positions=positions, documents=documents, mtp=True).mtp_hidden
    start = 0
    for part in ids.split(lengths, dim=1):
        alone = model(part, mtp=True).mtp_hidden
        for k in range(1, depth + 1):
            within = packed[k - 1][:, start : start + part.shape[1] - k]
            torch.testing.assert_close(within, alone[k - 1], rtol=1e-4, atol=1e-4)
        start += part.shape[1]


def test_rows_do_not_depend_on_each_other() -> None:
    model, ids = drawn(v3_config()), tokens(3)
    together = model(ids, mtp=True).mtp_hidden
    for b in range(3):
        for one, all_rows in zip(model(ids[b : b + 1], mtp=True).mtp_hidden, together, strict=True):
            torch.testing.assert_close(one[0], all_rows[b], rtol=1e-4, atol=1e-5)


def test_cache_is_for_the_main_model_and_excludes_prediction() -> None:
    model, ids = drawn(v3_config()), tokens()
    cache = model.new_cache(BATCH, SEQ)
    assert len(cache) == len(model.blocks)
    with pytest.raises(ValueError, match="mtp and cache exclude each other"):
        model(ids, cache=cache, mtp=True)


@pytest.mark.parametrize("seq", [1, 2])
def test_sequences_that_leave_no_position_are_refused(seq: int) -> None:
    model = drawn(v3_config(mtp_depth=2))
    with pytest.raises(ValueError, match=f"mtp of depth 2 needs sequences of more than {seq} tokens"):
        model(tokens(seq=seq), mtp=True)
    assert model(tokens(seq=3), mtp=True).mtp_hidden[1].shape == (BATCH, 1, 16)
    assert model(tokens(seq=seq)).hidden.shape == (BATCH, seq, 16)


def test_a_model_without_modules_has_nothing_ahead() -> None:
    assert build(small_config())(tokens(), mtp=True).mtp_hidden == ()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_module_runs_all_of_itself_within_its_own_forward(recompute: bool) -> None:
    # Whoever shards a module gathers its weights when its forward begins, and lets go of them when it ends.
    model = build(v3_config(), recompute=recompute).train()
    calls: list[tuple[str, bool]] = []
    for depth, module in enumerate(model.mtp):
        inside: list[str] = []
        module.register_forward_pre_hook(lambda *_, inside=inside: inside.append("forward"))
        module.register_forward_hook(lambda *_, inside=inside: inside.clear())
        for name, part in module.named_children():
            part.register_forward_pre_hook(
                lambda *_, inside=inside, key=f"{depth}.{name}": calls.append((key, bool(inside)))
            )
    output = model(torch.randint(VOCAB, (2, 9)), mtp=True)
    assert {key for key, _ in calls} == {f"{depth}.{name}" for depth in range(2) for name, _ in module.named_children()}
    assert all(within for _, within in calls)
    forward = len(calls)
    output.mtp_hidden[-1].sum().backward()
    again = [key for key, _ in calls[forward:]]
    assert again == (["1.block", "0.block"] if recompute else [])
