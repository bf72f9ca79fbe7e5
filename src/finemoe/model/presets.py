"""Every named model: the configurations of DeepSeekMoE and its baselines, DeepSeek LLM, and a ladder of tiny ones.

Data, no logic. Sources: DeepSeekMoE (2401.06066) sections 4.1-4.3, 5.1, 7.1 and Appendix A; DeepSeek LLM (2401.02954)
Table 2. Widths that the papers do not print are 8/3 of the hidden size, rounded up to a multiple of 8 (2B models) or
64 (larger ones); `unrounded` maps each such width to the published fraction, which the printed FLOPs use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finemoe.core.config import did_you_mean, merge, parse
from finemoe.core.errors import ConfigError
from finemoe.model.config import ModelRecipe


@dataclass(frozen=True)
class Preset:
    """A named model."""

    summary: str
    model: Mapping[str, Any]
    seq_len: int
    """Training sequence length of the source."""
    unrounded: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _attention(num_heads: int, head_dim: int, num_kv_heads: int | None = None) -> dict[str, Any]:
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads or num_heads, "head_dim": head_dim}


def _dense(width: int) -> dict[str, Any]:
    return {"kind": "dense", "ffn_hidden_size": width}


def _moe(
    shared: int, routed: int, active: int, width: int, router: str = "softmax_topk", **balance: float
) -> dict[str, Any]:
    return {
        "kind": "moe",
        "num_shared_experts": shared,
        "num_routed_experts": routed,
        "experts_per_token": active,
        "expert_hidden_size": width,
        "router": {"kind": router},
        "balance": balance,
    }


_2B = {"vocab_size": 8192, "hidden_size": 1280, "num_layers": 9, "attention": _attention(10, 128)}
_FFN = 8 / 3 * 1280  # the standard feed-forward width at 2B, 3413.3
_2B_WIDTHS = {856: _FFN / 4, 3416: _FFN, 4096: 1.2 * _FFN, 13656: 4 * _FFN, 54616: 16 * _FFN}

_16B = {"vocab_size": 102_400, "hidden_size": 2048, "num_layers": 28, "attention": _attention(16, 128)}
_145B = {"vocab_size": 102_400, "hidden_size": 4096, "num_layers": 62, "attention": _attention(32, 128)}
_DEVICES: dict[str, Any] = {"expert": 0.003, "device": 0.05, "num_devices": 4}


def _2b(summary: str, feed_forward: Mapping[str, Any]) -> Preset:
    return Preset(summary, {**_2B, "feed_forward": feed_forward}, 2048, _2B_WIDTHS)


# The papers' 0.006 at hidden sizes of 1280 and up, scaled as 1 / sqrt(hidden size), so that a projection of a
# normalised input keeps the same size: 0.006 · sqrt(1280) = 0.21. At 64 that is 0.027; with 0.006 itself the logits
# and the residual stream start 4.5 times smaller and a tiny model spends a good part of its short run growing them.
def _tiny(hidden: int, layers: int, vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": layers,
        "attention": _attention(hidden // 32, 32),
        "init_std": round(0.006 * (1280 / hidden) ** 0.5, 4),
    }


PRESETS: dict[str, Preset] = {
    "deepseek-moe-2b": _2b("DeepSeekMoE, 1 shared + 63 routed of 0.25 FFN, top 7", _moe(1, 63, 7, 856, expert=0.01)),
    "dense-0.2b": _2b("Dense baseline, one standard FFN", _dense(3416)),
    "hash-2b": _2b("Hash Layer, 16 experts, top 1", _moe(0, 16, 1, 3416, "hash_layer")),
    "switch-2b": _2b("Switch, 16 experts, top 1", _moe(0, 16, 1, 3416, expert=0.01)),
    "gshard-2b": _2b("GShard, 16 experts, top 2", _moe(0, 16, 2, 3416, expert=0.01)),
    "gshard-2b-x1.2": _2b("GShard with experts 1.2 times as wide", _moe(0, 16, 2, 4096, expert=0.01)),
    "gshard-2b-x1.5": _2b("GShard with experts 1.5 times as wide", _moe(0, 16, 2, 5120, expert=0.01)),
    "dense-2b-x4": _2b("Dense, 4 standard FFNs always on", _dense(13656)),
    "dense-2b-x16": _2b("Dense, 16 standard FFNs always on", _dense(54616)),
    "deepseek-moe-16b": Preset(
        "DeepSeekMoE 16B, 2 shared + 64 routed, top 6, first layer dense",
        {
            **_16B,
            "leading": {"count": 1, "feed_forward": _dense(10944)},
            "feed_forward": _moe(2, 64, 6, 1408, expert=0.001),
        },
        4096,
        {1408: 8 / 3 * 2048 / 4, 10944: 2 * 8 / 3 * 2048},
    ),
    "deepseek-moe-145b": Preset(
        "DeepSeekMoE 145B, 4 shared + 128 routed, top 12, first layer dense",
        {
            **_145B,
            "leading": {"count": 1, "feed_forward": _dense(22528)},
            "feed_forward": _moe(4, 128, 12, 1408, **_DEVICES),
        },
        4096,
        notes=(
            "the paper prints 585.6T per 4K tokens; this count gives 585.5T. The width of the dense first layer is not "
            "printed: 22528, the width of the activated experts, comes closest",
        ),
    ),
    "deepseek-moe-142b-half": Preset(
        "DeepSeekMoE 142B, half activated: 2 shared + 128 routed, top 6",
        {
            **_145B,
            "leading": {"count": 1, "feed_forward": _dense(11264)},
            "feed_forward": _moe(2, 128, 6, 1408, **_DEVICES),
        },
        4096,
        notes=(
            "the paper prints 12.2B active, which does not fit its own 374.6T FLOPs; these 13.6B do, with a dense "
            "first layer of 11264, the width of the activated experts (the paper prints none)",
        ),
    ),
    "gshard-137b": Preset(
        "GShard 137B, 16 experts, top 2",
        {
            **_145B,
            "leading": {"count": 1, "feed_forward": _dense(21888)},
            "feed_forward": _moe(0, 16, 2, 10944, **_DEVICES),
        },
        4096,
        {10944: 8 / 3 * 4096, 21888: 2 * 8 / 3 * 4096},
    ),
    "deepseek-llm-7b": Preset(
        "DeepSeek LLM 7B, dense, MHA",
        {
            "vocab_size": 102_400,
            "hidden_size": 4096,
            "num_layers": 30,
            "attention": _attention(32, 128),
            "feed_forward": _dense(11008),
        },
        4096,
        {11008: 8 / 3 * 4096},
    ),
    "deepseek-llm-67b": Preset(
        "DeepSeek LLM 67B, dense, GQA with 8 key heads",
        {
            "vocab_size": 102_400,
            "hidden_size": 8192,
            "num_layers": 95,
            "attention": _attention(64, 128, 8),
            "feed_forward": _dense(22016),
        },
        4096,
        {22016: 8 / 3 * 8192},
    ),
    "tiny-dense": Preset("0.4M, dense, for a first look", {**_tiny(64, 3, 2048), "feed_forward": _dense(176)}, 256),
    "tiny-moe": Preset(
        "1.9M, DeepSeekMoE 1 + 7 of 63: trains in minutes on two cores",
        {**_tiny(64, 3, 2048), "feed_forward": _moe(1, 63, 7, 44, expert=0.01)},
        256,
    ),
    "mini-moe": Preset(
        "10M, DeepSeekMoE 1 + 7 of 63: an hour on two cores",
        {**_tiny(128, 4, 4096), "feed_forward": _moe(1, 63, 7, 88, expert=0.01)},
        512,
    ),
    "small-moe": Preset(
        "74M, DeepSeekMoE 1 + 7 of 63: an evening on a workstation",
        {**_tiny(256, 8, 8192), "feed_forward": _moe(1, 63, 7, 172, expert=0.01)},
        1024,
    ),
}


def find_preset(name: str) -> Preset:
    """The preset `name`.

    Raises:
        ConfigError: naming the closest preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset `{name}`{did_you_mean(name, sorted(PRESETS))}")
    return PRESETS[name]


def resolve(model: Mapping[str, Any], source: str) -> ModelRecipe:
    """The `[model]` table of a recipe: a `preset` and what differs from it, or everything spelt out.

    Raises:
        ConfigError: unknown preset, unknown key, impossible combination.
    """
    own = {key: value for key, value in model.items() if key != "preset"}
    base = find_preset(str(model["preset"])).model if "preset" in model else {}
    return parse(ModelRecipe, merge(base, own), source)
