"""DeepSeek-V2, Coder-V2, V3 and R1: multi-head latent attention.

Sources: DeepSeek-V2 (2405.04434) sections 3.1.2, 3.1.4 and Appendix B, DeepSeek-Coder-V2 (2406.11931) section 3, V3
(2412.19437) section 4.2, R1 (2501.12948). Context lengths are as in the configurations released with the weights.
"""

from __future__ import annotations

from finemoe.model.presets.preset import Preset, Table, attention, first_dense, moe


def _latent(num_heads: int, q_lora_rank: int | None, mscale: float) -> Table:
    yarn = {"kind": "yarn", "factor": 40.0, "original_max_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
    return {
        "kind": "latent",
        "num_heads": num_heads,
        **({} if q_lora_rank is None else {"q_lora_rank": q_lora_rank}),
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope": {
            "theta": 10_000.0,
            "layout": "interleaved",
            "scaling": {**yarn, "mscale": mscale, "mscale_all_dim": mscale},
        },
    }


_V2_LITE: Table = {
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "num_layers": 27,
    "max_positions": 163_840,
    "attention": _latent(16, None, 0.707),
    "leading": first_dense(1, 10944),
    "feed_forward": moe(2, 64, 6, 1408, balance={"expert": 0.001}),
}
_V2: Table = {
    "vocab_size": 102_400,
    "hidden_size": 5120,
    "num_layers": 60,
    "max_positions": 163_840,
    "attention": _latent(128, 1536, 0.707),
    "leading": first_dense(1, 12288),
    "feed_forward": moe(
        2,
        160,
        6,
        1536,
        {"kind": "group_limited", "num_groups": 8, "groups_per_token": 3, "route_scale": 16.0},
        {"expert": 0.003, "device": 0.05, "communication": 0.02, "num_devices": 8},
        capacity_factor=1.0,
        capacity_level="device",
        capacity_exempt=0.1,
    ),
}
_V3: Table = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "num_layers": 61,
    "max_positions": 163_840,
    "mtp_depth": 1,
    "attention": _latent(128, 1536, 1.0),
    "leading": first_dense(3, 18432),
    "feed_forward": moe(
        1,
        256,
        8,
        2048,
        {
            "kind": "sigmoid_biased",
            "num_groups": 8,
            "groups_per_token": 4,
            "normalize_gates": True,
            "route_scale": 2.5,
        },
        {"sequence": 0.0001},
    ),
}

_LITE_ACTIVE = "the paper's 2.4B active leave the input embedding out: 2.45B here"
_MSCALE = (
    "rope.scaling.mscale is 0.707, as in the paper (0.0707 ln s + 1); DeepSeek's own inference settings for the 236B "
    "model leave it at 1"
)
_V3_SIZES = (
    "the paper's 37B active are 37.6B with embedding and head, 36.6B without the input embedding",
    "Hugging Face shows 685B: these 671B and 14B of the multi-token prediction module, whose files repeat embedding "
    "and head",
)
_DEDUCED = "not a published model: V2's cache comparison (Table 9) with its heads deduced from the printed"


def _without_latents(model: Table, num_heads: int) -> Table:
    return {**model, "max_positions": 4096, "attention": attention(num_heads, 128)}


DEEPSEEK_V2: dict[str, Preset] = {
    "deepseek-v2-lite": Preset("MLA", _V2_LITE, 4096, notes=(_LITE_ACTIVE,)),
    "deepseek-v2": Preset("MLA, 3 of 8 groups", _V2, 4096, notes=(_MSCALE,)),
    "deepseek-coder-v2-lite": Preset("as V2-Lite", _V2_LITE, 4096, notes=(_LITE_ACTIVE,)),
    "deepseek-coder-v2": Preset("as V2", _V2, 4096, notes=(_MSCALE,)),
    "deepseek-v2-lite-mha": Preset(
        "V2-Lite with MHA",
        _without_latents(_V2_LITE, 16),
        4096,
        notes=(f"{_DEDUCED} 110.6K: 2 x 16 heads x 128 x 27 layers",),
    ),
    "deepseek-v2-mha": Preset(
        "V2 with MHA",
        _without_latents(_V2, 56),
        4096,
        notes=(
            f"{_DEDUCED} 860.2K: 2 x 56 heads x 128 x 60 layers. The two large models compared there are of 250.8B and "
            "247.4B, larger than V2 itself; only the cache is theirs",
        ),
    ),
}

DEEPSEEK_V3: dict[str, Preset] = {
    "deepseek-v3": Preset("MLA, 4 of 8, MTP", _V3, 4096, notes=_V3_SIZES),
    "deepseek-r1": Preset("as V3", _V3, 32_768, notes=_V3_SIZES),
}
