"""The solver: arms sized from one standard feed-forward layer, as in the paper's tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelRecipe
from finemoe.model.presets import resolve
from finemoe.model.size import measure
from finemoe.studies.arms import ARMS, MatchingConfig, RoutingConfig, SizedArm, solve

PAPER_WIDTH = 3413  # 8/3 of 1280


def base(width: int = PAPER_WIDTH, hidden: int = 1280, layers: int = 9) -> ModelRecipe:
    return ModelRecipe.model_validate(
        {
            "vocab_size": 8192,
            "hidden_size": hidden,
            "num_layers": layers,
            "attention": {"num_heads": 10, "num_kv_heads": 10, "head_dim": 128},
            "feed_forward": {"kind": "dense", "ffn_hidden_size": width},
        }
    )


def sized(name: str, width: int = PAPER_WIDTH, **routing: Any) -> SizedArm:
    return solve(name, base(width), MatchingConfig(), RoutingConfig(**routing), 2048)


@pytest.mark.parametrize(
    ("name", "shared", "routed", "active", "width", "text"),
    [
        ("hash", 0, 16, 1, 3413, "0 + 1 of 16"),
        ("switch", 0, 16, 1, 3413, "0 + 1 of 16"),
        ("gshard", 0, 16, 2, 3413, "0 + 2 of 16"),
        ("gshard-x1.2", 0, 16, 2, 4096, "0 + 2 of 16"),
        ("gshard-x1.5", 0, 16, 2, 5120, "0 + 2 of 16"),
        ("shared-isolation", 1, 15, 1, 3413, "1 + 1 of 15"),
        ("segments-2", 1, 31, 3, 1706, "1 + 3 of 31"),
        ("deepseek-moe", 1, 63, 7, 853, "1 + 7 of 63"),
        ("deepseek-moe-2-shared", 2, 62, 6, 853, "2 + 6 of 62"),
        ("deepseek-moe-4-shared", 4, 60, 4, 853, "4 + 4 of 60"),
        ("deepseek-moe-half", 1, 63, 3, 853, "1 + 3 of 63"),
    ],
)
def test_mixtures_of_the_paper(name: str, shared: int, routed: int, active: int, width: int, text: str) -> None:
    arm = sized(name)
    layer = arm.model.blocks[0].feed_forward
    found = (layer.num_shared_experts, layer.num_routed_experts, layer.experts_per_token, layer.expert_hidden_size)
    assert found == (shared, routed, active, width)
    assert arm.routing == text
    assert len(arm.model.blocks) == 9


@pytest.mark.parametrize(("name", "width"), [("dense", 3413), ("dense-x4", 4 * 3413), ("dense-x16", 16 * 3413)])
def test_dense_arms(name: str, width: int) -> None:
    arm = sized(name)
    assert arm.model.blocks[0].feed_forward.ffn_hidden_size == width
    assert arm.mismatch == {"total_percent": 0, "active_percent": 0, "flops_percent": 0}


def test_expert_parameters_are_the_paper_s() -> None:
    """Table 1: 1.89 B expert parameters in all, 0.12 and 0.24 B of them active."""
    found = {name: measure(sized(name).model, 2048) for name in ("dense", "switch", "gshard", "deepseek-moe")}
    billions = {
        name: (size.expert_parameters / 1e9, size.active_expert_parameters / 1e9) for name, size in found.items()
    }
    assert billions["dense"] == pytest.approx((0.12, 0.12), abs=0.005)
    assert billions["switch"] == pytest.approx((1.89, 0.12), abs=0.005)
    assert billions["gshard"] == pytest.approx((1.89, 0.24), abs=0.005)
    assert billions["deepseek-moe"] == pytest.approx((1.89, 0.24), abs=0.005)


@pytest.mark.parametrize("name", sorted(set(ARMS) - {"gshard-x1.2", "gshard-x1.5"}))
def test_mismatch_is_nothing_when_widths_divide_and_is_counted_when_not(name: str) -> None:
    even = sized(name, width=3416).mismatch
    targets = dict.fromkeys(("total_percent", "active_percent", "flops_percent"), pytest.approx(0, abs=1e-9))
    assert even == (targets if name != "deepseek-moe-mtp" else {**targets, "flops_percent": None})
    odd = sized(name).mismatch
    segments = {"segments-2": 1706 * 2}.get(name, 853 * 4 if name.startswith(("deepseek", "sigmoid")) else 3413)
    assert odd["total_percent"] == pytest.approx(100 * (segments / 3413 - 1))


@given(
    name=st.sampled_from(sorted(ARMS)),
    quarter=st.integers(10, 400),
    total=st.integers(4, 20),
    hidden=st.sampled_from([32, 128]),
)
def test_expert_parameters_are_within_two_percent_of_their_multiple(
    name: str, quarter: int, total: int, hidden: int
) -> None:
    recipe = base(4 * quarter, hidden, layers=2)
    arm = solve(name, recipe, MatchingConfig(total_multiple=total), RoutingConfig(), 64)
    standard = 2 * 3 * hidden * 4 * quarter
    wanted = {"dense": 1, "dense-x4": 4, "gshard-x1.2": 1.2 * total, "gshard-x1.5": 1.5 * total}.get(name, total)
    size = measure(arm.model, 64)
    assert size.expert_parameters == pytest.approx(wanted * standard, rel=0.02)
    assert arm.mismatch["total_percent"] == pytest.approx(
        100 * (size.expert_parameters / (wanted * standard) - 1), abs=1e-6
    )


def test_routing_settings_reach_every_learned_router_and_no_other() -> None:
    settings: dict[str, Any] = {"balance": 0.5, "normalize_gates": True, "route_scale": 2.0, "capacity_factor": 1.25}
    for name in ("switch", "gshard", "deepseek-moe"):
        layer = sized(name, **settings).model.blocks[0].feed_forward
        assert (layer.router.normalize_gates, layer.router.route_scale) == (True, 2.0)
        assert (layer.balance.expert, layer.capacity_factor) == (0.5, 1.25)
    hashed = sized("hash", **settings, hash_table="balanced").model.blocks[0].feed_forward
    assert (hashed.router.table, hashed.balance.expert) == ("balanced", 0.0)


def test_only_the_feed_forward_layers_differ_between_arms() -> None:
    attention = {name: sized(name).model.blocks[0].attention for name in ARMS}
    assert len(set(map(str, attention.values()))) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gshrd", "did you mean `gshard`?"),
        ("deepseekmoe", "did you mean `deepseek-moe`?"),
        ("xyzzy", "known: dense, hash"),
    ],
)
def test_an_unknown_arm_suggests_a_known_one(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match="unknown arm") as caught:
        sized(name)
    assert says in str(caught.value)


def test_multiples_that_leave_no_routed_expert_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"leave 0 of 60 routed experts; raise matching\.active_multiple"):
        solve("deepseek-moe-4-shared", base(), MatchingConfig(active_multiple=1), RoutingConfig(), 64)


def test_a_preset_may_be_an_arm_and_is_not_resized() -> None:
    arm = solve("tiny-moe", resolve({"preset": "tiny-dense"}, "test"), MatchingConfig(), RoutingConfig(), 64)
    assert arm.routing == "1 + 7 of 63"
    assert set(arm.mismatch.values()) == {None}


def test_a_preset_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="losses per token compare only under one tokenizer"):
        sized("tiny-moe")
