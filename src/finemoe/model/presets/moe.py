"""DeepSeekMoE (2401.06066) and its baselines: sections 4.1-4.3, 5.1, 7.1 and Appendix A.

Widths that the paper does not print are 8/3 of the hidden size, rounded up to a multiple of 8 (2B models) or 64 (larger
ones); `unrounded` maps each such width to the published fraction, which the printed FLOPs use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finemoe.model.presets.preset import Preset, attention, dense, first_dense, moe

_2B = {"vocab_size": 8192, "hidden_size": 1280, "num_layers": 9, "attention": attention(10, 128)}
_FFN = 8 / 3 * 1280  # the standard feed-forward width at 2B, 3413.3
_2B_WIDTHS = {856: _FFN / 4, 3416: _FFN, 4096: 1.2 * _FFN, 13656: 4 * _FFN, 54616: 16 * _FFN}
_EVEN = {"expert": 0.01}

_16B = {
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "num_layers": 28,
    "max_positions": 4096,
    "attention": attention(16, 128),
}
_145B = {"vocab_size": 102_400, "hidden_size": 4096, "num_layers": 62, "attention": attention(32, 128)}
_DEVICES = {"expert": 0.003, "device": 0.05, "num_devices": 4}


def _2b(summary: str, feed_forward: Mapping[str, Any]) -> Preset:
    return Preset(summary, {**_2B, "feed_forward": feed_forward}, 2048, _2B_WIDTHS)


DEEPSEEK_MOE: dict[str, Preset] = {
    "deepseek-moe-2b": _2b("experts of 1/4 FFN", moe(1, 63, 7, 856, balance=_EVEN)),
    "dense-0.2b": _2b("one standard FFN", dense(3416)),
    "hash-2b": _2b("Hash Layer", moe(0, 16, 1, 3416, "hash_layer")),
    "switch-2b": _2b("Switch", moe(0, 16, 1, 3416, balance=_EVEN)),
    "gshard-2b": _2b("GShard", moe(0, 16, 2, 3416, balance=_EVEN)),
    "gshard-2b-x1.2": _2b("GShard, 1.2 FFN each", moe(0, 16, 2, 4096, balance=_EVEN)),
    "gshard-2b-x1.5": _2b("GShard, 1.5 FFN each", moe(0, 16, 2, 5120, balance=_EVEN)),
    "dense-2b-x4": _2b("4 standard FFNs", dense(13656)),
    "dense-2b-x16": _2b("16 standard FFNs", dense(54616)),
    "deepseek-moe-16b": Preset(
        "first layer dense",
        {**_16B, "leading": first_dense(1, 10944), "feed_forward": moe(2, 64, 6, 1408, balance={"expert": 0.001})},
        4096,
        {1408: 8 / 3 * 2048 / 4, 10944: 2 * 8 / 3 * 2048},
    ),
    "deepseek-moe-145b": Preset(
        "experts of 1/8 FFN",
        {**_145B, "leading": first_dense(1, 22528), "feed_forward": moe(4, 128, 12, 1408, balance=_DEVICES)},
        4096,
        notes=(
            "the paper prints 585.6T per 4K tokens; this count gives 585.5T. The width of the dense first layer is not "
            "printed: 22528, the width of the activated experts, comes closest",
        ),
    ),
    "deepseek-moe-142b-half": Preset(
        "half as many active",
        {**_145B, "leading": first_dense(1, 11264), "feed_forward": moe(2, 128, 6, 1408, balance=_DEVICES)},
        4096,
        notes=(
            "the paper prints 12.2B active, which does not fit its own 374.6T FLOPs; these 13.6B do, with a dense "
            "first layer of 11264, the width of the activated experts (the paper prints none)",
        ),
    ),
    "gshard-137b": Preset(
        "GShard",
        {**_145B, "leading": first_dense(1, 21888), "feed_forward": moe(0, 16, 2, 10944, balance=_DEVICES)},
        4096,
        {10944: 8 / 3 * 4096, 21888: 2 * 8 / 3 * 4096},
    ),
}
