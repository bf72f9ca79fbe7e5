"""Models for laptops and workstations: the shapes of the large ones, small enough to train.

`tiny-v1`, `-v2`, `-v3` and `mini-v1`, `-v2`, `-v3` are ladders: one base, layer for layer of nearly the same weights in
all and active ones, with the attention, the router and the balancing of DeepSeekMoE, V2 and V3. Experts are 1/4 of a
standard FFN, 1 shared and 64 routed (8 groups of 8), and the dense first layer is as wide as the 8 active ones.
`tiny-lite` and its larger sisters are what transformers and llama.cpp both run: start there if the model is to go
elsewhere.
"""

from __future__ import annotations

from finemoe.model.presets.preset import Preset, Table, attention, dense, first_dense, moe

_EVEN = {"expert": 0.01}


# The papers' 0.006 at hidden sizes of 1280 and up, scaled as 1 / sqrt(hidden size), so that a projection of a
# normalised input keeps the same size: 0.006 · sqrt(1280) = 0.21. At 64 that is 0.027; with 0.006 itself the logits
# and the residual stream start 4.5 times smaller and a tiny model spends a good part of its short run growing them.
def _base(hidden: int, layers: int, vocab: int) -> Table:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "attention": attention(hidden // 32, 32),
        "init_std": round(0.006 * (1280 / hidden) ** 0.5, 4),
    }


TINY: dict[str, Preset] = {
    "tiny-dense": Preset("for a first look", {**_base(64, 3, 2048), "feed_forward": dense(176)}, 256),
    "tiny-moe": Preset(
        "minutes on two cores", {**_base(64, 3, 2048), "feed_forward": moe(1, 63, 7, 44, balance=_EVEN)}, 256
    ),
    "mini-moe": Preset(
        "an hour on two cores", {**_base(128, 4, 4096), "feed_forward": moe(1, 63, 7, 88, balance=_EVEN)}, 512
    ),
    "small-moe": Preset(
        "a long evening", {**_base(256, 8, 8192), "feed_forward": moe(1, 63, 7, 172, balance=_EVEN)}, 1024
    ),
}


def _latent(hidden: int, rank: int) -> Table:
    """As many weights as MHA with heads of 32 has, within 5 %; a cache of 3/8, 5/16, 9/32 of its (rank 32, 64, 128)."""
    return {
        "kind": "latent",
        "num_heads": hidden // 32,
        "q_lora_rank": rank,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "rope": {"layout": "interleaved"},
    }


def _lite(base: Table, width: int, rank: int) -> Table:
    """V2-Lite in small, which both transformers and llama.cpp have; DeepSeekMoE's own and V2's groups one of them."""
    feed_forward = moe(1, 63, 7, width, balance=_EVEN)
    return {
        **base,
        "attention": _latent(base["hidden_size"], rank),
        "leading": first_dense(1, 8 * width),
        "feed_forward": feed_forward,
    }


LITE: dict[str, Preset] = {
    "tiny-lite": Preset("V2-Lite, minutes", _lite(_base(64, 3, 2048), 44, 32), 256),
    "mini-lite": Preset("V2-Lite, an hour", _lite(_base(128, 4, 4096), 88, 64), 512),
    "small-lite": Preset("V2-Lite, an evening", _lite(_base(256, 8, 8192), 172, 128), 1024),
}


def _ladder(name: str, base: Table, width: int, rank: int, seq_len: int) -> dict[str, Preset]:
    common = {**base, "leading": first_dense(1, 8 * width)}
    latent = {**common, "attention": _latent(base["hidden_size"], rank)}
    # As many experts as V2-Lite, and its route scale of 1: V2's 16 belongs to 160 of them.
    v2_router = {"kind": "group_limited", "num_groups": 8, "groups_per_token": 3, "route_scale": 1.0}
    v2_balance = {"expert": 0.003, "device": 0.05, "communication": 0.02, "num_devices": 8}
    v3_router = {
        "kind": "sigmoid_biased",
        "num_groups": 8,
        "groups_per_token": 4,
        "normalize_gates": True,
        "route_scale": 2.5,
    }
    v1 = {**common, "feed_forward": moe(1, 64, 7, width, balance=_EVEN)}
    dropping: Table = {"capacity_factor": 1.0, "capacity_level": "device", "capacity_exempt": 0.1}
    v2 = {**latent, "feed_forward": moe(1, 64, 7, width, v2_router, v2_balance, **dropping)}
    v3 = {**latent, "mtp_depth": 1, "feed_forward": moe(1, 64, 7, width, v3_router, {"sequence": 0.0001})}
    return {
        f"{name}-v1": Preset("MHA, softmax", v1, seq_len),
        f"{name}-v2": Preset("MLA, 3 of 8 groups", v2, seq_len),
        f"{name}-v3": Preset("MLA, 4 of 8, MTP", v3, seq_len),
    }


LADDERS: dict[str, Preset] = {
    **_ladder("tiny", _base(64, 3, 2048), 44, 32, 256),
    **_ladder("mini", _base(128, 4, 4096), 88, 64, 512),
}
