"""Sizes against the figures that the papers print, the counts of the released weights, and the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finemoe.model.config import ModelConfig, expand
from finemoe.model.presets import PRESETS, find_preset, resolve
from finemoe.model.size import ModelSize, measure, training_flops_per_token
from finemoe.model.transformer import Transformer
from oracles.models import moe_table, small_config


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
    # V2 Appendix B and Table 9, Coder-V2; 2.4B active is without the input embedding, see below
    "deepseek-v2-lite": ("15.7", None),
    "deepseek-coder-v2-lite": ("15.7", None),
    "deepseek-v2-lite-mha": ("15.8", None),
}

# V2 3.1.2, Coder-V2, V3 4.2: without a decimal in print.
PRINTED_WHOLE_PARAMETERS = {
    "deepseek-v2": ("236", "21"),
    "deepseek-coder-v2": ("236", "21"),
    "deepseek-v3": ("671", "37"),
    "deepseek-r1": ("671", "37"),
}

# All numbers in the released files, which repeat no tensor but V3's shared ones.
RELEASED = {
    "deepseek-coder-1.3b": 1_346_471_936,
    "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-coder-33b": 33_342_991_360,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-r1-distill-llama-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
}

# V2 Table 9, in 10^3 elements a token and model.
PRINTED_CACHE = {
    "deepseek-v2-lite": "15.6",
    "deepseek-v2-lite-mha": "110.6",
    "deepseek-v2": "34.6",
    "deepseek-v2-mha": "860.2",
}

_LATENT = {
    "kind": "latent",
    "num_heads": 3,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
}
_GROUPED = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}

VARIANTS: dict[str, dict[str, Any]] = {
    "latent, queries compressed": {"attention": {**_LATENT, "q_lora_rank": 9}},
    "latent, queries direct": {"attention": _LATENT},
    "biases": {"attention": {**_GROUPED, "qkv_bias": True}},
    "norms of heads": {"attention": {**_GROUPED, "qk_norm": "head"}},
    "norms of projections": {"attention": {**_GROUPED, "qk_norm": "projection"}},
    "groups": {"feed_forward": moe_table(router={"kind": "group_limited", "num_groups": 3})},
    "selection bias": {"feed_forward": moe_table("sigmoid_biased")},
    "hashed": {"feed_forward": moe_table("hash_layer")},
    "gated shared experts": {"feed_forward": moe_table(gate_shared_experts=True)},
    "no shared experts": {"feed_forward": moe_table(num_shared_experts=0)},
    "tied": {"tie_embeddings": True},
    "two modules": {"mtp_depth": 2},
    "latent and biased, with a module, tied": {
        "attention": {**_LATENT, "q_lora_rank": 9},
        "feed_forward": moe_table("sigmoid_biased"),
        "mtp_depth": 1,
        "tie_embeddings": True,
    },
    "a dense module": {"feed_forward": {"kind": "dense", "ffn_hidden_size": 20}, "mtp_depth": 1},
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


@pytest.mark.parametrize("name", PRINTED_WHOLE_PARAMETERS)
def test_parameters_in_whole_billions_are_the_printed_ones(name: str) -> None:
    size, (total, active) = size_of(name), PRINTED_WHOLE_PARAMETERS[name]
    assert f"{size.total_parameters / 1e9:.0f}" == total
    # The papers leave the input embedding out here and there: 37 lies between V3's two figures, 20.9 and 21.4 are 21.
    assert size.active_parameters_without_embedding / 1e9 - 0.5 < int(active) < size.active_parameters / 1e9 + 0.5


def test_the_two_readings_of_active_parameters() -> None:
    lite, v2, v3 = (size_of(name) for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3"))
    assert f"{lite.active_parameters / 1e9:.2f}" == "2.66"
    assert f"{lite.active_parameters_without_embedding / 1e9:.2f}" == "2.45"  # printed 2.4
    assert f"{v2.active_parameters / 1e9:.0f}" == f"{v2.active_parameters_without_embedding / 1e9:.0f}" == "21"
    assert f"{v3.active_parameters / 1e9:.2f}" == "37.55"
    assert f"{v3.active_parameters_without_embedding / 1e9:.1f}" == "36.6"
    assert any("2.4B" in note for note in lite.notes)
    assert any("36.6B" in note for note in v3.notes)


def test_a_tied_embedding_is_the_head_and_stays() -> None:
    size = size_of("smollm2-135m")
    assert size.active_parameters_without_embedding == size.active_parameters == size.total_parameters


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_weights(name: str) -> None:
    assert size_of(name).total_parameters == RELEASED[name]


def test_the_module_of_v3_is_beside_the_671b_and_its_copies_make_the_685b() -> None:
    size = size_of("deepseek-v3")
    assert f"{size.mtp_parameters / 1e9:.1f}" == "11.6"
    copies = 2 * 129_280 * 7168
    # Hugging Face counts 684.53B, the scales of the FP8 blocks of 128 x 128 among them.
    scales = (size.total_parameters + size.mtp_parameters) / 128**2
    assert size.total_parameters + size.mtp_parameters + copies + scales == pytest.approx(684.53e9, rel=1e-5)
    assert any("685B" in note for note in size.notes)
    without = measure(expand(resolve({"preset": "deepseek-v3", "mtp_depth": 0}, "here")), 4096)
    assert (without.total_parameters, without.mtp_parameters) == (size.total_parameters, 0)
    assert without.active_parameters == size.active_parameters
    assert without.cache_elements_per_token == size.cache_elements_per_token


def count_weights(config: ModelConfig) -> int:
    """All that a checkpoint of the model holds, but the tables of Hash Layer, which are no weights."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return sum(tensor.numel() for name, tensor in state.items() if not name.endswith("expert_of_token"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_counts_what_its_model_holds(name: str) -> None:
    size = size_of(name)
    assert size.total_parameters + size.mtp_parameters == count_weights(expand(resolve({"preset": name}, name)))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_part_counts_what_its_module_holds(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    size = measure(config, 8)
    assert size.total_parameters + size.mtp_parameters == count_weights(config)
    main = small_config(**{**changes, "mtp_depth": 0})
    assert size.total_parameters == count_weights(main)
    shared = config.vocab_size * config.hidden_size * (0 if config.tie_embeddings else 1)
    assert size.active_parameters - size.active_parameters_without_embedding == shared


def test_gates_of_shared_experts_are_no_expert_parameters() -> None:
    plain = measure(small_config(), 8)
    gated = measure(small_config(feed_forward=moe_table(gate_shared_experts=True)), 8)
    assert gated.total_parameters == plain.total_parameters + 16
    assert gated.expert_parameters == plain.expert_parameters
    assert gated.active_expert_parameters == plain.active_expert_parameters


@pytest.mark.parametrize("name", PRINTED_CACHE)
def test_cache_elements_per_token_are_the_printed_ones(name: str) -> None:
    assert f"{size_of(name).cache_elements_per_token / 1e3:.1f}" == PRINTED_CACHE[name]


def test_v2_caches_93_3_percent_less_than_67b_in_6_bits_and_82_2_percent_in_16() -> None:
    v2, dense = (size_of(name).cache_elements_per_token for name in ("deepseek-v2", "deepseek-llm-67b"))
    assert f"{100 * (1 - v2 * 6 / (dense * 16)):.1f}" == "93.3"
    assert f"{100 * (1 - v2 / dense):.1f}" == "82.2"


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


def test_flops_of_latent_attention_are_counted_as_built() -> None:
    # By hand: down, up, down with the rotary key, up, out; scores over 5 + 4 components, mixing over 7.
    attention = 16 * 9 + 9 * 3 * 9 + 16 * (6 + 4) + 6 * 3 * (5 + 7) + 3 * 7 * 16
    dense, experts = 3 * 16 * 24, 3 * 16 * 8 * (2 + 1)
    config = small_config(attention={**_LATENT, "q_lora_rank": 9})
    expected = 6 * (23 * 16 + 2 * attention + dense + experts) + 2 * 3 * 2 * 10 * 3 * (9 + 7)
    assert training_flops_per_token(config, 10) == expected
    assert measure(config, 10).training_flops_per_sequence == 10 * expected


def test_norms_and_biases_are_parameters_and_no_products() -> None:
    plain = small_config(attention=_GROUPED)
    for more in ({"qkv_bias": True}, {"qk_norm": "head"}, {"qk_norm": "projection"}):
        richer = small_config(attention={**_GROUPED, **more})
        assert measure(richer, 10).total_parameters > measure(plain, 10).total_parameters
        assert training_flops_per_token(richer, 10) == training_flops_per_token(plain, 10)


def test_each_prediction_module_costs_a_block_a_projection_and_a_head() -> None:
    plain, two = (small_config(mtp_depth=depth) for depth in (0, 2))
    attention, experts = 2 * 16 * 8 * (4 + 2), 3 * 16 * 8 * (2 + 1)
    one = 6 * (23 * 16 + 2 * 16 * 16 + attention + experts) + 12 * 4 * 8 * 10
    assert training_flops_per_token(two, 10) - training_flops_per_token(plain, 10) == 2 * one
    sizes = measure(plain, 10), measure(two, 10)
    assert sizes[1].training_flops_per_sequence > sizes[0].training_flops_per_sequence
    assert "parameters and cache leave multi-token prediction out" in sizes[1].notes[-1]


def test_a_model_without_unrounded_widths_carries_no_note() -> None:
    config = small_config(attention={"num_heads": 2, "num_kv_heads": 2, "head_dim": 8})
    assert measure(config, 32).notes == ()


def test_size_is_json_able() -> None:
    size = size_of("tiny-moe")
    assert size.to_dict()["total_parameters"] == size.total_parameters
    assert isinstance(size.to_dict()["notes"], list)
