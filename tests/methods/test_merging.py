"""Merging: the reverse of upcycling gives the dense model back; groups, loads and gates are what slow loops say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finemoe
from finemoe.checkpoint.open import load_model
from finemoe.core.errors import CheckpointError, ConfigError, FinemoeError
from finemoe.methods.merging import (
    MergingConfig,
    densified_config,
    gate_sums,
    group_by_position,
    group_by_similarity,
    merge_layer,
    merge_weights,
    read_loads,
)
from finemoe.methods.upcycling import UpcyclingConfig, compare
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.transformer import Transformer
from methods.tiny_dense import HIDDEN, VOCAB, dense_config, drawn, run_of, upcycled

EXACT: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "softmax": {"router": "softmax"},
    "nothing shared": {"shared": 0},
    "shared but one": {"shared": 3},
    "scaled gates": {"route_scale": 2.5},
    "scaled softmax gates": {"router": "softmax", "route_scale": 0.5, "shared": 2},
    "two copies at once": {"active": 2},
    "two copies at once, of three": {"active": 2, "copies": 3},
    "one copy": {"copies": 1},
    "many shards": {"shards": 12, "shared": 5},
    "a dense first layer": {"dense_layers": 1},
}


def merged(mixture: Transformer, loads: dict[int, Tensor] | None = None, **options: Any) -> Transformer:
    config = MergingConfig(**options)
    model = Transformer(densified_config(mixture.config, config)).eval()
    model.load_state_dict(dict(merge_weights(mixture, config, loads)))
    return model


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}], ids=["plain", "tied"])
def test_the_reverse_of_an_upcycled_model_is_the_dense_model(options: dict[str, Any], changes: dict[str, Any]) -> None:
    dense, config = drawn(dense_config(**changes)), UpcyclingConfig(**options)
    mixture = upcycled(dense, config)
    again = merged(mixture, groups=config.routed)
    assert again.config == dense.config
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    for other in (again, merged(mixture)):  # without `groups` twice as many neurons where two copies are active
        difference, largest, _ = compare(dense, other)
        assert difference <= 1e-5 * max(1.0, largest)


def test_clamped_activations_stay_clamped_and_modules_are_left_out() -> None:
    feed_forward = {"kind": "dense", "ffn_hidden_size": 48, "swiglu_limit": 0.05}
    dense = drawn(dense_config(feed_forward=feed_forward, mtp_depth=1))
    again = merged(upcycled(dense, UpcyclingConfig()))
    assert again.config == dense.config.model_copy(update={"mtp": ()})
    difference, largest, _ = compare(dense, again)
    assert difference <= 1e-5 * max(1.0, largest)


def test_a_load_that_is_even_between_shards_changes_nothing_of_equal_copies() -> None:
    dense, config = drawn(dense_config()), UpcyclingConfig(copies=4)
    sets = torch.tensor([5.0, 0.0, 1.0, 10.0]).repeat_interleave(config.routed)
    difference, largest, _ = compare(dense, merged(upcycled(dense, config), dict.fromkeys(range(3), sets)))
    assert difference <= 1e-5 * max(1.0, largest)


LAYER = MoEConfig.model_validate(
    {
        "num_routed_experts": 7,
        "experts_per_token": 3,
        "expert_hidden_size": 5,
        "num_shared_experts": 2,
        "router": {"kind": "softmax_topk"},
    }
)


def layer_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    shapes = {
        "experts.gate_up_proj": (7, 10, HIDDEN),
        "experts.down_proj": (7, HIDDEN, 5),
        "shared_experts.gate_proj.weight": (10, HIDDEN),
        "shared_experts.up_proj.weight": (10, HIDDEN),
        "shared_experts.down_proj.weight": (HIDDEN, 10),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def merged_slowly(groups: list[list[int]], gate_sum: float, load: list[float] | None) -> dict[str, Tensor]:
    """Neuron by neuron: `groups` of experts, each weighed by its share of the choices."""
    weights = layer_weights()
    stack, outputs = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    rows: dict[str, list[Tensor]] = {
        "gate": list(weights["shared_experts.gate_proj.weight"]),
        "up": list(weights["shared_experts.up_proj.weight"]),
        "down": list(weights["shared_experts.down_proj.weight"].T),
    }
    for members in groups:
        used = [1.0] * len(members) if load is None else [load[e] for e in members]
        factor = gate_sum / len(groups) if load is None else gate_sum * sum(used) / sum(load)
        shares = [u / sum(used) for u in used] if sum(used) else [1 / len(members)] * len(members)
        for neuron in range(5):
            pairs = list(zip(shares, members, strict=True))
            rows["gate"].append(sum((s * stack[e, neuron] for s, e in pairs), torch.zeros(HIDDEN)))
            rows["up"].append(sum((s * stack[e, 5 + neuron] for s, e in pairs), torch.zeros(HIDDEN)))
            rows["down"].append(factor * sum((s * outputs[e, :, neuron] for s, e in pairs), torch.zeros(HIDDEN)))
    stacked = {name: torch.stack(parts) for name, parts in rows.items()}
    stacked["down"] = stacked["down"].T
    return {f"{name}_proj.weight": tensor for name, tensor in stacked.items()}


@pytest.mark.parametrize(
    "load", [None, [4.0, 0, 1, 2, 0, 6, 1], [4.0, 0, 1, 2, 0, 6, 0]], ids=["alike", "load", "idle"]
)
@pytest.mark.parametrize("groups", [None, 2, 7, 1], ids=str)
def test_a_layer_is_what_slow_loops_make_of_it(load: list[float] | None, groups: int | None) -> None:
    count = groups or 3
    members = [[e for e in range(7) if e % count == number] for number in range(count)]
    counted = None if load is None else torch.tensor(load)
    found = merge_layer(layer_weights(), LAYER, MergingConfig(groups=groups), 1.7, counted)
    wanted = merged_slowly(members, 1.7, load)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_position_deals_experts_out() -> None:
    assert group_by_position(7, 3) == [[0, 3, 6], [1, 4], [2, 5]]


def families(order: list[int], common: float) -> Tensor:
    """Experts of some families, long and short ones, all with something large in common."""
    draw = torch.Generator().manual_seed(4)
    parents = torch.randn(max(order) + 1, 60, generator=draw)
    parents -= parents.mean(dim=0)
    shared = common * torch.randn(60, generator=draw)
    lengths = [0.2 if number in (0, 2, 3) else 1.0 for number in range(len(order))]
    own = [
        length * (parents[one] + 0.3 * torch.randn(60, generator=draw))
        for one, length in zip(order, lengths, strict=True)
    ]
    return torch.stack(own) + shared


@pytest.mark.parametrize("common", [0.0, 5.0])
def test_similar_experts_come_together_whatever_all_have_in_common(common: float) -> None:
    order = [0, 0, 1, 2, 1, 2, 0, 2, 1]
    wanted = [{e for e, family in enumerate(order) if family == one} for one in (0, 1, 2)]
    assert [set(group) for group in group_by_similarity(families(order, common), 3)] == wanted


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7])
def test_similar_groups_are_balanced_and_leave_none_out(groups: int) -> None:
    found = group_by_similarity(torch.randn(7, 20, generator=torch.Generator().manual_seed(1)), groups)
    assert sorted(expert for group in found for expert in group) == list(range(7))
    sizes = sorted(map(len, found))
    assert sizes[-1] - sizes[0] <= 1


def test_similarity_finds_the_shards_of_a_mixture_whose_experts_were_shuffled() -> None:
    dense, config = drawn(dense_config()), UpcyclingConfig(copies=4, noise=0.01)
    mixture = upcycled(dense, config)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    for block in mixture.blocks:
        layer: Any = block.feed_forward
        for stack in (layer.experts.gate_up_proj, layer.experts.down_proj, layer.router.weight):
            stack.data = stack.data[order]
    similar, position = (compare(dense, merged(mixture, group=group))[2] for group in ("similar", "position"))
    assert similar < 1e-2 < position


def test_gates_come_to_what_the_router_says() -> None:
    dense = drawn(dense_config())
    scaled = gate_sums(upcycled(dense, UpcyclingConfig(route_scale=2.5)))
    assert scaled == pytest.approx(dict.fromkeys(range(3), 2.5))
    mixture = upcycled(dense, UpcyclingConfig(router="plain"))
    tokens = torch.randint(VOCAB, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        routing = mixture(tokens, record=True).routing
    for layer, total in gate_sums(mixture).items():
        scores = routing[layer].decision.scores
        mean = sum(sum(sorted(row.tolist())[-3:]) for row in scores) / len(scores)
        assert total == pytest.approx(mean, rel=1e-4)
        assert 0.05 < total < 0.9


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("dense") / "run", drawn(dense_config()))


@pytest.fixture(scope="module")
def mixture(dense: Path) -> Path:
    finemoe.upcycle(dense, dense.parent / "mixture", copies=3, quiet=True)
    return dense.parent / "mixture"


def test_a_folder_is_made_that_opens_and_says_the_same(dense: Path, mixture: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()}
    made = finemoe.densify(mixture, tmp_path / "out", quiet=True)
    assert {path: path.read_bytes() for path in mixture.rglob("*") if path.is_file()} == before
    assert made.difference <= 1e-5 * max(1.0, made.largest)
    assert made.divergence <= 1e-6
    assert made.to_dict()["total_parameters"] == sum(p.numel() for p in load_model(dense).parameters())
    assert not finemoe.doctor(tmp_path / "out", quiet=True).problems
    texts = [
        [
            one.completion
            for one in finemoe.generate(path, ["def main", "class"], temperature=0, max_new_tokens=9, quiet=True)
        ]
        for path in (dense, tmp_path / "out")
    ]
    assert texts[0] == texts[1]
    with pytest.raises(CheckpointError, match="complete already"):
        finemoe.densify(mixture, tmp_path / "out", quiet=True)


def test_what_is_not_merged_keeps_its_precision(tmp_path: Path) -> None:
    model = upcycled(drawn(dense_config()), UpcyclingConfig(copies=2, dense_layers=1))
    source = tmp_path / "as Hugging Face"
    finemoe.export(run_of(tmp_path / "run", model), source, dtype="bf16", quiet=True)
    finemoe.densify(source, tmp_path / "out", quiet=True)
    stored, made = (load_model(path, dtype=None).state_dict() for path in (source, tmp_path / "out"))
    assert made["embedding.weight"].dtype == torch.bfloat16
    assert torch.equal(made["embedding.weight"], stored["embedding.weight"])
    assert made["blocks.0.feed_forward.up_proj.weight"].dtype == torch.bfloat16
    assert made["blocks.1.feed_forward.up_proj.weight"].dtype == torch.float32


def metrics(*loads: list[int] | None) -> str:
    records: list[dict[str, Any]] = [{"kind": "validation", "step": 1, "tokens": 1, "seconds": 1.0}] * len(loads)
    made = [one if load is None else {**one, "load": {"0": load}} for one, load in zip(records, loads, strict=True)]
    return "".join(json.dumps(one) + "\n" for one in made)


def test_loads_of_a_run_are_those_of_its_last_validation(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics([1, 2], [3, 4], None))
    for path in (tmp_path, tmp_path / "metrics.jsonl"):
        assert {layer: load.tolist() for layer, load in read_loads(path).items()} == {0: [3, 4]}


def test_loads_of_an_analysis_weigh_the_experts(mixture: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def main(self):\n    return self.x + 1\n" * 40)
    results = finemoe.analyze("load", mixture, texts=[f"code={text}"], tokens=300)
    (tmp_path / "load").mkdir()
    (tmp_path / "load" / "results.json").write_text(json.dumps(results))
    counts = {int(layer): one["load"] for layer, one in results["series"][-1]["layers"].items()}
    for path in (tmp_path / "load", tmp_path / "load" / "results.json"):
        assert {layer: load.tolist() for layer, load in read_loads(path).items()} == counts
    model = load_model(mixture)
    wanted = merged(model, {layer: torch.tensor(load) for layer, load in counts.items()}).state_dict()
    finemoe.densify(mixture, tmp_path / "out", load=tmp_path / "load", quiet=True)
    found = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


GATED = {
    "kind": "moe",
    "num_routed_experts": 4,
    "experts_per_token": 2,
    "expert_hidden_size": 8,
    "num_shared_experts": 1,
    "gate_shared_experts": True,
    "router": {"kind": "softmax_topk"},
}


def test_what_a_dense_layer_has_no_place_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer 0 weighs its shared experts by a gate of its own"):
        densified_config(dense_config(feed_forward=GATED), MergingConfig())


def test_what_cannot_be_merged_is_refused_before_anything_is_written(
    dense: Path, mixture: Path, tmp_path: Path
) -> None:
    other, empty, text = (tmp_path / name for name in ("results.json", "other.json", "lies.json"))
    other.write_text(json.dumps({"kind": "load", "series": [{"layers": {"0": {"load": [1, 2]}}}]}))
    empty.write_text('{"kind": "knockout"}')
    text.write_text('{"kind": "load", "series": []}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics(None))
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (dense, {}, "all 3 layers are dense already: there are no experts to merge"),
        (mixture, {"groups": 10}, "groups 10 is above the 9 routed experts of layer 0"),
        (mixture, {"group": "luck"}, "group"),
        (mixture, {"load": other}, "it has no load of 9 experts for layer 0: it was made with another model"),
        (mixture, {"load": empty}, "holds no load of experts"),
        (mixture, {"load": text}, "damaged"),
        (mixture, {"load": tmp_path / "run"}, "holds no load of experts"),
        (mixture, {"load": tmp_path / "nothing.json"}, "nothing.json"),
    ]
    for source, options, says in refused:
        with pytest.raises(FinemoeError, match=says):
            finemoe.densify(source, tmp_path / "out", quiet=True, **options)
        assert not list(tmp_path.glob("out*"))
