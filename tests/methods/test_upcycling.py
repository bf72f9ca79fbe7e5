"""Upcycling: the mixture computes what the dense model computed, and every token meets every shard once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finemoe
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import CheckpointError, ConfigError
from finemoe.methods.upcycling import UpcyclingConfig, compare, copies_apart, upcycle_layer
from finemoe.model.transformer import Transformer
from methods.tiny_dense import HIDDEN, VOCAB, WIDTH, dense_config, drawn, run_of, upcycled


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("dense") / "run", drawn(dense_config()))


EXACT = {
    "as it comes": {},
    "softmax": {"router": "softmax"},
    "nothing shared": {"shared": 0},
    "shared but one": {"shared": 3},
    "scaled gates": {"route_scale": 2.5},
    "scaled softmax gates": {"router": "softmax", "route_scale": 0.5, "shared": 2},
    "two copies at once": {"active": 2},
    "all copies at once": {"active": 3, "copies": 3, "shared": 0},
    "one copy": {"copies": 1},
    "many shards": {"shards": 12, "shared": 5},
    "a dense first layer": {"dense_layers": 1},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("changes", [{}, {"mtp_depth": 1}, {"tie_embeddings": True}], ids=["plain", "mtp", "tied"])
def test_the_mixture_computes_what_the_dense_model_did(options: dict[str, Any], changes: dict[str, Any]) -> None:
    dense = drawn(dense_config(**changes))
    difference, largest, divergence = compare(dense, upcycled(dense, UpcyclingConfig(**options)))
    assert difference <= 1e-5 * max(1.0, largest)
    assert divergence <= 1e-6


def test_clamped_activations_stay_clamped() -> None:
    dense = drawn(dense_config(feed_forward={"kind": "dense", "ffn_hidden_size": WIDTH, "swiglu_limit": 0.05}))
    difference, largest, _ = compare(dense, upcycled(dense, UpcyclingConfig()))
    assert difference <= 1e-5 * max(1.0, largest)


@pytest.mark.parametrize("options", [*EXACT.values(), {"router": "plain", "shared": 0}], ids=[*EXACT, "plain"])
def test_every_token_meets_every_routed_shard_as_often(options: dict[str, Any]) -> None:
    dense, config = drawn(dense_config()), UpcyclingConfig(**options)
    model = upcycled(dense, config)
    with torch.no_grad():
        routing = model(torch.randint(VOCAB, (4, 32)), record=True).routing
    assert set(routing) == set(range(config.dense_layers, 3))
    for record in routing.values():
        chosen = record.decision.expert_ids
        met = torch.zeros(len(chosen), config.routed, dtype=torch.int64)
        met.scatter_add_(1, chosen % config.routed, torch.ones_like(chosen))
        assert (met == config.active).all()
        sets = [set((row // config.routed).tolist()) for row in chosen]
        assert all(len(one) == config.active for one in sets)
        assert config.copies == config.active or len(set().union(*sets)) > 1  # tokens go different ways


def test_plain_gates_come_near_with_the_papers_scale_and_not_without(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, config = drawn(dense_config()), UpcyclingConfig(router="plain", copies=4, shared=0)
    _, _, scaled = compare(dense, upcycled(dense, config))
    monkeypatch.setattr(UpcyclingConfig, "plain_scale", 1.0)
    _, _, without = compare(dense, upcycled(dense, config))
    assert 1e-4 < scaled < without


def layer(config: UpcyclingConfig, number: int = 0) -> dict[str, Tensor]:
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    draw = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in zip(names, shapes, strict=True)}
    return upcycle_layer(weights, number, config, 0.1)


def test_copies_are_equal_unless_something_tells_them_apart() -> None:
    size = WIDTH // 4

    def sets(config: UpcyclingConfig) -> Tensor:
        return layer(config)["experts.gate_up_proj"].unflatten(0, (config.copies, config.routed))

    same = sets(UpcyclingConfig(copies=3))
    assert torch.equal(same[0], same[1])
    noisy = sets(UpcyclingConfig(copies=3, noise=0.01))
    moved = (noisy - same).std()
    assert 0.005 < float(moved) < 0.02
    assert not torch.equal(noisy[0], noisy[1])
    half = sets(UpcyclingConfig(copies=3, redrawn=0.5))
    kept = (half == same).all(dim=-1).view(3, 3, 2, size)
    assert (kept.sum(-1) == size // 2).all()
    assert torch.equal(kept[:, :, 0], kept[:, :, 1])  # a neuron is drawn anew as a whole
    down = layer(UpcyclingConfig(copies=3, redrawn=0.5))["experts.down_proj"].view(3, 3, HIDDEN, size)
    old = layer(UpcyclingConfig(copies=3))["experts.down_proj"].view(3, 3, HIDDEN, size)
    assert torch.equal((down == old).all(dim=2), kept[:, :, 0])


def test_the_seed_decides_and_layers_differ() -> None:
    options = {"noise": 0.1, "redrawn": 0.3}
    first, again = (layer(UpcyclingConfig(**options)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (layer(UpcyclingConfig(**options, seed=1)), layer(UpcyclingConfig(**options), 1)):
        assert not torch.equal(first["router.weight"], other["router.weight"])
        assert not torch.equal(first["experts.down_proj"], other["experts.down_proj"])


def test_a_folder_is_made_that_opens_chats_and_trains_further(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "fine"
    made = finemoe.upcycle(run, out, copies=4, quiet=True)
    assert made.difference <= 1e-5 * max(1.0, made.largest)
    assert made.to_dict()["active_parameters"] > 0
    prompts = ["def main", "class"]
    written = [
        [one.completion for one in finemoe.generate(path, prompts, temperature=0, max_new_tokens=12, quiet=True)]
        for path in (run, out)
    ]
    assert written[0] == written[1]
    assert not finemoe.doctor(out, quiet=True).problems
    with pytest.raises(CheckpointError, match="complete already"):
        finemoe.upcycle(run, out, quiet=True)
    corpus = tmp_path / "text.jsonl"
    texts = [f"def main_{number}(self):\n    return {number} + self.x\n" * 3 for number in range(200)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'start_from = "{out}"\n[data]\ncorpus = {{ kind = "files", paths = ["{corpus}"] }}\nsequence_length = 32\n'
        "[training]\ntokens = 2048\ntokens_per_step = 256\n"
    )
    trained = finemoe.train(recipe, out=tmp_path / "run", quiet=True)
    assert load_model(trained.directory).config.moe_layers == (0, 1, 2)


def test_a_dense_model_is_never_written_to(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    finemoe.upcycle(run, tmp_path / "out", quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shards": 7}, "does not divide the 48 neurons of layer 0: take one of 2, 3, 4, 6, 8"),
        ({"shared": 4}, "shared 4 must be below shards 4"),
        ({"active": 9}, "active 9 is above copies 8"),
        ({"dense_layers": 3}, "leaves nothing to upcycle of 3 layers"),
        ({"copys": 3}, "copies"),
        ({"redrawn": 1.5}, "redrawn"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        finemoe.upcycle(run, tmp_path / "out", quiet=True, **options)
    assert not list(tmp_path.iterdir())


def test_a_mixture_is_no_dense_model(run: Path, tmp_path: Path) -> None:
    finemoe.upcycle(run, tmp_path / "once", quiet=True)
    with pytest.raises(ConfigError, match="layer 0 is a mixture already"):
        finemoe.upcycle(tmp_path / "once", tmp_path / "twice", quiet=True)


def apart_slowly(model: Transformer, config: UpcyclingConfig) -> tuple[float, float]:
    """Mean and least relative distance, pair by pair, with each matrix on its own."""
    found = []
    for block in model.blocks:
        experts = block.feed_forward.experts
        for shard in range(config.routed):
            for one in range(config.copies):
                for other in range(one):
                    a, b = one * config.routed + shard, other * config.routed + shard
                    squares, norms = 0.0, [0.0, 0.0]
                    for stack in (experts.gate_up_proj.detach(), experts.down_proj.detach()):
                        squares += float(((stack[a].double() - stack[b].double()) ** 2).sum())
                        norms = [n + float((stack[i].double() ** 2).sum()) for n, i in zip(norms, (a, b), strict=True)]
                    found.append(squares**0.5 / ((norms[0] ** 0.5 + norms[1] ** 0.5) / 2))
    return sum(found) / len(found), min(found)


def train_a_little(model: Transformer, steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        tokens = torch.randint(VOCAB, (2, 17), generator=draw)
        logits = model.logits(model(tokens[:, :-1]).hidden)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def test_equal_copies_part_when_they_see_different_tokens() -> None:
    config = UpcyclingConfig(copies=3)
    model = upcycled(drawn(dense_config()), config)
    before = copies_apart(model, config)
    assert (before.mean, before.least) == (0.0, 0.0)
    train_a_little(model, 3)
    after = copies_apart(model, config)
    assert 1e-4 < after.least < after.mean < 0.1
    assert (after.mean, after.least) == pytest.approx(apart_slowly(model, config))


def test_noise_makes_copies_differ_at_once() -> None:
    dense = drawn(dense_config())
    for noise in (0.01, 0.05):
        config = UpcyclingConfig(copies=4, noise=noise)
        model = upcycled(dense, config)
        found = copies_apart(model, config)
        assert found.mean == pytest.approx(2**0.5 * noise, rel=0.1)  # of two independent ones
        assert (found.mean, found.least) == pytest.approx(apart_slowly(model, config))


def test_layers_that_stay_dense_have_no_copies() -> None:
    config = UpcyclingConfig(copies=2, dense_layers=1, noise=0.1)
    model = upcycled(drawn(dense_config(mtp_depth=1)), config)
    assert copies_apart(model, config).least > 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [({"copies": 1}, "no other to differ from"), ({"copies": 4}, "layer 0 has 6 routed experts, and 4 copies of 3")],
    ids=str,
)
def test_distances_are_of_copies_that_are_there(options: dict[str, Any], says: str) -> None:
    model = upcycled(drawn(dense_config()), UpcyclingConfig(copies=2))
    with pytest.raises(ConfigError, match=says):
        copies_apart(model, UpcyclingConfig(**options))
