"""A few tokens through whole blocks in one call: the bits of the same blocks operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from finemoe.model import native
from finemoe.model.attention.blocks import Group
from finemoe.model.config import ModelConfig, expand
from finemoe.model.initialize import initialize
from finemoe.model.moe.decision import RoutingConstraint
from finemoe.model.moe.dispatch import LocalDispatch
from finemoe.model.presets import resolve
from finemoe.model.projection import Projection
from finemoe.model.transformer import Block, ModelOutput, Transformer

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

HIDDEN, VOCAB, SIZE, BLOCKS = 24, 50, 8, 12
GROUPED = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
LATENT = {
    "kind": "latent",
    "num_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}


def moe(router: dict[str, Any], **changes: Any) -> dict[str, Any]:
    whole = {"num_routed_experts": 12, "experts_per_token": 3, "expert_hidden_size": 17, "num_shared_experts": 1}
    return {"kind": "moe", **whole, "router": router, **changes}


GROUPS = {"num_groups": 4, "groups_per_token": 2}
FEED_FORWARD: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "ffn_hidden_size": 37},
    "dense, clamped": {"kind": "dense", "ffn_hidden_size": 37, "swiglu_limit": 0.2},
    "softmax": moe({"kind": "softmax_topk"}),
    "softmax, normalised": moe({"kind": "softmax_topk", "normalize_gates": True, "route_scale": 1.7}),
    "one expert of each token": moe({"kind": "softmax_topk"}, experts_per_token=1, num_shared_experts=0),
    "groups": moe({"kind": "group_limited", "route_scale": 3.0, **GROUPS}),
    "sigmoid": moe({"kind": "sigmoid_biased", "route_scale": 2.5}),
    "sigmoid in groups": moe({"kind": "sigmoid_biased", "normalize_gates": False, **GROUPS}),
    "square root of softplus": moe({"kind": "sigmoid_biased", "score_function": "sqrtsoftplus", **GROUPS}),
    "gated shared experts": moe({"kind": "softmax_topk"}, gate_shared_experts=True, num_shared_experts=2),
    "clamped experts": moe({"kind": "softmax_topk"}, swiglu_limit=0.2),
}


def model(attention: dict[str, Any], feed_forward: dict[str, Any], mtp: int = 0) -> Transformer:
    table = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": 3,
        "attention": attention,
        "leading": {"count": 1, "feed_forward": FEED_FORWARD["dense"]},
        "feed_forward": feed_forward,
        "mtp_depth": mtp,
        "init_std": 0.4,
    }
    config: ModelConfig = expand(resolve(table, "the test"))
    made = Transformer(config).eval()
    initialize(made, seed=3)
    for layer in made.moe_layers.values():
        if "selection_bias" in dict(layer.router.named_buffers()):
            layer.router.selection_bias.normal_(std=0.3)
    return made


def flat(sequences: int, width: int) -> tuple[torch.Tensor, torch.Tensor, list[Group]]:
    """Tokens of so many sequences behind different numbers of others, each in blocks of its own."""
    tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1))[: sequences * 2].view(sequences, 2)
    positions = torch.arange(sequences)[:, None] % 5 + torch.arange(width)
    tokens = torch.randint(VOCAB, (1, sequences * width), generator=torch.Generator().manual_seed(2))
    return tokens, positions.reshape(1, -1), [Group(0, positions, tables, SIZE)]


@torch.no_grad()
def run(made: Transformer, sequences: int, width: int) -> tuple[ModelOutput, list[torch.Tensor]]:
    tokens, positions, groups = flat(sequences, width)
    cache = made.new_blocks(BLOCKS, SIZE)
    stored = [value for layer in cache for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    for number, value in enumerate(stored):
        value.normal_(generator=torch.Generator().manual_seed(number))
    return made(tokens, positions=positions, cache=cache, groups=groups), stored


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled whenever a block goes operation by operation."""
    seen: list[str] = []
    ordinary = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *inputs: seen.append("block") or ordinary(self, *inputs))
    return seen


@pytest.mark.parametrize(("sequences", "width"), [(1, 1), (1, 5), (5, 1), (6, 4)], ids=str)
@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("feed_forward", FEED_FORWARD.values(), ids=FEED_FORWARD)
def test_bits_are_those_of_single_operations(
    feed_forward: dict[str, Any],
    attention: dict[str, Any],
    sequences: int,
    width: int,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = model(attention, feed_forward)
    found, cached = run(made, sequences, width)
    assert not calls
    monkeypatch.setattr(Block, "where", lambda *_: None)
    expected, stored = run(made, sequences, width)
    assert len(calls) == 3
    assert torch.equal(found.hidden, expected.hidden)
    assert all(torch.equal(one, other) for one, other in zip(cached, stored, strict=True))
    assert found.routing.keys() == expected.routing.keys()
    for layer, record in found.routing.items():
        assert torch.equal(record.load, expected.routing[layer].load)
        assert int(record.load.sum()) == sequences * width * made.config.blocks[layer].feed_forward.experts_per_token


def test_a_prediction_module_takes_one_call_too(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(LATENT, FEED_FORWARD["sigmoid in groups"], mtp=1)
    tokens, _, groups = flat(3, 2)
    hidden = torch.randn(1, 6, HIDDEN)
    outputs = []
    with torch.no_grad():
        for _ in range(2):
            outputs.append(made.ahead(hidden, tokens, groups, made.new_blocks(BLOCKS, SIZE)))
            assert len(calls) == len(outputs) - 1
            monkeypatch.setattr(Block, "where", lambda *_: None)
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("what", ["hook", "constraint", "record", "states", "training", "gradient", "narrow", "mixed"])
def test_what_one_call_cannot_do_goes_operation_by_operation(what: str, calls: list[str]) -> None:
    made = model(GROUPED, FEED_FORWARD["softmax"])
    tokens, positions, groups = flat(2, 1)
    options: dict[str, Any] = {}
    seen: list[int] = []
    if what == "hook":
        made.moe_layers[1].router.register_forward_pre_hook(lambda *_: seen.append(1))
    elif what == "constraint":
        options["constraint"] = {1: RoutingConstraint(num_active=1)}
    elif what in ("record", "states"):
        options[what] = True
    elif what == "training":
        made.train()
    elif what == "narrow":
        made.to(torch.bfloat16)
    elif what == "mixed":
        experts = made.moe_layers[1].experts
        experts.gate_up_proj.data = experts.gate_up_proj.data.double().float().to(torch.float64)
        experts.down_proj.data = experts.down_proj.data.to(torch.float64)
    with torch.set_grad_enabled(what == "gradient"):
        try:
            made(tokens, positions=positions, cache=made.new_blocks(BLOCKS, SIZE), groups=groups, **options)
        except RuntimeError:
            assert what == "mixed"  # torch's own refusal: nothing read float64 as float32
    assert calls
    assert seen == ([1] if what == "hook" else [])


EXCHANGES: dict[str, Callable[[Transformer], object]] = {
    "a weight": lambda made: setattr(made.blocks[0].attention, "o_proj", twice(made.blocks[0].attention.o_proj)),
    "a weight in place of a weight": lambda made: setattr(
        made.blocks[1].feed_forward.experts,
        "down_proj",
        nn.Parameter(2 * made.blocks[1].feed_forward.experts.down_proj),
    ),
    "a weight by name": lambda made: made.load_state_dict(
        {**made.state_dict(), "blocks.2.attention_norm.weight": torch.full((HIDDEN,), 1.5)}, assign=True
    ),
    "numbers in a weight": lambda made: made.blocks[0].feed_forward.down_proj.weight.data.mul_(2),
    "a buffer": lambda made: setattr(made.blocks[1].feed_forward.router, "selection_bias", torch.randn(12)),
    "a hook": lambda made: made.blocks[0].register_forward_hook(lambda _, __, out: (2 * out[0], out[1])),
    "a hook deep inside": lambda made: made.blocks[1].feed_forward.router.register_forward_hook(
        lambda _, __, decision: replace(decision, gate_weights=2 * decision.gate_weights)
    ),
    "where experts lie": lambda made: setattr(made.blocks[1].feed_forward, "dispatch", Halved()),
    "the form of attention": lambda made: [setattr(block.attention, "form", "expanded") for block in made.blocks],
}


class Halved:
    """Experts elsewhere, which give half of what they should."""

    def dispatch(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
        return LocalDispatch().dispatch(*inputs)

    def combine(self, *inputs: Any) -> torch.Tensor:
        return LocalDispatch().combine(*inputs) / 2

    def in_place(self, *_: Any) -> None:
        return None


def twice(projection: Projection) -> Projection:
    made = Projection(projection.in_features, projection.out_features, projection.backend)
    made.weight = nn.Parameter(2 * projection.weight)
    return made


@torch.no_grad()
@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
def test_what_was_exchanged_since_is_noticed(
    exchange: Callable[[Transformer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(LATENT, FEED_FORWARD["sigmoid"])
    tokens, positions, groups = flat(2, 1)
    cache = made.new_blocks(BLOCKS, SIZE)

    def hidden() -> torch.Tensor:
        for layer in cache:
            layer.states.normal_(generator=torch.Generator().manual_seed(4))
        return made(tokens, positions=positions, cache=cache, groups=groups).hidden

    before = hidden()
    exchange(made)
    found = hidden()
    monkeypatch.setattr(Block, "where", lambda *_: None)
    assert torch.equal(found, hidden())
    if made.blocks[0].attention.form == "auto":
        assert not torch.equal(found, before)


@torch.no_grad()
def test_two_caches_of_one_model_take_turns() -> None:
    made = model(GROUPED, FEED_FORWARD["softmax"])
    tokens, positions, groups = flat(2, 1)
    caches = [made.new_blocks(BLOCKS, SIZE) for _ in range(2)]
    for number, cache in enumerate(caches):
        for layer in cache:
            layer.keys.normal_(generator=torch.Generator().manual_seed(number))
            layer.values.normal_(generator=torch.Generator().manual_seed(number))
    first, other, again = (made(tokens, positions=positions, cache=caches[n], groups=groups).hidden for n in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
