"""Where a pipeline cuts a model, who holds what, and what is refused before anything starts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from finemoe.core.errors import ConfigError
from finemoe.model.transformer import Transformer
from finemoe.parallel.config import Layout
from finemoe.parallel.stages import Cut, _costs, _even_ends, keep_only, refusals
from oracles.models import build, small_config
from parallel.pipelines import config_of

SCHEDULES = ("1f1b", "interleaved", "zbv", "dualpipev")


@pytest.mark.parametrize("pieces", [2, 3, 4])
@pytest.mark.parametrize("costs", [[1] * 8, [3, 1, 1, 1, 5, 2, 2, 9], [1, 1, 1, 1, 1, 1, 1, 10], [7, 1, 1, 1]])
def test_pieces_are_as_even_as_any_cut(costs: list[int], pieces: int) -> None:
    def pieces_of(ends: tuple[int, ...]) -> list[int]:
        return [sum(costs[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True)]

    every = [(*inner, len(costs)) for inner in combinations(range(1, len(costs)), pieces - 1)]
    best = min((max(pieces_of(ends)), sum(cost**2 for cost in pieces_of(ends))) for ends in every)
    found = pieces_of(tuple(_even_ends(costs, pieces)))
    assert (max(found), sum(cost**2 for cost in found)) == best


def test_a_wide_vocabulary_makes_the_last_stage_short() -> None:
    config = small_config(num_layers=8, leading=None, vocab_size=2000)
    assert [stage.stop - stage.first for stage in Cut.of(config, "1f1b", 2).stages] == [7, 1]
    assert [stage.stop - stage.first for stage in Cut.of(small_config(num_layers=8), "1f1b", 2).stages] == [4, 4]


def test_costs_are_what_a_token_passes_through() -> None:
    config = config_of("ahead")
    model = Transformer(config)
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    unused = sum(p.numel() for p in model.blocks[1].feed_forward.experts.parameters()) * 4 // 6  # 2 of 6 experts
    behind = sum(p.numel() for part in (model.norm, model.head, model.mtp) for p in part.parameters()) - unused
    behind += model.head.weight.numel()  # the module's own product with the head
    assert _costs(config) == [sizes[0], *(size - unused for size in sizes[1:-1]), sizes[-1] - unused + behind]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_lie_where_torch_looks_for_them(schedule: Any) -> None:
    cut = Cut.of(small_config(num_layers=8), schedule, 3 if schedule == "1f1b" else 2)
    held = [[stage.index for stage in cut.held_by(rank)] for rank in range(cut.processes)]
    wanted = {"1f1b": [[0], [1], [2]], "interleaved": [[0, 2], [1, 3]]}
    assert held == wanted.get(schedule, [[0, 3], [1, 2]])
    assert cut.last_rank == {"1f1b": 2, "interleaved": 1}.get(schedule, 0)
    blocks = [number for stage in cut.stages for number in range(stage.first, stage.stop)]
    assert blocks == list(range(8))


@pytest.mark.parametrize("name", ["untied", "tied", "ahead", "tied ahead"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parts_have_the_names_of_the_whole(schedule: Any, name: str) -> None:
    config = config_of(name)
    whole = build(config).state_dict()
    cut = Cut.of(config, schedule, 2)
    parts = []
    for rank in range(2):
        model = build(config)
        keep_only(model, cut, rank)
        parts.append(model.state_dict())
        assert all(torch.equal(tensor, whole[key]) for key, tensor in parts[-1].items())
        assert set(model.moe_layers) == {
            *(layer for stage in cut.held_by(rank) for layer in range(max(1, stage.first), stage.stop)),
            *([6] if config.mtp and rank == cut.last_rank else []),
        }
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    assert parts[0].keys() & parts[1].keys() == cut.doubled


def test_a_part_cannot_be_taken_for_the_whole() -> None:
    config = config_of("untied")
    cut = Cut.of(config, "1f1b", 2)
    first, last = build(config), build(config)
    keep_only(first, cut, 0)
    keep_only(last, cut, 1)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"blocks\.\d lies on another rank of the pipeline"):
        first(tokens)
    with pytest.raises(ConfigError, match="embedding lies on another rank of the pipeline"):
        last(tokens)
    with pytest.raises(ConfigError, match="head lies on another rank"):
        _ = first.head_weight


@pytest.mark.parametrize(
    ("layout", "name", "micro_batches", "words"),
    [
        ({"schedule": "zbv"}, "tied ahead", 8, r"tie_embeddings with 1 multi-token prediction modules.*1f1b"),
        ({"schedule": "dualpipev"}, "tied ahead", 8, r'schedule = "dualpipev" cannot train tie_embeddings'),
        ({"schedule": "zbv", "shard": 2}, "untied", 8, r"shard x context = 2: .*past the hooks.*interleaved"),
        ({"pipeline": 4}, "untied", 3, r"parallel.pipeline 4 with schedule = \"1f1b\" has 4 stages.*3 micro-batches"),
        ({"schedule": "dualpipev"}, "untied", 3, r"has 4 stages, and a step has 3 micro-batches"),
        ({"schedule": "interleaved"}, "untied", 5, r"in 2 equal rounds, and a step has 5: make it 4 or 6"),
        (
            {"schedule": "zbv", "pipeline": 4},
            "untied",
            9,
            r"needs 8 stages.*has 6 blocks: try --set parallel.pipeline=2",
        ),
        ({"pipeline": 7}, "untied", 9, r"needs 7 stages of a block or more.*none up to 6 divides 7 processes"),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(layout: Any, name: str, micro_batches: int, words: str) -> None:
    """Complaint 12 of distribution: fewer micro-batches than stages hang, a V-shaped schedule ends in a KeyError."""
    with pytest.raises(ConfigError, match=words):
        refusals(Layout(**{"pipeline": 2, **layout}), config_of(name), micro_batches)


@pytest.mark.parametrize(
    ("layout", "name", "micro_batches"),
    [
        ({"pipeline": 1, "schedule": "zbv", "shard": 2}, "tied ahead", 1),
        ({"schedule": "1f1b", "shard": 2}, "tied ahead", 2),
        ({"schedule": "interleaved"}, "tied ahead", 6),
        ({"schedule": "zbv", "replicate": 2}, "tied", 4),
        ({"schedule": "dualpipev"}, "ahead", 4),
        ({"schedule": "zbv"}, "ahead", 1),
        ({"schedule": "interleaved"}, "ahead", 1),
    ],
)
def test_what_can_be_is_not(layout: Any, name: str, micro_batches: int) -> None:
    refusals(Layout(**{"pipeline": 2, **layout}), config_of(name), micro_batches)
