"""Sizes against the figures that DeepSeekMoE (2401.06066) and DeepSeek LLM (2401.02954) print."""

from __future__ import annotations

import pytest

from finemoe.model.config import expand
from finemoe.model.presets import find_preset, resolve
from finemoe.model.size import ModelSize, measure, training_flops_per_token
from oracles.models import small_config


def size_of(name: str) -> ModelSize:
    preset = find_preset(name)
    config = expand(resolve({"preset": name}, name))
    return measure(config, preset.seq_len, preset.unrounded, preset.notes)


# Tables 1, 2, 3 and 6, training FLOPs of one sequence in units of 10^12, as printed.
PRINTED_FLOPS = {
    "dense-0.2b": "2.9",
    "hash-2b": "2.9",
    "switch-2b": "2.9",
    "gshard-2b": "4.3",
    "deepseek-moe-2b": "4.3",
    "gshard-2b-x1.5": "5.8",
    "dense-2b-x16": "24.6",
    "deepseek-moe-16b": "74.4",
    "deepseek-llm-7b": "183.5",
    "deepseek-llm-67b": "2057.5",
    "gshard-137b": "572.7",
    "deepseek-moe-142b-half": "374.6",
}

# Tables 1, 3 and 6 and Appendix A: total and active parameters in 10^9, as printed; None: see the next test.
PRINTED_PARAMETERS: dict[str, tuple[str | None, str | None]] = {
    "dense-0.2b": ("0.2", "0.2"),
    "hash-2b": ("2.0", "0.2"),
    "switch-2b": ("2.0", "0.2"),
    "gshard-2b": ("2.0", "0.3"),
    "deepseek-moe-2b": ("2.0", "0.3"),
    "deepseek-moe-16b": ("16.4", "2.8"),
    "deepseek-llm-7b": ("6.9", "6.9"),
    "deepseek-llm-67b": ("67.4", "67.4"),
    "gshard-137b": ("136.5", None),
    "deepseek-moe-145b": ("144.6", "22.2"),
    "deepseek-moe-142b-half": (None, None),
}

# Table 2: expert parameters in 10^9, total and active. Our widths are rounded up to a multiple of 8.
PRINTED_EXPERT_PARAMETERS = {
    "gshard-2b-x1.2": (2.3, 0.28),
    "gshard-2b-x1.5": (2.83, 0.35),
    "dense-2b-x4": (0.47, 0.47),
    "dense-2b-x16": (1.89, 1.89),
    "deepseek-moe-2b": (1.89, 0.24),
}


@pytest.mark.parametrize("name", PRINTED_FLOPS)
def test_training_flops_are_the_printed_ones(name: str) -> None:
    assert f"{size_of(name).training_flops_per_sequence / 1e12:.1f}" == PRINTED_FLOPS[name]


def test_145b_flops_are_within_half_a_thousandth_of_the_printed_ones_and_the_notes_say_so() -> None:
    size = size_of("deepseek-moe-145b")
    assert size.training_flops_per_sequence == pytest.approx(585.6e12, rel=5e-4)
    assert f"{size.training_flops_per_sequence / 1e12:.1f}T" == "585.5T"
    assert any("585.6T" in note and "585.5T" in note for note in size.notes)


@pytest.mark.parametrize("name", PRINTED_PARAMETERS)
def test_parameters_are_the_printed_ones(name: str) -> None:
    size, (total, active) = size_of(name), PRINTED_PARAMETERS[name]
    assert total is None or f"{size.total_parameters / 1e9:.1f}" == total
    assert active is None or f"{size.active_parameters / 1e9:.1f}" == active


def test_two_printed_figures_are_ours_rounded_down() -> None:
    # 142.37 and 21.68 here; printed 142.3 and 21.6.
    assert size_of("deepseek-moe-142b-half").total_parameters == pytest.approx(142.3e9, rel=1e-3)
    assert size_of("gshard-137b").active_parameters == pytest.approx(21.6e9, rel=5e-3)


def test_half_activated_model_has_13_6b_active_and_the_notes_say_why() -> None:
    size = size_of("deepseek-moe-142b-half")
    assert f"{size.active_parameters / 1e9:.1f}" == "13.6"
    assert any("12.2B" in note and "13.6B" in note for note in size.notes)


@pytest.mark.parametrize("name", PRINTED_EXPERT_PARAMETERS)
def test_expert_parameters_are_the_printed_ones(name: str) -> None:
    size, (total, active) = size_of(name), PRINTED_EXPERT_PARAMETERS[name]
    assert size.expert_parameters / 1e9 == pytest.approx(total, rel=0.02)
    assert size.active_expert_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_moe_arms_of_the_2b_comparison_have_equal_expert_parameters() -> None:
    arms = [size_of(n).expert_parameters for n in ("hash-2b", "switch-2b", "gshard-2b", "deepseek-moe-2b")]
    assert max(arms) / min(arms) < 1.005
    # the comparison at equal activation
    pair = [size_of(n).active_expert_parameters for n in ("gshard-2b", "deepseek-moe-2b")]
    assert max(pair) / min(pair) < 1.005


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek-llm-7b", 2 * 32 * 128 * 30),
        ("deepseek-llm-67b", 194_560),
        ("deepseek-moe-16b", 2 * 16 * 128 * 28),
        ("deepseek-moe-2b", 2 * 10 * 128 * 9),
    ],
)
def test_cache_elements_per_token(name: str, elements: int) -> None:
    assert size_of(name).cache_elements_per_token == elements


def test_67b_notes_that_shared_key_heads_cost_less_than_the_paper_counts() -> None:
    size = size_of("deepseek-llm-67b")
    built = size.training_flops_per_token * size.seq_len
    assert built < 0.95 * size.training_flops_per_sequence
    assert any("convention 2057T" in note and f"as built {built / 1e12:.4g}T" in note for note in size.notes)


def test_flops_as_built_are_counted_from_the_widths_as_built() -> None:
    # By hand, one dense and one MoE layer: 6 a weight, and for the scores 12 layers heads dim seq.
    attention = 2 * 16 * 8 * (4 + 2)
    dense, experts = 3 * 16 * 24, 3 * 16 * 8 * (2 + 1)
    weights = 23 * 16 + 2 * attention + dense + experts
    assert training_flops_per_token(small_config(), 10) == 6 * weights + 12 * 2 * 4 * 8 * 10


def test_a_model_without_unrounded_widths_carries_no_note() -> None:
    config = small_config(attention={"num_heads": 2, "num_kv_heads": 2, "head_dim": 8})
    assert measure(config, 32).notes == ()


def test_size_is_json_able() -> None:
    size = size_of("tiny-moe")
    assert size.to_dict()["total_parameters"] == size.total_parameters
    assert isinstance(size.to_dict()["notes"], list)
