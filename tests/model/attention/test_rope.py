"""Rotary positions: two layouts against complex numbers, every scaling against its formula and transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from finemoe.model.rope import SCALINGS, RopeConfig, YarnScaling, rotate, rotation
from oracles import rope as oracle

BATCH, HEADS, SEQ, DIM = 2, 3, 5, 8
LAYOUTS = ["half_split", "interleaved"]
NEAR = torch.tensor([[0, 1, 2, 3, 4], [9, 7, 30, 0, 1]])
FAR = torch.tensor([[0, 1, 2, 3, 4], [100, 7, 4095, 0, 1]])


def configured(scaling: dict[str, Any] | None = None, **fields: Any) -> RopeConfig:
    return RopeConfig.model_validate({"scaling": scaling, **fields})


def frequencies(dim: int, config: RopeConfig) -> Tensor:
    """What position 1 turns by."""
    cosine, sine = rotation(torch.ones(1, 1, dtype=torch.int64), dim, config)
    return torch.atan2(sine, cosine)[0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("theta", [100.0, 10_000.0])
@pytest.mark.parametrize(("positions", "tolerance"), [(NEAR, 1e-5), (FAR, 1e-3)], ids=["near", "far"])
def test_rotation_is_multiplication_by_a_complex_number(
    theta: float, layout: str, positions: Tensor, tolerance: float
) -> None:
    states = torch.randn(BATCH, HEADS, SEQ, DIM, requires_grad=True)
    output = rotate(states, *rotation(positions, DIM, configured(theta=theta)), layout)
    expected = oracle.rotate(states, positions, oracle.plain(DIM, theta), layout)
    close = {"rtol": tolerance, "atol": tolerance}  # angles in float32 lose three digits at position 4095
    torch.testing.assert_close(output.double(), expected, **close)
    direction = torch.randn_like(output)
    (found,) = torch.autograd.grad((output * direction).sum(), states)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), states)
    torch.testing.assert_close(found, wanted, **close)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotated_products_depend_on_the_distance_only(layout: str) -> None:
    query, key = torch.randn(1, 1, 1, DIM), torch.randn(1, 1, 1, DIM)

    def product(at: int, other: int) -> Tensor:
        placed = ((query, at), (key, other))
        first, second = (rotate(s, *rotation(torch.tensor([[p]]), DIM, RopeConfig()), layout) for s, p in placed)
        return (first * second).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=1e-4, atol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_the_layouts_are_one_rotation_of_reordered_components() -> None:
    states, angles = torch.randn(BATCH, HEADS, SEQ, DIM), rotation(NEAR, DIM, RopeConfig())
    reordered = torch.cat((states[..., 0::2], states[..., 1::2]), dim=-1)
    turned = rotate(states, *angles, "interleaved")
    expected = rotate(reordered, *angles, "half_split")
    torch.testing.assert_close(torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1), expected)
    assert not torch.allclose(turned, rotate(states, *angles, "half_split"))


LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DEEPSEEK = {"kind": "yarn", "factor": 40.0, "original_max_positions": 4096}
FORMULAS: dict[str, tuple[dict[str, Any], float, list[float]]] = {
    "linear": ({"kind": "linear", "factor": 4.0}, 1e5, oracle.linear(64, 1e5, 4.0)),
    "ntk": ({"kind": "ntk", "factor": 3.0}, 1e4, oracle.ntk(64, 1e4, 3.0)),
    "llama3": ({**LLAMA3, "original_max_positions": 8192}, 5e5, oracle.llama3(64, 5e5, 8.0, 1.0, 4.0, 8192)),
    "llama3 short": ({**LLAMA3, "original_max_positions": 64}, 5e5, oracle.llama3(64, 5e5, 8.0, 1.0, 4.0, 64)),
    "yarn": (DEEPSEEK, 1e4, oracle.yarn(64, 1e4, 40.0, 4096)),
    "yarn short": ({**DEEPSEEK, "original_max_positions": 64}, 1e4, oracle.yarn(64, 1e4, 40.0, 64)),
    "yarn narrow": (
        {**DEEPSEEK, "beta_fast": 6.0, "beta_slow": 5.0},
        1e4,
        oracle.yarn(64, 1e4, 40.0, 4096, fast=6.0, slow=5.0),
    ),
}


@pytest.mark.parametrize(("scaling", "theta", "expected"), FORMULAS.values(), ids=FORMULAS)
def test_stretched_frequencies_are_those_of_the_formula(
    scaling: dict[str, Any], theta: float, expected: list[float]
) -> None:
    found = frequencies(64, configured(scaling, theta=theta))
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert not torch.allclose(found, frequencies(64, configured(theta=theta)))


def test_every_scaling_has_its_formula_here() -> None:
    assert {scaling["kind"] for scaling, _, _ in FORMULAS.values()} == set(SCALINGS)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_factor_of_one_stretches_nothing(kind: str) -> None:
    scaling = {"kind": kind, "factor": 1.0, **({"original_max_positions": 64} if kind in ("llama3", "yarn") else {})}
    config = configured(scaling)
    torch.testing.assert_close(frequencies(64, config), frequencies(64, RopeConfig()))
    assert config.softmax_factor == 1.0


def test_ntk_is_a_plain_rope_of_its_scaled_theta() -> None:
    config = configured({"kind": "ntk", "factor": 4.0}, theta=1e4)
    plain = configured(theta=config.scaling.scaled_theta(1e4, DIM))
    assert torch.equal(frequencies(DIM, config), frequencies(DIM, plain))
    fastest, slowest = frequencies(DIM, config)[[0, -1]].tolist()
    assert (fastest, slowest) == pytest.approx((1.0, oracle.plain(DIM, 1e4)[-1] / 4))


# V2: mscale = mscale_all_dim = 0.707, sqrt(t) = 0.0707 ln s + 1 (section 3.1.4); V3: 1 (section 4.3).
@pytest.mark.parametrize(("mscale", "slope"), [(0.707, 0.0707), (1.0, 0.1)], ids=["V2", "V3"])
@pytest.mark.parametrize("factor", [2.0, 40.0])
def test_deepseek_sharpens_the_softmax_and_leaves_the_rotation(mscale: float, slope: float, factor: float) -> None:
    scaling = {**DEEPSEEK, "factor": factor, "mscale": mscale, "mscale_all_dim": mscale}
    config = configured(scaling)
    assert config.softmax_factor == pytest.approx((slope * math.log(factor) + 1) ** 2)
    cosine, sine = rotation(NEAR, DIM, config)
    torch.testing.assert_close(cosine.square() + sine.square(), torch.ones_like(cosine))


def test_yarns_own_form_grows_the_rotation_and_leaves_the_softmax() -> None:
    config = configured(DEEPSEEK)
    assert config.softmax_factor == 1.0
    cosine, sine = rotation(NEAR, DIM, config)
    expected = torch.full_like(cosine, 0.1 * math.log(40.0) + 1)
    torch.testing.assert_close((cosine.square() + sine.square()).sqrt(), expected)


def test_two_different_mscales_share_the_work() -> None:
    scaling = YarnScaling(factor=40.0, original_max_positions=4096, mscale=0.5, mscale_all_dim=2.0)
    roots = [0.1 * m * math.log(40.0) + 1 for m in (0.5, 2.0)]
    assert scaling.rotary_factor == pytest.approx(roots[0] / roots[1])
    assert scaling.softmax_factor == pytest.approx(roots[1] ** 2)


# ours -> the fields of transformers' rope_parameters
WITNESSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "ntk": ({"kind": "ntk", "factor": 3.0}, {"rope_type": "dynamic", "factor": 1.0}),
    "llama3": (
        {**LLAMA3, "original_max_positions": 8192},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    **{
        name: (
            {**DEEPSEEK, **ours},
            {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, **theirs},
        )
        for name, ours, theirs in (
            ("yarn", {}, {}),
            ("yarn of V2", *([{"mscale": 0.707, "mscale_all_dim": 0.707}] * 2)),
            ("yarn of V3", *([{"mscale": 1.0, "mscale_all_dim": 1.0}] * 2)),
            ("yarn, two mscales", *([{"mscale": 0.5, "mscale_all_dim": 2.0}] * 2)),
            ("yarn, whole", *([{"truncate": False}] * 2)),
            ("yarn, other edges", *([{"beta_fast": 16.0, "beta_slow": 2.0}] * 2)),
        )
    },
}


@pytest.mark.parametrize(("ours", "theirs"), WITNESSED.values(), ids=WITNESSED)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_stretched_frequencies_are_those_of_transformers(
    ours: dict[str, Any], theirs: dict[str, Any], theta: float
) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=163_840,
        rope_parameters={"rope_theta": theta, **theirs},
    )
    # Their dynamic form grows the base with the length: three times the limit is our factor of 3.
    length = {"seq_len": 3 * 163_840} if theirs["rope_type"] == "dynamic" else {}
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, torch.device("cpu"), **length)
    mine = configured(ours, theta=theta)
    torch.testing.assert_close(frequencies(64, mine), expected, rtol=2e-6, atol=0)
    cosine, sine = rotation(NEAR, 64, mine)
    torch.testing.assert_close((cosine.square() + sine.square()).sqrt(), torch.full_like(cosine, factor))


REFUSED = {
    "a yarn that keeps nothing": ({**DEEPSEEK, "beta_fast": 0.5}, "beta_fast 0.5 must not be below beta_slow 1.0"),
    "a blend of no width": (
        {**LLAMA3, "original_max_positions": 64, "high_freq_factor": 1.0},
        "high_freq_factor 1.0 must be above low_freq_factor 1.0",
    ),
    "nothing known of the original": ({"kind": "yarn", "factor": 2.0}, "original_max_positions"),
    "a factor of 0": ({"kind": "linear", "factor": 0}, "greater than 0"),
}


@pytest.mark.parametrize(("scaling", "message"), REFUSED.values(), ids=REFUSED)
def test_impossible_scalings_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(scaling)
