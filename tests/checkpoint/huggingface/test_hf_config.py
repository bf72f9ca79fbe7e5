"""config.json of every family: read exactly, refused where we compute something else, written back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.huggingface.released_configs import RELEASED
from finemoe.checkpoint.huggingface.families import FAMILIES, family_of, representable_as
from finemoe.checkpoint.huggingface.fields import IRRELEVANT, TRAINING_ONLY
from finemoe.core.errors import CheckpointError
from finemoe.model.config import ModelConfig, ModelRecipe, expand
from finemoe.model.moe.balance import BalanceConfig
from finemoe.model.moe.layer import MoEConfig
from finemoe.model.presets import PRESETS

BY_FAMILY: dict[str, dict[str, Any]] = {raw["model_type"]: raw for raw in RELEASED.values()}


def changed(family: str, **changes: Any) -> dict[str, Any]:
    """The released config of a family with other values; a value of ... removes the field."""
    raw = {**copy.deepcopy(BY_FAMILY[family]), **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def computed(config: ModelConfig) -> ModelConfig:
    """`config` without what concerns training alone."""
    blank = {"balance": BalanceConfig(), "capacity_factor": None, "capacity_level": "expert", "capacity_exempt": 0.0}

    def strip(block: Any) -> Any:
        layer = block.feed_forward
        if not isinstance(layer, MoEConfig):
            return block
        return block.model_copy(update={"feed_forward": layer.model_copy(update=blank)})

    layers = {"blocks": tuple(map(strip, config.blocks)), "mtp": tuple(map(strip, config.mtp))}
    return config.model_copy(update={**layers, "init_std": 0.02})


@pytest.mark.parametrize("name", sorted(RELEASED.keys() & PRESETS.keys()))
def test_published_configs_are_our_presets(name: str) -> None:
    found = FAMILIES[RELEASED[name]["model_type"]].to_config(RELEASED[name])
    preset = expand(ModelRecipe.model_validate(PRESETS[name].model))
    assert computed(found) == computed(preset.model_copy(update={"max_positions": found.max_positions}))
    assert PRESETS[name].model.get("max_positions") in (None, found.max_positions)


@pytest.mark.parametrize("name", RELEASED)
def test_published_configs_are_written_back(name: str) -> None:
    raw = RELEASED[name]
    family = family_of(raw)
    config = family.to_config(raw)
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    back = family.from_config(config, **ids, dtype="bfloat16")
    assert family.to_config(back) == config
    left = {"auto_map", "is_llama_config", "transformers.js_config", "transformers_version", "quantization_config"}
    left |= {"max_window_layers", "sliding_window", "use_mrope", "output_router_logits", "clip_qkv", "rope_interleaved"}
    left |= set(TRAINING_ONLY) | ({"aux_loss_alpha", "seq_aux"} if family.name in ("deepseek_v3", "kimi_k2") else set())
    if len(config.moe_layers) == len(config.blocks) and "moe_intermediate_size" in raw:
        left.add("intermediate_size")  # of the dense layers, of which there are none
    same = raw.keys() - left
    rope = ("rope_scaling", "rope_theta")
    assert {key: back[key] for key in same if key not in rope} == {key: raw[key] for key in same if key not in rope}
    assert back["rope_theta"] == raw["rope_theta"]


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_not_taken_over_is_said(name: str) -> None:
    raw = RELEASED[name]
    notes = family_of(raw).read(raw).notes
    expected = {key for key in ("router_aux_loss_coef",) if key in raw}
    expected |= {"aux_loss_alpha", "FP8"} if name in ("deepseek-v3", "kimi-k2") else set()
    assert len(notes) == len(expected)
    assert all(any(key in note for note in notes) for key in expected)


@pytest.mark.parametrize("name", RELEASED)
def test_no_field_is_passed_over_in_silence(name: str) -> None:
    """Whatever is changed, the model changes, or it is refused, or a note says so, or the table says why not."""
    raw = RELEASED[name]
    family = family_of(raw)
    before = family.read(raw)
    # Read together with others: idle here.
    idle = {"num_key_value_heads", "max_window_layers", "intermediate_size", "sliding_window", "use_sliding_window"}
    idle |= {"n_group", "topk_group"} if raw.get("topk_method") == "greedy" else set()
    for key in raw.keys() - IRRELEVANT.keys() - idle:
        try:
            after: Any = family.read({**raw, key: _other(raw[key])})
        except CheckpointError as error:
            after = error
        assert after != before, key


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {**value, "factor": 3.0}
    return [1] if isinstance(value, list) else 7


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "`attention_bias` is true"),
    ("llama", {"mlp_bias": True}, "`mlp_bias`"),
    ("llama", {"hidden_act": "gelu"}, '`hidden_act` is "gelu"'),
    ("llama", {"sliding_window": 4096}, "`sliding_window`"),
    (
        "mistral",
        {"sliding_window": 4096},
        "`sliding_window` is 4096: finemoe has no sliding-window attention; it reads null",
    ),
    (
        "mistral",
        {"sliding_window": ...},
        "`sliding_window` is 4096: finemoe has no sliding-window attention, and this family",
    ),
    ("mistral", {"sliding_window": "no"}, "`sliding_window`"),
    ("mistral", {"attention_bias": True}, "`attention_bias` is true"),
    ("deepseek_v3", {"rope_interleave": None}, "`rope_interleave` is null: transformers takes that for false"),
    ("llama", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor`"),
    ("llama", {"rope_interleaved": True}, "`rope_interleaved`"),
    ("llama", {"vocab_size": ...}, "`vocab_size` is missing"),
    ("llama", {"hidden_size": "576"}, "`hidden_size`"),
    ("llama", {"hidden_size": True}, "`hidden_size`"),
    ("llama", {"num_hidden_layers": 10**9}, "`num_hidden_layers`"),
    ("llama", {"num_hidden_layers": 0}, "`num_hidden_layers`"),
    ("llama", {"num_attention_heads": 7}, "`num_attention_heads`"),
    ("llama", {"num_key_value_heads": 2}, "num_kv_heads 2"),
    ("llama", {"rms_norm_eps": 0}, "`rms_norm_eps`"),
    ("llama", {"rms_norm_eps": 10**400}, "`rms_norm_eps`"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "`architectures`"),
    ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "`quantization_config`"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types`"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "`rope_scaling.rope_type`"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "`rope_scaling.factor`"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "one name"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "alpha": 1}}, "`rope_scaling.alpha`"),
    ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
    ("llama", {"rope_scaling": 4}, "`rope_scaling`"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "keep one"),
    ("llama", {"rope_theta": 1.0}, "`rope_theta`"),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 0.9}},
        "YaRN multiplies cosines and sines by 0.9",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}},
        "no component to blend",
    ),
    ("qwen2", {"use_mrope": True}, "`use_mrope`"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9}, "`use_sliding_window`"),
    ("qwen3", {"attention_bias": True}, "`attention_bias`"),
    ("mixtral", {"sliding_window": 4096}, "`sliding_window`"),
    ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token 9"),
    ("olmoe", {"clip_qkv": 8.0}, "`clip_qkv`"),
    ("olmoe", {"head_dim": 64}, "`head_dim`"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 5000}, "`shared_expert_intermediate_size`"),
    ("qwen2_moe", {"mlp_only_layers": "all"}, "`mlp_only_layers`"),
    ("qwen2_moe", {"num_experts": 10**7, "num_experts_per_tok": 1}, "experts in all"),
    ("deepseek", {"scoring_func": "sigmoid"}, "`scoring_func`"),
    ("deepseek", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type"),
    ("deepseek", {"routed_scaling_factor": 2.0}, "`routed_scaling_factor`"),
    ("deepseek_v2", {"norm_topk_prob": True}, "`norm_topk_prob`"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "`scoring_func`"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "`topk_method`"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "`moe_layer_freq`"),
    ("deepseek_v2", {"num_key_value_heads": 8}, "`num_key_value_heads`"),
    ("deepseek_v2", {"attention_bias": True}, "`attention_bias`"),
    ("deepseek_v2", {"n_group": 7}, "num_groups 7"),
    ("deepseek_v2", {"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings"),
    ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}, "`scoring_func`"),
    ("deepseek_v3", {"topk_method": "greedy"}, "`topk_method`"),
    ("deepseek_v3", {"index_topk": 2048}, "`index_topk`"),
    ("deepseek_v3", {"head_dim": 128}, "`head_dim`"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
    ("deepseek_v3", {"quantization_config": "fp8"}, "`quantization_config`"),
    ("deepseek_v3", {"num_mtp_layers": 2}, "`num_mtp_layers`"),
    ("glm4_moe", {"partial_rotary_factor": 1.5}, "`partial_rotary_factor` is 1.5: a share of 128"),
    ("glm4_moe", {"partial_rotary_factor": 0.01}, "`partial_rotary_factor` is 0.01"),
    ("glm4_moe", {"partial_rotary_factor": 0.18}, "rotary_dim 23 is odd"),
    ("glm4_moe", {"partial_rotary_factor": "half"}, "`partial_rotary_factor`"),
    ("glm4_moe", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "keep one"),
    ("glm4_moe", {"num_mtp_layers": 2}, "`num_mtp_layers`"),
    ("glm4_moe", {"n_group": 3}, "num_groups 3"),
    ("glm4_moe", {"use_qk_norm": "yes"}, "`use_qk_norm`"),
    ("kimi_k2", {"scoring_func": "softmax"}, "`scoring_func`"),
    ("qwen3", {"use_qk_norm": False}, "`use_qk_norm`"),
    ("olmoe", {"use_qk_norm": False}, "`use_qk_norm`"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSALS, ids=str)
def test_refusals(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        FAMILIES[family].read(changed(family, **changes))
    assert message in str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "attn_factor": ("qwen3-0.6b", {"rope_scaling": {**YARN, "attn_factor": 0.878}}, "`rope_scaling.attn_factor` 0.878"),
    "no original context": ("qwen3-0.6b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "names no `original"),
    "a setting of another type": (
        "qwen3-0.6b",
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
        "`rope_scaling.beta_fast` 3 is no setting of rope type 'linear'",
    ),
    "groups": ("deepseek-v3", {"n_group": ..., "topk_group": ...}, "n_group 8, topk_group 4 is taken"),
    "gates": ("qwen3-30b-a3b", {"norm_topk_prob": ...}, "norm_topk_prob false is taken"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_others_read_differently_or_a_file_leaves_out_is_said_aloud(case: str) -> None:
    name, changes, says = NAMED[case]
    raw = {key: value for key, value in {**RELEASED[name], **changes}.items() if value is not ...}
    (warning,) = family_of(raw).read(raw).warnings
    assert says in warning
    assert family_of(raw).read(RELEASED[name]).warnings == ()


def test_windows_that_no_layer_has_stop_nothing() -> None:
    raw = RELEASED["qwen3-0.6b"]
    plain = family_of(raw).to_config(raw)
    length, layers = raw["max_position_embeddings"], raw["num_hidden_layers"]
    for idle in (
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": length},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": layers},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"] * layers},
    ):
        assert family_of(raw).to_config({**raw, **idle}) == plain
    used = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": layers - 1}
    with pytest.raises(CheckpointError, match="layers from 27 on have a window of 9"):
        family_of(raw).to_config({**raw, **used})


@pytest.mark.parametrize("drop", ["mscale", "mscale_all_dim"])
def test_half_of_an_mscale_is_ambiguous(drop: str) -> None:
    rope = {key: value for key, value in BY_FAMILY["deepseek_v2"]["rope_scaling"].items() if key != drop}
    rope = {**rope, **({"mscale": 0.707} if drop == "mscale_all_dim" else {})}
    with pytest.raises(CheckpointError, match="mscale"):
        FAMILIES["deepseek_v2"].read(changed("deepseek_v2", rope_scaling=rope))


def test_kimi_k2_is_deepseek_v3_in_every_field() -> None:
    """A blend of YaRN whose edges are one, too."""
    raw = BY_FAMILY["kimi_k2"]
    config = FAMILIES["kimi_k2"].to_config(raw)
    assert config == FAMILIES["deepseek_v3"].to_config({**raw, "model_type": "deepseek_v3"})
    scaling = config.blocks[0].attention.rope.scaling
    assert scaling.beta_fast == scaling.beta_slow == 1
    assert FAMILIES["kimi_k2"].from_config(config)["model_type"] == "kimi_k2"


def test_where_the_share_of_turning_components_stands() -> None:
    """Beside the rope settings, as released; among them, as transformers 5 writes it; or nowhere: half."""
    config = FAMILIES["glm4_moe"].to_config(BY_FAMILY["glm4_moe"])
    assert config.blocks[0].attention.rotary_dim == 64
    inside = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    spelt = changed("glm4_moe", rope_parameters=inside, rope_scaling=..., rope_theta=..., partial_rotary_factor=...)
    for raw in (spelt, changed("glm4_moe", partial_rotary_factor=...)):
        assert FAMILIES["glm4_moe"].to_config(raw) == config
    whole = FAMILIES["glm4_moe"].to_config(changed("glm4_moe", partial_rotary_factor=1.0))
    assert whole.blocks[0].attention.rotary_dim is None
    assert FAMILIES["glm4_moe"].from_config(whole)["partial_rotary_factor"] == 1


def test_settings_that_a_family_never_looks_at() -> None:
    """Qwen3-Coder ships with them; another value is reported, not refused, as its code would run."""
    idle = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    family, raw = FAMILIES["qwen3_moe"], BY_FAMILY["qwen3_moe"]
    assert family.read({**raw, **idle}) == family.read(raw)
    assert any("`qkv_bias` true is unknown" in note for note in family.read({**raw, **idle, "qkv_bias": True}).notes)


def test_another_model_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"deepseek_v32.*deepseek_v3"):
        family_of(changed("deepseek_v3", model_type="deepseek_v32"))
    with pytest.raises(CheckpointError, match="model_type"):
        FAMILIES["llama"].read(changed("qwen2"))


def test_both_spellings_of_rope_settings() -> None:
    for family in ("llama", "deepseek_v2", "deepseek_v3", "qwen3_moe"):
        old = BY_FAMILY[family]
        scaling = {key: value for key, value in (old["rope_scaling"] or {}).items() if key != "type"}
        kind = (old["rope_scaling"] or {}).get("type", "default")
        new = {"rope_type": kind, "rope_theta": old["rope_theta"], **scaling}
        spelt = changed(
            family, rope_parameters=new, rope_scaling=..., rope_theta=..., dtype="bfloat16", torch_dtype=...
        )
        assert FAMILIES[family].read(spelt) == FAMILIES[family].read(old)


def test_notes() -> None:
    family = FAMILIES["llama"]
    read = family.read(changed("llama", attention_dropout=0.1, rope_scaling={"type": "dynamic", "factor": 2.0}, zeta=3))
    assert read.config == family.to_config(BY_FAMILY["llama"])
    for word in ("`attention_dropout` 0.1", "dynamic", "`zeta` 3 is unknown"):
        assert any(word in note for note in read.notes)
    pooled = FAMILIES["deepseek"].read(changed("deepseek", seq_aux=False))
    assert not pooled.config.blocks[1].feed_forward.balance.expert
    assert "aux_loss_alpha" in pooled.notes[0]


def test_dense_deepseek_models() -> None:
    for family in ("deepseek", "deepseek_v2"):
        config = FAMILIES[family].to_config(changed(family, n_routed_experts=None))
        assert not config.moe_layers
        assert FAMILIES[family].to_config(FAMILIES[family].from_config(config)) == config
    v3 = FAMILIES["deepseek_v3"].to_config(changed("deepseek_v3", first_k_dense_replace=62))
    assert not v3.moe_layers
    assert FAMILIES["deepseek_v3"].to_config(FAMILIES["deepseek_v3"].from_config(v3)) == v3


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_written_where_a_family_computes_it(preset: str) -> None:
    config = expand(ModelRecipe.model_validate(PRESETS[preset].model))
    reasons = representable_as(config)
    assert reasons.keys() == FAMILIES.keys()
    fitting = [name for name, reason in reasons.items() if reason is None]
    assert fitting or preset in ("hash-2b", "deepseek-v2-mha")
    for name in fitting:
        raw = FAMILIES[name].from_config(config, max_positions=4096)
        again = FAMILIES[name].to_config(raw)
        wanted = config.model_copy(update={"max_positions": config.max_positions or 4096})
        assert computed(again) == computed(wanted)
        assert (again == wanted) == (not FAMILIES[name].lost(config))


def test_reasons_name_what_stands_in_the_way() -> None:
    v3 = expand(ModelRecipe.model_validate(PRESETS["tiny-v3"].model))
    reasons = representable_as(v3)
    assert reasons["deepseek_v3"] is None
    assert "prediction" in (reasons["llama"] or "")
    assert "latent" in (representable_as(v3.model_copy(update={"mtp": ()}))["llama"] or "")
    llama = FAMILIES["llama"].to_config(BY_FAMILY["llama"])
    table = llama.model_dump()
    for block in table["blocks"]:
        block["feed_forward"]["swiglu_limit"] = 10.0
    assert "swiglu_limit" in (representable_as(ModelConfig.model_validate(table))["llama"] or "")
    table["blocks"][3]["attention"]["num_kv_heads"] = 9
    assert "different attention" in (representable_as(ModelConfig.model_validate(table))["llama"] or "")


def test_a_model_that_does_not_know_its_length_must_be_told() -> None:
    config = FAMILIES["llama"].to_config(BY_FAMILY["llama"]).model_copy(update={"max_positions": None})
    with pytest.raises(CheckpointError, match="max_positions"):
        FAMILIES["llama"].from_config(config)
    assert FAMILIES["llama"].from_config(config, max_positions=77)["max_position_embeddings"] == 77


def test_ntk_scaling_is_written_as_a_larger_base() -> None:
    config = FAMILIES["llama"].to_config(BY_FAMILY["llama"])
    table = config.model_dump()
    for block in table["blocks"]:
        block["attention"]["rope"] = {"theta": 1e4, "scaling": {"kind": "ntk", "factor": 4.0}}
    raw = FAMILIES["llama"].from_config(ModelConfig.model_validate(table))
    assert raw["rope_scaling"] is None
    assert raw["rope_theta"] == pytest.approx(1e4 * 4 ** (64 / 62))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_in_any_field_is_read_or_refused(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    raw = changed(family, num_hidden_layers=2, mlp_only_layers=[])
    rope = raw.get("rope_scaling")
    for key in data.draw(st.lists(st.sampled_from(sorted(raw)), min_size=1, max_size=3, unique=True)):
        raw[key] = data.draw(_JSON)
    if isinstance(rope, dict) and data.draw(st.booleans()):
        raw["rope_scaling"] = {**rope, data.draw(st.sampled_from(sorted(rope))): data.draw(_JSON)}
    try:
        read = FAMILIES[family].read(raw)
    except CheckpointError:
        return
    back = FAMILIES[family].from_config(read.config)
    assert FAMILIES[family].to_config(back) == read.config
